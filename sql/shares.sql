-- How many tokens each region holds, and its part in the total: w_share is its share of the total
-- absolute token weight (null where every weight is 0).
--
-- Tokens are counted in the first layer's cells, where each token stands top_k times.
--
-- grain: region
-- reads: cells, layers, weights
-- params: none
with first_layer as (
    select
        layer,
        top_k
    from layers
    order by layer
    limit 1
),

given as (
    select
        unnest(['good', 'uncertain', 'conflict', 'neutral']) as region,
        unnest([w_good, w_uncertain, w_conflict, 0]) as w
    from weights
),

counted as (
    select
        cells.region,
        sum(cells.n) // any_value(first_layer.top_k) as tokens
    from cells
    inner join first_layer on cells.layer = first_layer.layer
    group by cells.region
),

regions_in_order as (
    select
        given.region,
        given.w,
        coalesce(counted.tokens, 0)::bigint as tokens
    from given
    left join counted on given.region = counted.region
)

select
    region,
    tokens,
    tokens / sum(tokens) over () as token_share,
    w,
    abs(w) * tokens / nullif(sum(abs(w) * tokens) over (), 0) as w_share
from regions_in_order
order by list_position(['good', 'uncertain', 'conflict', 'neutral'], region)
