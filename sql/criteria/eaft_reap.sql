-- EAFT-REAP: the mean of w * g * norm over the tokens that selected the expert (the policy's S_j).
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
    ) / n as saliency
from experts
where n > 0
