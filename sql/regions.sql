-- What each prediction says about the experts behind it.
--
--   conflict   p_t <= p_q and H_t <= H_q     confidently wrong
--   uncertain  p_t <= p_q and H_t >= H_hi    wrong, and the model knows
--   good       everything else; or, where p_hi and H_mid are set (the strict good),
--              p_t >= p_hi and H_t <= H_mid
--   neutral    under the strict good only: in none of the above. It weighs 0, and still counts as
--              a token that selected its experts
--
-- Comparisons are inclusive. Where several hold, the first of conflict, uncertain, good wins.
--
-- grain: token_id
-- reads: tokens, thresholds
-- params: none
select
    tokens.token_id,
    case
        when tokens.p_t <= thresholds.p_q and tokens.H_t <= thresholds.H_q then 'conflict'
        when tokens.p_t <= thresholds.p_q and tokens.H_t >= thresholds.H_hi then 'uncertain'
        when thresholds.p_hi is null then 'good'
        when tokens.p_t >= thresholds.p_hi and tokens.H_t <= thresholds.H_mid then 'good'
        else 'neutral'
    end::enum('good', 'uncertain', 'conflict', 'neutral') as region
from tokens
cross join thresholds
