-- The text that the model read, token by token, prompts included.
--
-- grain: block, position
-- reads: blocks, vocab
-- params: none
select
    blocks.block,
    blocks.position,
    blocks.token,
    vocab.text
from blocks
left join vocab on blocks.token = vocab.token
