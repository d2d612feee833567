-- Every expert of the model in order of saliency within its layer; rank 0 is kept longest.
--
-- An expert that no token selected has no saliency and ranks last, whatever the criterion. Equal
-- saliencies rank by expert.
--
-- grain: layer, expert
-- reads: experts, saliency
-- params: none
with scored as (
    select
        experts.layer,
        experts.expert,
        experts.n,
        experts.n_good,
        experts.n_uncertain,
        experts.n_conflict,
        case when experts.n > 0 then saliency.saliency::double end as saliency
    from experts
    left join saliency on experts.layer = saliency.layer and experts.expert = saliency.expert
)

select
    layer,
    expert,
    (
        row_number() over (partition by layer order by saliency desc nulls last, expert asc) - 1
    )::integer as rank,
    saliency,
    n,
    n_good,
    n_uncertain,
    n_conflict
from scored
order by layer, rank
