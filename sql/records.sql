-- Everything known about one expert's part in one prediction: what ad-hoc questions read.
--
-- grain: token_id, layer, expert
-- reads: routes, tokens, regions
-- params: none
select
    routes.token_id,
    routes.layer,
    routes.expert,
    routes.g,
    routes.norm,
    tokens.p_t,
    tokens.logp,
    tokens.H_t,
    regions.region,
    tokens.pack,
    tokens.source,
    tokens.row,
    tokens.block,
    tokens.position,
    tokens.target,
    tokens.top_token
from routes
inner join tokens on routes.token_id = tokens.token_id
inner join regions on routes.token_id = regions.token_id
