-- Cells of the tokens at hand: counts and sums per expert and region, whatever the weights.
--
-- Sums are integers in units of 2^-32 (_q32). Integer addition is exact in any order, so neither
-- threads nor chunks nor machines move a bit; rounding one record costs at most 2^-33.
--
-- grain: layer, expert, region
-- reads: routes, regions
-- params: none
select
    routes.layer,
    routes.expert,
    regions.region,
    count(*) as n,
    sum((routes.g::double * routes.norm::double * 4294967296)::bigint) as g_norm_q32,
    sum((routes.g::double * 4294967296)::bigint) as g_q32,
    sum((routes.norm::double * 4294967296)::bigint) as norm_q32
from routes
inner join regions on routes.token_id = regions.token_id
group by routes.layer, routes.expert, regions.region
