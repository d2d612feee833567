-- EAFT-REAP by mass: the sum of w * g * norm over the tokens that selected the expert.
--
-- grain: layer, expert
-- reads: experts
-- params: none
select
    layer,
    expert,
    (
        w_good * sum_g_norm_good
        + w_uncertain * sum_g_norm_uncertain
        + w_conflict * sum_g_norm_conflict
    ) as saliency
from experts
where n > 0
