"""Thresholds and cells of a run, computed once and kept in `RUN/cells/`.

Both are exact, so they are kept under a hash of everything they depend on: the committed parts, the
levels or thresholds, and the text of the relations. Nothing there is ever out of date, and the
folder can be deleted at any time.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from eaftflow import relations
from eaftflow.errors import EaftflowError
from eaftflow.rankings import parts_hash
from eaftflow.relations import CHUNK_PARTS, Parameters, Thresholds
from eaftflow.schemas import FORMAT_VERSION
from eaftflow.store import Run, check_hashes, read_json, write_json

FOLDER = "cells"

Progress = Callable[[int, int], None]
"""Called with the number of parts read so far, and of all parts."""


@dataclass(frozen=True, kw_only=True)
class Borders:
    """Thresholds, and the share of tokens that each takes: more than asked for, where many tie."""

    thresholds: Thresholds
    p_q_share: float
    H_q_share: float
    H_hi_share: float


def define_borders(con: duckdb.DuckDBPyConnection, run: Run, parameters: Parameters) -> Borders:
    """Define `thresholds` at the levels of `parameters`, and return the borders.

    Raises EaftflowError where the bytes of a part have changed.
    """
    sources = [relations.read_sql(name) for name in ("thresholds", "realised")]
    key = _digest([FORMAT_VERSION, parts_hash(run), parameters.levels, sources])
    path = run.path / FOLDER / f"thresholds-{key}.json"
    if path.is_file():
        value = read_json(path)
        thresholds = Thresholds(**value.pop("thresholds"))
        relations.define_thresholds(con, thresholds)
        return Borders(thresholds=thresholds, **value)
    check_hashes(run, "tokens")
    relations.define_parts(con, run, run.parts)
    relations.define(con, "thresholds", parameters=parameters.levels)
    relations.define(con, "realised")
    borders = Borders(
        thresholds=Thresholds(**_only_row(con, "thresholds")), **_only_row(con, "realised")
    )
    if _keeps(run):
        write_json(path, asdict(borders))
    return borders


def define_cells(
    con: duckdb.DuckDBPyConnection,
    run: Run,
    thresholds: Thresholds,
    *,
    chunk_parts: int = CHUNK_PARTS,
    progress: Progress | None = None,
) -> None:
    """Define `cells` under `thresholds`, from the cache or by reading every record of `run`.

    `layers` must be defined. Raises EaftflowError where the bytes of a part have changed, where a g
    or norm is not finite, or where records are missing.
    """
    path = cells_file(run, thresholds)
    if path.is_file():
        load_cells(con, run, path)
        return
    check_hashes(run, "tokens", "routes")
    relations.define_thresholds(con, thresholds)
    _sum_chunks(con, run, chunk_parts, progress)
    table = con.sql(relations.read_sql("cells")).to_arrow_table()
    con.register("cells", table)
    _check_coverage(con, run, f"{run.path / 'routes'} holds", "Capture the run again.")
    if _keeps(run):
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        temporary.replace(path)


def load_cells(con: duckdb.DuckDBPyConnection, run: Run, path: Path) -> None:
    """Define `cells` by the cache file `path`.

    Raises EaftflowError where it is damaged.
    """
    remedy = "It is only a cache: remove it, and run `eaftflow rescore` again."
    try:
        table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise EaftflowError(f"{path} cannot be read ({error}). {remedy}") from error
    con.register("cells", table)
    _check_coverage(con, run, f"{path} accounts for", remedy)


def cells_file(run: Run, thresholds: Thresholds) -> Path:
    """Where the cells of `run` under `thresholds` are kept, whether they exist yet or not."""
    sources = [relations.read_sql(name) for name in ("regions", "partial_cells", "cells")]
    key = _digest([FORMAT_VERSION, parts_hash(run), asdict(thresholds), sources])
    return run.path / FOLDER / f"{key}.parquet"


def _keeps(run: Run) -> bool:
    """Make the cache folder; False where the run is read-only, which is no reason to fail."""
    if not os.access(run.path, os.W_OK):
        return False
    (run.path / FOLDER).mkdir(exist_ok=True)
    return True


def _sum_chunks(
    con: duckdb.DuckDBPyConnection, run: Run, chunk_parts: int, progress: Progress | None
) -> None:
    con.execute("drop table if exists partial_cells").fetchall()
    into = "create table partial_cells as"
    for first in range(0, len(run.parts), chunk_parts):
        chunk = run.parts[first : first + chunk_parts]
        relations.define_parts(con, run, chunk)
        relations.define(con, "regions")
        try:
            con.execute(f"{into} {relations.read_sql('partial_cells')}").fetchall()
        except duckdb.ConversionException as error:
            raise EaftflowError(
                f"{run.path / 'routes'} holds a g or norm that is not finite or reaches 2^31, in "
                f"parts {chunk[0].number} to {chunk[-1].number}. Capture the run again."
            ) from error
        into = "insert into partial_cells"
        if progress:
            progress(first + len(chunk), len(run.parts))


def _check_coverage(con: duckdb.DuckDBPyConnection, run: Run, what: str, remedy: str) -> None:
    query = con.execute(relations.read_sql("coverage"), {"tokens": run.tokens})
    for layer, expected, found in query.fetchall():
        if found != expected:
            raise EaftflowError(
                f"{what} {found:,} records of layer {layer}, but {run.tokens:,} tokens x top_k "
                f"are {expected:,}. {remedy}"
            )


def _only_row(con: duckdb.DuckDBPyConnection, relation: str) -> dict[str, Any]:
    query = con.execute(f"from {relation}")
    names = [column[0] for column in query.description or ()]
    return dict(zip(names, query.fetchall()[0], strict=True))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
