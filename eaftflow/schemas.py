"""The data contract: every table that stages exchange, declared once.

A run is a folder of Parquet tables. All tables of a run cover the same tokens, part by part:

    RUN/manifest.json              what was captured, from what, with which options
    RUN/vocab.parquet              the tokenizer's vocabulary as text
    RUN/tokens/part-000000.parquet
    RUN/routes/part-000000.parquet
    RUN/blocks/part-000000.parquet
    RUN/_parts/part-000000.json    commit record; a part without one does not exist

**The one-token shift.** The logits that score the token at ``position + 1`` of a block come from
``position``, and so does the routing that made that prediction. A row of `tokens` stands for one
prediction: ``position`` is where it was made, ``target`` is the token at ``position + 1``, ``p_t``
and ``H_t`` score that target, and the rows of `routes` with the same ``token_id`` hold the experts
selected at ``position``. Nothing else in the code base shifts.

Integers are signed throughout, so that other engines can read the tables. Floats are float32:
thresholds are compared with stored values exactly.
"""

import pyarrow as pa

FORMAT_VERSION = 1

_TEXT = pa.dictionary(pa.int32(), pa.string())

TOKENS = pa.schema(
    [
        pa.field("token_id", pa.int64(), nullable=False),  # dense from 0 over the run
        pa.field("pack", _TEXT, nullable=False),  # named set of calibration rows
        pa.field("source", _TEXT, nullable=False),  # the row's own `source`, "" where it has none
        pa.field("row", pa.int32(), nullable=False),  # row of the pack, over its files in order
        pa.field("block", pa.int32(), nullable=False),  # packed block
        pa.field("position", pa.int32(), nullable=False),  # where the prediction was made
        pa.field("target", pa.int32(), nullable=False),  # reference token, at position + 1
        pa.field("top_token", pa.int32(), nullable=False),  # the token the model preferred
        pa.field("p_t", pa.float32(), nullable=False),  # probability of `target`
        pa.field("logp", pa.float32(), nullable=False),  # natural log of p_t
        pa.field("H_t", pa.float32(), nullable=False),  # top-K entropy / ln K, in [0, 1]
    ]
)
"""Grain: one predicted token. Sorted by token_id."""

ROUTES = pa.schema(
    [
        pa.field("token_id", pa.int64(), nullable=False),
        pa.field("layer", pa.int16(), nullable=False),  # decoder layer of the original model
        pa.field("expert", pa.int16(), nullable=False),  # expert of the original model
        pa.field("g", pa.float32(), nullable=False),  # weight the block applied to its output
        pa.field("norm", pa.float32(), nullable=False),  # L2 norm of the output before g
    ]
)
"""Grain: one predicted token x MoE layer x selected expert. Sorted by layer, token_id, slot; one
row group a layer."""

BLOCKS = pa.schema(
    [
        pa.field("block", pa.int32(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("token", pa.int32(), nullable=False),  # input token, prompts included
    ]
)
"""Grain: one input token. The text in which predictions were made."""

VOCAB = pa.schema(
    [
        pa.field("token", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),  # decoded alone; U+FFFD for partial bytes
    ]
)
"""Grain: one vocabulary entry."""

RANKING = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("expert", pa.int16(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),  # 0 is the most salient of its layer
        pa.field("saliency", pa.float64()),  # null where the expert was never selected
        pa.field("n", pa.int64(), nullable=False),  # tokens that selected the expert
        pa.field("n_good", pa.int64(), nullable=False),
        pa.field("n_uncertain", pa.int64(), nullable=False),
        pa.field("n_conflict", pa.int64(), nullable=False),
    ]
)
"""Grain: one layer x expert, every expert of the model included. Sorted by layer, rank. The file's
key-value metadata holds its parameters as JSON under `eaftflow`."""

PART_TABLES = {"tokens": TOKENS, "routes": ROUTES, "blocks": BLOCKS}
