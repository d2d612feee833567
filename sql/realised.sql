-- The share of tokens that each border takes. Where many tokens tie at a border, this exceeds the
-- level that was asked for, because comparisons are inclusive.
--
-- grain: one row
-- reads: tokens, thresholds
-- params: none
select
    avg((tokens.p_t <= thresholds.p_q)::integer) as p_q_share,
    avg((tokens.H_t <= thresholds.H_q)::integer) as H_q_share,
    avg((tokens.H_t >= thresholds.H_hi)::integer) as H_hi_share
from tokens
cross join thresholds
