-- What a token of each region weighs. A neutral token weighs 0.
--
-- grain: one row
-- reads: none
-- params: w_good, w_uncertain, w_conflict
select
    $w_good::double as w_good,
    $w_uncertain::double as w_uncertain,
    $w_conflict::double as w_conflict
