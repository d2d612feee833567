-- How a ranking differs from the default one: places gained (positive) or lost by each expert.
--
-- grain: layer, expert
-- reads: ranking, default_ranking
-- params: none
select
    ranking.layer,
    ranking.expert,
    ranking.rank,
    default_ranking.rank as default_rank,
    default_ranking.rank - ranking.rank as gained
from ranking
inner join
    default_ranking
    on ranking.layer = default_ranking.layer and ranking.expert = default_ranking.expert
order by ranking.layer, ranking.rank
