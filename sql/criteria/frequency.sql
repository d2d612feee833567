-- How many tokens selected the expert.
--
-- grain: layer, expert
-- reads: experts
-- params: none
select
    layer,
    expert,
    n::double as saliency
from experts
where n > 0
