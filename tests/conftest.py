"""Fixtures that several test files share: small runs made of random numbers, no model."""

import os

# Tiny models gain nothing from threads, and on a shared machine lose minutes to them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eaftflow import schemas, store

BuildRun = Callable[..., Path]


@pytest.fixture
def build_run(tmp_path: Path) -> BuildRun:
    """A function that writes a synthetic run into `tmp_path/NAME` and returns its folder."""

    def build(name: str = "run", **options: Any) -> Path:
        return synthetic_run(tmp_path / name, **options)

    return build


@pytest.fixture
def edit_run() -> Callable[..., None]:
    """A function that replaces columns of one table in a synthetic run of one part."""

    def edit(folder: Path, table: str, **columns: Any) -> None:
        (part,) = store.open_run(folder).parts
        tables = {name: pq.read_table(folder / file.path) for name, file in part.files.items()}
        schema = schemas.PART_TABLES[table]
        for name, values in columns.items():
            index = schema.get_field_index(name)
            values = pa.array(values, schema.field(index).type)
            tables[table] = tables[table].set_column(index, schema.field(index), values)
        store.commit_part(folder, 0, tables=tables, blocks=(part.first_block, part.next_block))

    return edit


def synthetic_run(
    path: Path,
    *,
    tokens: int = 2_000,
    layers: int = 3,
    experts: int = 8,
    top_k: int = 2,
    parts: int = 4,
    block: int = 64,
    seed: int = 0,
    complete: bool = True,
) -> Path:
    """Write a run of random numbers in the shape of a capture's, and return its folder.

    Expert 0 of the first layer is never routed. About 1 % of tokens are confidently wrong, and 5 %
    are certain (p_t = 1, H_t = 0). MoE layers are the odd ones, as in models with dense layers.
    """
    rng = np.random.default_rng(seed)
    layer_ids = [2 * index + 1 for index in range(layers)]
    path.mkdir(parents=True)
    edges = np.linspace(0, tokens, parts + 1).astype(int) // block * block
    edges[-1] = tokens
    for number, (first, end) in enumerate(itertools.pairwise(edges)):
        ids = np.arange(first, end)
        tables = {
            "tokens": _tokens(rng, ids, block),
            "routes": pa.concat_tables(
                _routes(rng, ids, layer, experts, top_k, never=0 if layer == 1 else None)
                for layer in layer_ids
            ),
            "blocks": pa.table(
                [ids // block, ids % block, rng.integers(0, 50, len(ids))], schema=schemas.BLOCKS
            ),
        }
        blocks = (int(first // block), int(-(-end // block)))
        store.commit_part(path, number, tables=tables, blocks=blocks)
    vocab = pa.table([range(50), [f" word{token}" for token in range(50)]], schema=schemas.VOCAB)
    pq.write_table(vocab, path / "vocab.parquet")
    manifest = {
        "format_version": schemas.FORMAT_VERSION,
        "created_at": f"2026-01-01T00:00:{seed:02d}+00:00",
        "model": {"name": "synthetic", "path": "synthetic", "fingerprint": f"seed-{seed}"},
        "packs": [],
        "options": {},
        "versions": {},
        "layers": [
            {"layer": layer, "name": f"layers.{layer}.mlp", "experts": experts, "top_k": top_k}
            for layer in layer_ids
        ],
    }
    store.write_json(path / store.MANIFEST, manifest)
    if complete:
        store.write_json(path / store.SUMMARY, {"tokens": tokens})
    return path


def _tokens(rng: np.random.Generator, ids: np.ndarray, block: int) -> pa.Table:
    count = len(ids)
    p_t, H_t = rng.random(count), rng.random(count)
    wrong, certain = rng.random(count) < 0.01, rng.random(count) < 0.05
    p_t[wrong], H_t[wrong] = rng.random(wrong.sum()) * 0.05, rng.random(wrong.sum()) * 0.05
    p_t[certain], H_t[certain] = 1.0, 0.0
    columns = {
        "token_id": ids,
        "pack": rng.choice(["code", "maths"], count),
        "source": np.repeat("", count),
        "row": ids // 10,
        "block": ids // block,
        "position": ids % block,
        "target": rng.integers(0, 50, count),
        "top_token": rng.integers(0, 50, count),
        "p_t": p_t.astype(np.float32),
        "logp": np.log(p_t).astype(np.float32),
        "H_t": H_t.astype(np.float32),
    }
    return pa.table(columns).cast(schemas.TOKENS)


def _routes(
    rng: np.random.Generator,
    ids: np.ndarray,
    layer: int,
    experts: int,
    top_k: int,
    *,
    never: int | None,
) -> pa.Table:
    scores_TE = rng.random((len(ids), experts), dtype=np.float32)
    scores_TE += np.linspace(0, 0.3, experts, dtype=np.float32)
    if never is not None:
        scores_TE[:, never] = -1
    chosen_TK = np.argpartition(-scores_TE, top_k - 1, axis=1)[:, :top_k]
    g_TK = rng.random((len(ids), top_k), dtype=np.float32) + np.float32(0.05)
    g_TK /= g_TK.sum(axis=1, keepdims=True)
    norm_TK = rng.lognormal(1.0, 0.7, (len(ids), top_k)) * (1 + chosen_TK / experts / 10)
    columns = {
        "token_id": np.repeat(ids, top_k),
        "layer": np.full(len(ids) * top_k, layer, dtype=np.int16),
        "expert": chosen_TK.astype(np.int16).ravel(),
        "g": g_TK.ravel(),
        "norm": norm_TK.astype(np.float32).ravel(),
    }
    return pa.table(columns).cast(schemas.ROUTES)
