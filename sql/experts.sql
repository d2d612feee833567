-- What the run knows of each expert, one row for every expert of the model: what criteria read.
--
--   n                 tokens that selected the expert; n_good, n_uncertain, n_conflict among them
--   sum_g_norm        sum of g * norm over those tokens; sum_g_norm_good, ... within a region
--   sum_g, sum_norm   sums of g and of norm, likewise
--   w_good, ...       the weights, the same in every row
--
-- Under the strict good the totals exceed the three regions by the neutral tokens. Never-routed
-- experts have zeros throughout.
--
-- grain: layer, expert
-- reads: layers, cells, weights
-- params: none
with grid as (
    select
        layer,
        unnest(range(experts)) as expert
    from layers
),

tallies as (
    select
        layer,
        expert,
        sum(n) as n,
        sum(n) filter (where region = 'good') as n_good,
        sum(n) filter (where region = 'uncertain') as n_uncertain,
        sum(n) filter (where region = 'conflict') as n_conflict,
        sum(g_norm_q32) as g_norm,
        sum(g_norm_q32) filter (where region = 'good') as g_norm_good,
        sum(g_norm_q32) filter (where region = 'uncertain') as g_norm_uncertain,
        sum(g_norm_q32) filter (where region = 'conflict') as g_norm_conflict,
        sum(g_q32) as g,
        sum(g_q32) filter (where region = 'good') as g_good,
        sum(g_q32) filter (where region = 'uncertain') as g_uncertain,
        sum(g_q32) filter (where region = 'conflict') as g_conflict,
        sum(norm_q32) as norm,
        sum(norm_q32) filter (where region = 'good') as norm_good,
        sum(norm_q32) filter (where region = 'uncertain') as norm_uncertain,
        sum(norm_q32) filter (where region = 'conflict') as norm_conflict
    from cells
    group by layer, expert
)

select
    grid.layer::smallint as layer,
    grid.expert::smallint as expert,
    coalesce(tallies.n, 0)::bigint as n,
    coalesce(tallies.n_good, 0)::bigint as n_good,
    coalesce(tallies.n_uncertain, 0)::bigint as n_uncertain,
    coalesce(tallies.n_conflict, 0)::bigint as n_conflict,
    coalesce(tallies.g_norm, 0)::double / 4294967296 as sum_g_norm,
    coalesce(tallies.g_norm_good, 0)::double / 4294967296 as sum_g_norm_good,
    coalesce(tallies.g_norm_uncertain, 0)::double / 4294967296 as sum_g_norm_uncertain,
    coalesce(tallies.g_norm_conflict, 0)::double / 4294967296 as sum_g_norm_conflict,
    coalesce(tallies.g, 0)::double / 4294967296 as sum_g,
    coalesce(tallies.g_good, 0)::double / 4294967296 as sum_g_good,
    coalesce(tallies.g_uncertain, 0)::double / 4294967296 as sum_g_uncertain,
    coalesce(tallies.g_conflict, 0)::double / 4294967296 as sum_g_conflict,
    coalesce(tallies.norm, 0)::double / 4294967296 as sum_norm,
    coalesce(tallies.norm_good, 0)::double / 4294967296 as sum_norm_good,
    coalesce(tallies.norm_uncertain, 0)::double / 4294967296 as sum_norm_uncertain,
    coalesce(tallies.norm_conflict, 0)::double / 4294967296 as sum_norm_conflict,
    weights.w_good,
    weights.w_uncertain,
    weights.w_conflict
from grid
left join tallies on grid.layer = tallies.layer and grid.expert = tallies.expert
cross join weights
