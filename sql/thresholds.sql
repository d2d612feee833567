-- The borders between regions, as exact quantiles over all tokens of the run.
--
-- The quantile at level L is the smallest stored value v with at least a share L of the tokens <= v
-- (quantile_disc). So a border is a float32 that occurs in the data, and comparing stored values
-- with it is exact. p_hi and H_mid are null unless their levels are given.
--
-- grain: one row
-- reads: tokens
-- params: q, h_hi, p_hi, h_mid
select
    quantile_disc(p_t, $q) as p_q,
    quantile_disc(H_t, $q) as H_q,
    quantile_disc(H_t, $h_hi) as H_hi,
    case when $p_hi is not null then quantile_disc(p_t, coalesce($p_hi, 0.5)) end as p_hi,
    case when $h_mid is not null then quantile_disc(H_t, coalesce($h_mid, 0.5)) end as H_mid
from tokens
