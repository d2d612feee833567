-- Cells of the whole run: partial cells of any number of chunks, added up. They are the sufficient
-- statistic of every criterion, so new weights never read a token again.
--
-- Sums are integers in units of 2^-32, as decimals of scale 0: the widest integer of Parquet.
--
-- grain: layer, expert, region
-- reads: partial_cells
-- params: none
select
    layer,
    expert,
    region::varchar as region,
    sum(n)::bigint as n,
    sum(g_norm_q32)::decimal(38, 0) as g_norm_q32,
    sum(g_q32)::decimal(38, 0) as g_q32,
    sum(norm_q32)::decimal(38, 0) as norm_q32
from partial_cells
group by layer, expert, region
order by layer, expert, region
