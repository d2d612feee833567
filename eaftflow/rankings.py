"""A ranking on disk: `RUN/rankings/NAME.parquet`; `RUN/rankings/latest` names the newest.

`rescore` writes rankings, `prune` reads them; both come here, so that neither knows the other.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eaftflow.errors import EaftflowError
from eaftflow.schemas import RANKING
from eaftflow.store import Run

FOLDER = "rankings"
LATEST = "latest"
METADATA_KEY = b"eaftflow"

PARAMETERS = (
    *("criterion", "w_good", "w_uncertain", "w_conflict", "q", "h_hi", "p_hi", "h_mid"),
    *("thresholds", "regions", "run.format_version", "run.tokens", "run.complete"),
    *("run.parts_sha256", "run.model.name", "run.model.path", "run.model.fingerprint"),
)
"""What the parameters of every ranking hold; dots lead into nested objects."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Every expert of a model in order of saliency, and what the order was made from.

    `parameters` holds the criterion, weights, quantile levels, thresholds, region counts and the
    identity of the run: all of PARAMETERS, at least.
    """

    path: Path
    table: pa.Table  # schemas.RANKING, sorted by layer, rank
    parameters: dict[str, Any]


def parts_hash(run: Run) -> str:
    """The identity of a run's committed data: SHA-256 over path, size and hash of every file."""
    files = [file for part in run.parts for file in part.files.values()]
    text = json.dumps(sorted((file.path, file.bytes, file.sha256) for file in files))
    return hashlib.sha256(text.encode()).hexdigest()


def newest_ranking(run: Path) -> Path:
    """The ranking that was written last into the run folder `run`.

    Raises EaftflowError where there is none yet, or the one that was written last is gone.
    """
    latest = run / FOLDER / LATEST
    if not latest.is_file():
        raise EaftflowError(f"{run} has no ranking yet. Run `eaftflow rescore --run {run}` first.")
    path = latest.with_name(latest.read_text(encoding="utf-8").strip())
    if not path.is_file():
        raise EaftflowError(
            f"{path}, the newest ranking by {latest}, is gone. "
            f"Run `eaftflow rescore --run {run}` again, or name a ranking with --ranking."
        )
    return path


def read_ranking(path: Path) -> Ranking:
    """The ranking in the file `path`, checked.

    Raises EaftflowError where it is missing, is no ranking, lacks one of PARAMETERS, holds a
    saliency that is not finite, or does not rank each layer's experts 0, 1, 2, ...
    """
    if not path.is_file():
        raise EaftflowError(f"{path} does not exist. `eaftflow rescore` writes rankings.")
    try:
        table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise EaftflowError(
            f"{path} cannot be read as Parquet ({_first_line(error)}). "
            "Remove it and run `eaftflow rescore` again."
        ) from error
    metadata = (table.schema.metadata or {}).get(METADATA_KEY)
    if metadata is None or not table.schema.remove_metadata().equals(RANKING):
        raise EaftflowError(
            f"{path} is a Parquet file but no ranking of this eaftflow. "
            "Name a file that `eaftflow rescore` wrote."
        )
    try:
        parameters = json.loads(metadata)
    except ValueError as error:
        raise EaftflowError(
            f"{path} has parameters that are not JSON ({error}). Run `eaftflow rescore` again."
        ) from error
    _check(table, parameters, str(path))
    return Ranking(path=path, table=table, parameters=parameters)


def check_target(path: Path) -> None:
    """Raise EaftflowError where no ranking could be written to `path`; nothing is touched."""
    with _refusals(path):
        if path.is_dir():
            raise EaftflowError(f"{path} is a folder. Name a file that may be written or replaced.")
        parent = next(parent for parent in path.absolute().parents if parent.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise EaftflowError(
                f"{path} cannot be written: {parent} is no folder that you may write to. "
                "Choose another --out."
            )


def write_ranking(
    path: Path, table: pa.Table, *, parameters: Mapping[str, Any], newest: bool = False
) -> Ranking:
    """Write `table` with its `parameters` to `path`, seen whole or not at all, and return it.

    `newest` makes it the newest of the run whose rankings folder `path` is in. Equal input gives
    equal bytes. Raises EaftflowError where `table` and `parameters` are not a sound ranking, or the
    file system refuses.
    """
    _check(table, parameters, "The new ranking")
    text = json.dumps(parameters, sort_keys=True, ensure_ascii=False)
    table = table.replace_schema_metadata({METADATA_KEY: text.encode()})
    with _refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        if newest:
            with _replacing(path.with_name(LATEST)) as temporary:
                temporary.write_text(path.name + "\n", encoding="utf-8")
    return Ranking(path=path, table=table, parameters=dict(parameters))


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Where the file system refuses, an EaftflowError about `path`."""
    try:
        yield
    except OSError as error:
        raise EaftflowError(
            f"{path} could not be written ({error.strerror or error}). "
            "Make room or permission, or choose another --out."
        ) from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which then takes its place or, after an error, is gone."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _check(table: pa.Table, parameters: object, what: str) -> None:
    for name in PARAMETERS:
        value = parameters
        for key in name.split("."):
            if not isinstance(value, Mapping) or key not in value:
                raise EaftflowError(
                    f"{what} lacks {name} among its parameters. Run `eaftflow rescore` again."
                )
            value = value[key]
    if not all(math.isfinite(value or 0) for value in table["saliency"].to_pylist()):
        raise EaftflowError(
            f"{what} holds a saliency that is not finite. "
            "Use smaller weights, or run `eaftflow rescore` again."
        )
    layers: dict[int, list[tuple[int, int]]] = {}
    for layer, expert, rank in zip(
        *(table[name].to_pylist() for name in ("layer", "expert", "rank")), strict=True
    ):
        layers.setdefault(layer, []).append((expert, rank))
    for layer, pairs in layers.items():
        everyone = list(range(len(pairs)))
        if any(sorted(column) != everyone for column in zip(*pairs, strict=True)):
            raise EaftflowError(
                f"{what} does not rank each expert of layer {layer} exactly once. "
                "Run `eaftflow rescore` again."
            )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
