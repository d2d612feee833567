"""`eaftflow capture`: run the model once, store what every token and every expert did.

    rows -> blocks -> batches -> one forward -> record batches -> part files

All that can be checked is checked before the model is loaded. The heart is `score_batches`, a
generator; `_write_parts` drains it, and a part once committed is never touched again.
`resume_capture` goes on at the first block that no part covers.

Shapes: B blocks a batch, S tokens a block, T scored predictions of a batch, K top-k, D hidden.
"""

import datetime
import hashlib
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from eaftflow import __version__
from eaftflow.checkpoint import fingerprint
from eaftflow.errors import EaftflowError
from eaftflow.likelihood import find_decoder, score_targets
from eaftflow.models import (
    Snapshot,
    choose_device,
    decode_vocabulary,
    find_model,
    hash_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
)
from eaftflow.packing import (
    Blocks,
    Pack,
    Row,
    find_packs,
    pack_rows,
    read_rows,
    resolve_spec,
)
from eaftflow.resources import resource
from eaftflow.routing import MoeLayer, Routing, find_moe_layers, record_routing
from eaftflow.schemas import BLOCKS, FORMAT_VERSION, ROUTES, TOKENS, VOCAB
from eaftflow.store import (
    MANIFEST,
    RUNS_FOLDER,
    SUMMARY,
    Run,
    commit_part,
    drop_uncommitted,
    hash_file,
    lock_run,
    newest_run,
    open_run,
    read_json,
    write_json,
)

