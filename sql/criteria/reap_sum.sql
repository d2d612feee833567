-- REAP by mass: the sum of g * norm over the tokens that selected the expert.
--
-- grain: layer, expert
-- reads: experts
-- params: none
select
    layer,
    expert,
    sum_g_norm as saliency
from experts
where n > 0
