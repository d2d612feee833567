-- What a ranking would change in a pruned model: of the experts kept over all layers at common
-- keep fractions, how many the default ranking would have dropped.
--
-- Each layer keeps floor(keep_frac * experts), at least 1.
--
-- grain: keep_frac
-- reads: moves
-- params: none
with sized as (
    select
        rank,
        default_rank,
        count(*) over (partition by layer) as experts
    from moves
),

fractions as (
    select unnest([0.9375, 0.875, 0.75, 0.5]) as keep_frac
),

cut as (
    select
        fractions.keep_frac,
        sized.rank,
        sized.default_rank,
        greatest(floor(fractions.keep_frac * sized.experts), 1) as keep_n
    from sized
    cross join fractions
)

select
    keep_frac::double as keep_frac,
    count(*) filter (where rank < keep_n) as kept,
    count(*) filter (where rank < keep_n and default_rank >= keep_n) as changed
from cut
group by keep_frac
order by keep_frac desc
