-- Whether the cells account for every record: each token selects top_k experts of every layer.
--
-- grain: layer
-- reads: cells, layers
-- params: tokens
with run as (
    select $tokens::bigint as tokens
)

select
    layers.layer,
    layers.top_k * run.tokens as expected,
    coalesce(sum(cells.n), 0)::bigint as found
from layers
cross join run
left join
    cells
    on layers.layer = cells.layer and layers.experts > cells.expert and cells.expert >= 0
group by layers.layer, layers.top_k, run.tokens
order by layers.layer
