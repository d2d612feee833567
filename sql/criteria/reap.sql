-- REAP: the mean of g * norm over the tokens that selected the expert (arXiv 2510.13999).
--
-- grain: layer, expert
-- reads: experts
-- params: none
select
    layer,
    expert,
    sum_g_norm / n as saliency
from experts
where n > 0