BUNDLED_PACKS = "data/calibration"
_DEFAULT_SEQ_LEN = 2048
_VOCABULARY = "vocab.parquet"
_PROBE_TOKENS = 8
_PACKAGES = ("torch", "transformers", "tokenizers", "pyarrow", "safetensors")


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """What to capture. Stored whole in the manifest, from which a resumed capture takes it."""

    model: str | None = None  # local folder or hub name; None is the bundled model
    revision: str | None = None
    data: tuple[str, ...] = ()  # PATH or NAME=PATH; empty is the bundled calibration packs
    seq_len: int | None = None  # None: 2048, or the model's limit where that is less
    tokens: int | None = None  # stop at the block in which this many predictions are reached
    batch_tokens: int = 8192  # input tokens of one forward
    part_tokens: int = 65_536  # predictions of one part file, at least
    entropy_top_k: int = 20
    seed: int = 0  # of the shuffle over rows
    device: str | None = None  # None: cuda where there is one
    dtype: str | None = None  # None: the checkpoint's on cuda, float32 on CPU
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class CaptureResult:
    """What a run holds after a capture into it."""

    run: Run
    complete: bool  # False after Ctrl-C
    planned: int  # predictions in all blocks
    dropped: Mapping[str, int]
    regions: Mapping[str, int]  # predictions by region, at the default thresholds
    seconds: float  # of this call's forwards and writes
    scored: int  # predictions of this call


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The rows that one forward adds to each table; `routes` has one record batch a layer."""

    tokens: pa.RecordBatch
    routes: Sequence[pa.RecordBatch]
    blocks: pa.RecordBatch
    first_block: int
    next_block: int


def capture(options: CaptureOptions, *, out: Path | None = None) -> CaptureResult:
    """Capture into the folder `out`, by default a new one under `runs/`, and return what is there.

    Ctrl-C commits what has been scored and returns. Raises EaftflowError for what the user can
    mend.
    """
    _check_options(options)
    if out is not None:
        _check_vacant(out)
    return _capture(_settle(options), out, resume=False)


def resume_capture(out: Path | None = None, **given: Any) -> CaptureResult:
    """Go on with the run in `out`, by default the newest under `runs/`, with its own options.

    `given` may repeat options of the run, and may name the same model and data elsewhere. Raises
    EaftflowError where anything differs from what was captured so far.
    """
    run = open_run(out or newest_run())
    stored = run.manifest["options"]
    for name, value in given.items():
        if name not in ("model", "data") and value != stored[name]:
            raise EaftflowError(
                f"{run.path} was captured with {name}={stored[name]}, now it is {value}. "
                "Leave it out to resume, or capture into another --out."
            )
    options = CaptureOptions(**{**stored, "data": tuple(stored["data"]), **given})
    return _capture(_settle(options), run.path, resume=True)


def _capture(options: CaptureOptions, out: Path | None, *, resume: bool) -> CaptureResult:
    packs = find_packs(options.data or (str(resource(BUNDLED_PACKS)),))
    rows = [row for pack in packs for row in read_rows(pack)]
    snapshot = find_model(options.model, revision=options.revision)
    folder = out or _new_folder(snapshot)
    config = load_config(snapshot, trust_remote_code=options.trust_remote_code)
    tokenizer = load_tokenizer(snapshot, trust_remote_code=options.trust_remote_code)
    seq_len = _choose_seq_len(options, config)
    blocks = pack_rows(
        rows,
        tokenizer,
        seq_len=seq_len,
        seed=options.seed,
        budget=options.tokens,
    )
    manifest = _describe(options, snapshot, tokenizer, packs, blocks)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_run(folder):
        if not resume:
            _check_vacant(folder)
        else:
            _check_same(folder, manifest)
            if open_run(folder).complete:
                return _finish(folder, blocks, seconds=0.0, scored=0, complete=True)
        model = load_model(
            snapshot,
            config,
            device=str(options.device),
            dtype=str(options.dtype),
            trust_remote_code=options.trust_remote_code,
        )
        layers = find_moe_layers(model)
        if not resume:
            manifest["layers"] = _probe(model, layers, blocks)
            _write_vocabulary(folder / _VOCABULARY, tokenizer)
            write_json(folder / MANIFEST, manifest)
        return _capture_blocks(folder, model, layers, blocks, options)


# --- before the model ------------------------------------------------------------------------


def _check_options(options: CaptureOptions) -> None:
    for name, least in [("seq_len", 2), ("tokens", 1), ("batch_tokens", 1), ("part_tokens", 1)]:
        value = getattr(options, name)
        if value is not None and value < least:
            raise EaftflowError(f"{name}={value} is too small. Use {least} or more.")
    if options.entropy_top_k < 2:
        raise EaftflowError(
            f"entropy_top_k={options.entropy_top_k}: entropy over fewer than 2 tokens is 0/0. "
            "The method uses 20."
        )


def _settle(options: CaptureOptions) -> CaptureOptions:
    """The options with what this machine and folder decide, so that a manifest says it all."""
    device, dtype = choose_device(options.device, options.dtype)
    local = options.model is not None and Path(options.model).is_dir()
    return replace(
        options,
        model=str(Path(str(options.model)).resolve()) if local else options.model,
        data=tuple(resolve_spec(spec) for spec in options.data),
        device=device,
        dtype=dtype,
    )


def _new_folder(snapshot: Snapshot) -> Path:
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    return RUNS_FOLDER / f"{snapshot.name.replace('/', '--')}-{stamp}"


def _check_vacant(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise EaftflowError(f"{folder} is a file. Choose another --out.")
    if (folder / MANIFEST).exists():
        raise EaftflowError(
            f"{folder} already holds a run of {open_run(folder).tokens:,} tokens. Add --resume to "
            "continue it, or choose another --out."
        )
    early = {".lock", _VOCABULARY, f"{MANIFEST}.tmp"}  # all that a capture killed early leaves
    others = sorted(path.name for path in folder.iterdir() if path.name not in early)
    if others:
        raise EaftflowError(f"{folder} is not empty: it holds {others[0]}. Choose another --out.")


def _choose_seq_len(options: CaptureOptions, config: Any) -> int:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if options.seq_len is None:
        return min(_DEFAULT_SEQ_LEN, limit or _DEFAULT_SEQ_LEN)
    if limit is not None and options.seq_len > limit:
        raise EaftflowError(
            f"seq_len={options.seq_len} is more than the model's {limit} positions. "
            f"Use --seq-len {limit} or less."
        )
    return options.seq_len


def _describe(
    options: CaptureOptions,
    snapshot: Snapshot,
    tokenizer: Any,
    packs: Sequence[Pack],
    blocks: Blocks,
) -> dict[str, Any]:
    """The manifest, but for the layers, which only the loaded model can tell."""
    rows = Counter(row.pack for row in blocks.rows)
    return {
        "format_version": FORMAT_VERSION,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "model": {
            "name": snapshot.name,
            "path": str(snapshot.path.resolve()),
            "revision": snapshot.revision,
            "fingerprint": fingerprint(snapshot.path),
        },
        "tokenizer": {"sha256": hash_tokenizer(tokenizer), "tokens": len(tokenizer)},
        "packs": [
            {
                "name": pack.name,
                "rows": rows[pack.name],
                "files": [
                    {"path": str(file.resolve()), "sha256": hash_file(file)} for file in pack.files
                ],
            }
            for pack in packs
        ],
        "blocks": {
            "number": len(blocks.token_NS),
            "seq_len": blocks.token_NS.shape[1],
            "predictions": blocks.predictions,
            "dropped": dict(blocks.dropped),
            "sha256": _hash_blocks(blocks),
        },
        "options": {**asdict(options), "data": list(options.data)},
        "versions": {
            "eaftflow": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in _PACKAGES},
        },
    }


def _hash_blocks(blocks: Blocks) -> str:
    digest = hashlib.sha256(blocks.token_NS.tobytes())
    digest.update(blocks.scored_NS.tobytes())
    return digest.hexdigest()


def _check_same(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise EaftflowError where resuming would mix two captures in one run."""
    stored = read_json(folder / MANIFEST)

    def hashes(description: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        yield "the model", description["model"]["fingerprint"]
        yield "the tokenizer", description["tokenizer"]["sha256"]
        for pack in description["packs"]:
            for number, file in enumerate(pack["files"]):
                yield f"file {number} of pack {pack['name']}", file["sha256"]
        yield "the packed text", description["blocks"]["sha256"]

    before, now = dict(hashes(stored)), dict(hashes(manifest))
    for what in {**before, **now}:
        if before.get(what) != now.get(what):
            raise EaftflowError(
                f"{folder} cannot be resumed: {what} is not what was captured (sha256 "
                f"{before.get(what)} then, {now.get(what)} now). Bring it back, or capture into "
                "another --out."
            )


# --- with the model --------------------------------------------------------------------------


def _probe(model: Any, layers: Sequence[MoeLayer], blocks: Blocks) -> list[dict[str, Any]]:
    """Run a few tokens to see that every layer is observed, and how many experts it selects."""
    token_BS = torch.from_numpy(blocks.token_NS[:1, :_PROBE_TOKENS]).long().to(model.device)
    with record_routing(layers) as recorder, torch.inference_mode():
        find_decoder(model)(input_ids=token_BS, use_cache=False)
        routings = recorder.take()
    return [
        {
            "layer": moe.layer,
            "name": moe.name,
            "experts": moe.experts,
            "top_k": routing.expert_TK.shape[1],
        }
        for moe, routing in zip(layers, routings, strict=True)
    ]


def _capture_blocks(
    folder: Path,
    model: Any,
    layers: Sequence[MoeLayer],
    blocks: Blocks,
    options: CaptureOptions,
) -> CaptureResult:
    run = open_run(folder)
    drop_uncommitted(run)
    began = time.monotonic()
    batches = score_batches(
        model,
        layers,
        blocks,
        first_block=run.parts[-1].next_block if run.parts else 0,
        first_token=run.tokens,
        batch_tokens=options.batch_tokens,
        entropy_top_k=options.entropy_top_k,
    )
    with _progress(blocks, done=run.tokens) as bar:
        complete = _write_parts(
            _count(batches, bar), folder, first_part=len(run.parts), part_tokens=options.part_tokens
        )
    seconds = time.monotonic() - began
    scored = open_run(folder).tokens - run.tokens
    return _finish(folder, blocks, seconds=seconds, scored=scored, complete=complete)


def score_batches(
    model: Any,
    layers: Sequence[MoeLayer],
    blocks: Blocks,
    *,
    first_block: int = 0,
    first_token: int = 0,
    batch_tokens: int = 8192,
    entropy_top_k: int = 20,
) -> Iterator[Batch]:
    """The rows of every batch of blocks from `first_block` on, in order.

    Token ids count from `first_token`. Raises EaftflowError, naming blocks and column, where a
    value is not finite.
    """
    seq_len = blocks.token_NS.shape[1]
    blocks_a_batch = max(1, batch_tokens // seq_len)
    decoder = find_decoder(model)
    names = _RowNames(blocks.rows)
    token_id = first_token
    with record_routing(layers) as recorder, torch.inference_mode():
        for start in range(first_block, len(blocks.token_NS), blocks_a_batch):
            stop = min(start + blocks_a_batch, len(blocks.token_NS))
            token_BS = torch.from_numpy(blocks.token_NS[start:stop]).long().to(model.device)
            output = decoder(input_ids=token_BS, use_cache=False)
            block_T, position_T = blocks.scored_NS[start:stop, 1:].nonzero()  # s predicts s + 1
            flat_T = torch.from_numpy(block_T * seq_len + position_T).to(model.device)
            target_T = token_BS.flatten()[flat_T + 1]
            hidden_TD = output.last_hidden_state.flatten(0, 1)[flat_T]
            scores = score_targets(model, output, hidden_TD, target_T, top_k=entropy_top_k)
            id_T = np.arange(token_id, token_id + len(flat_T), dtype=np.int64)
            token_id += len(flat_T)
            where = f"blocks {start} to {stop - 1}"
            yield Batch(
                tokens=_record_batch(
                    TOKENS,
                    token_id=id_T,
                    **names.columns(blocks.row_NS[start:stop, 1:][block_T, position_T]),
                    block=block_T + start,
                    position=position_T,
                    target=_to_numpy(target_T),
                    top_token=_to_numpy(scores.top_T),
                    p_t=_to_finite(scores.p_T, f"p_t of {where}"),
                    logp=_to_finite(scores.logp_T, f"log-probability of {where}"),
                    H_t=_to_finite(scores.H_T, f"H_t of {where}"),
                ),
                routes=[
                    _route_rows(moe.layer, routing, id_T, flat_T, where)
                    for moe, routing in zip(layers, recorder.take(), strict=True)
                ],
                blocks=_block_rows(blocks, start, stop),
                first_block=start,
                next_block=stop,
            )


class _RowNames:
    """Pack, source and row number of rows, as columns that share one dictionary a run."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._pack = pa.array([row.pack for row in rows]).dictionary_encode()
        self._source = pa.array([row.source for row in rows]).dictionary_encode()
        self._row = np.array([row.row for row in rows], dtype=np.int32)

    def columns(self, index_T: NDArray[np.int32]) -> dict[str, Any]:
        """The columns for tokens that come from the rows at `index_T`."""
        return {
            "pack": self._pack.take(pa.array(index_T)),
            "source": self._source.take(pa.array(index_T)),
            "row": self._row[index_T],
        }


def _route_rows(
    layer: int, routing: Routing, id_T: NDArray[np.int64], flat_T: Tensor, where: str
) -> pa.RecordBatch:
    at_T = flat_T.to(routing.expert_TK.device)
    expert_TK = routing.expert_TK[at_T]
    K = expert_TK.shape[1]
    return _record_batch(
        ROUTES,
        token_id=np.repeat(id_T, K),
        layer=np.full(len(id_T) * K, layer, dtype=np.int16),
        expert=_to_numpy(expert_TK.flatten()),
        g=_to_finite(routing.g_TK[at_T].flatten(), f"g of {where}, layer {layer}"),
        norm=_to_finite(routing.norm_TK[at_T].flatten(), f"norm of {where}, layer {layer}"),
    )


def _block_rows(blocks: Blocks, start: int, stop: int) -> pa.RecordBatch:
    seq_len = blocks.token_NS.shape[1]
    return _record_batch(
        BLOCKS,
        block=np.repeat(np.arange(start, stop), seq_len),
        position=np.tile(np.arange(seq_len), stop - start),
        token=blocks.token_NS[start:stop].reshape(-1),
    )


def _record_batch(schema: pa.Schema, **columns: Any) -> pa.RecordBatch:
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, type=field.type)
        for field, column in ((field, columns[field.name]) for field in schema)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.cpu().numpy()
    return array


def _to_finite(tensor: Tensor, what: str) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.float().cpu().numpy()
    if not np.isfinite(array).all():
        raise EaftflowError(
            f"{int((~np.isfinite(array)).sum())} of {array.size} values are not finite in {what}. "
            "The parts before are saved. Try --dtype float32; if it stays, the checkpoint holds "
            "broken weights."
        )
    return array


# --- to disk ---------------------------------------------------------------------------------


def _write_parts(
    batches: Iterable[Batch], folder: Path, *, first_part: int, part_tokens: int
) -> bool:
    """Write `batches` as parts of at least `part_tokens` tokens. False where Ctrl-C ended it."""
    pending: list[Batch] = []
    number = first_part
    try:
        for batch in batches:
            pending.append(batch)
            if sum(held.tokens.num_rows for held in pending) >= part_tokens:
                _commit(folder, number, pending)
                number, pending = number + 1, []
        _commit(folder, number, pending)
    except KeyboardInterrupt:
        _commit(folder, number, pending)  # again from the start, where it struck a commit
        return False
    return True


def _commit(folder: Path, number: int, batches: Sequence[Batch]) -> None:
    if not any(batch.tokens.num_rows for batch in batches):
        return
    layers = zip(*(batch.routes for batch in batches), strict=True)
    tables = {
        "tokens": pa.Table.from_batches([batch.tokens for batch in batches]),
        "routes": pa.Table.from_batches([rows for layer in layers for rows in layer]),
        "blocks": pa.Table.from_batches([batch.blocks for batch in batches]),
    }
    blocks = (batches[0].first_block, batches[-1].next_block)
    commit_part(folder, number, tables=tables, blocks=blocks)


def _write_vocabulary(path: Path, tokenizer: Any) -> None:
    texts = decode_vocabulary(tokenizer)
    pq.write_table(pa.table([range(len(texts)), texts], schema=VOCAB), path)


@contextmanager
def _progress(blocks: Blocks, *, done: int) -> Iterator[Any]:
    interval = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm(
        total=blocks.predictions, initial=done, unit="tok", unit_scale=True, mininterval=interval
    ) as bar:
        yield bar


def _count(batches: Iterable[Batch], bar: Any) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        bar.update(batch.tokens.num_rows)


def _finish(
    folder: Path, blocks: Blocks, *, seconds: float, scored: int, complete: bool
) -> CaptureResult:
    run = open_run(folder)
    regions = count_regions(run)
    if complete:
        write_json(folder / SUMMARY, {"tokens": run.tokens, "regions": regions})
    return CaptureResult(
        run=run,
        complete=complete,
        planned=blocks.predictions,
        dropped=blocks.dropped,
        regions=regions,
        seconds=seconds,
        scored=scored,
    )


def count_regions(run: Run, *, q: float = 0.15, h_hi: float = 0.85) -> dict[str, int]:
    """Tokens of `run` by region at the policy's thresholds, as `sql/regions.sql` has it.

    Here only so that a capture can tell on a machine without DuckDB; a test holds the two equal.
    """
    counts = Counter(good=0, uncertain=0, conflict=0)
    if run.parts:
        tables = [pq.read_table(file, columns=["p_t", "H_t"]) for file in run.files("tokens")]
        p_T, H_T = (pa.concat_tables(tables)[name].to_numpy() for name in ("p_t", "H_t"))
        p_q, H_q, H_hi = (
            np.quantile(values, np.float64(level), method="inverted_cdf")
            for values, level in ((p_T, q), (H_T, q), (H_T, h_hi))
        )
        conflict_T = (p_T <= p_q) & (H_q >= H_T)
        uncertain_T = (p_T <= p_q) & (H_hi <= H_T) & ~conflict_T
        counts["conflict"], counts["uncertain"] = int(conflict_T.sum()), int(uncertain_T.sum())
        counts["good"] = len(p_T) - counts["conflict"] - counts["uncertain"]
    return dict(counts)
