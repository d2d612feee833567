"""Rank experts from a run's records, under any weights, without the model.

The formulas are in `sql/`; this stage runs them, keeps what is worth keeping, and says what came
out: which regions hold how many tokens, which experts rise and fall, and what moved against the
ranking by the policy's defaults.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from eaftflow import rankings, relations
from eaftflow.cells import Borders, Progress, define_borders, define_cells
from eaftflow.errors import EaftflowError
from eaftflow.rankings import Ranking, check_target, parts_hash, write_ranking
from eaftflow.relations import CHUNK_PARTS, Parameters
from eaftflow.schemas import FORMAT_VERSION, RANKING
from eaftflow.store import Run, newest_run, open_run

# A border that ties carry beyond this multiple of its level is worth a warning.
_TIES = 1.5
_CERTAIN = 1 - 1e-6


@dataclass(frozen=True, kw_only=True)
class Share:
    """One row of the relation `shares`."""

    region: str
    tokens: int
    token_share: float
    w: float
    w_share: float | None  # None where every weight is 0


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One row of the relation `kept`."""

    keep_frac: float
    kept: int
    changed: int


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What changed against the default ranking."""

    experts: int  # whose rank changed
    furthest: tuple[int, int, int, int] | None  # layer, expert, default rank, rank
    kept: tuple[Kept, ...]


@dataclass(frozen=True, kw_only=True)
class Rescored:
    """A ranking that was written, and what there is to say about it."""

    run: Run
    parameters: Parameters
    ranking: Ranking
    newest: bool  # whether `eaftflow prune` takes it by default
    borders: Borders
    shares: tuple[Share, ...]
    moved: Moved | None  # None where this is the default ranking, or where there is none
    warnings: tuple[str, ...]


def rescore(
    folder: Path | None = None,
    *,
    parameters: Parameters,
    out: str | None = None,
    threads: int | None = None,
    memory_limit: str | None = None,
    chunk_parts: int = CHUNK_PARTS,
    progress: Progress | None = None,
) -> Rescored:
    """Rank the experts of the run in `folder`, write the ranking, and return it with its story.

    Without `folder` the newest run is taken. `out` is a name, for a ranking in the run's own
    folder, or a path. Threads, memory and chunks never change a byte of the result.

    Raises EaftflowError where the run is damaged or empty, the ranking cannot be written, or too
    many tokens tie at a border for regions to make sense.
    """
    run = open_run(folder or newest_run())
    if not run.parts:
        raise EaftflowError(f"{run.path} holds no tokens yet. Let `eaftflow capture` run longer.")
    path = ranking_path(run, parameters, out)
    check_target(path)
    newest = path.parent.resolve() == (run.path / rankings.FOLDER).resolve()
    database = relations.open_database(threads=threads, memory_limit=memory_limit)
    with contextlib.closing(database) as con:
        relations.define_layers(con, run)

        def rank(by: Parameters, borders: Borders) -> pa.Table:
            define_cells(con, run, borders.thresholds, chunk_parts=chunk_parts, progress=progress)
            relations.define_saliency(con, by)
            return con.sql(relations.read_sql("ranking")).to_arrow_table()

        borders = define_borders(con, run, parameters)
        if ties := _find_ties(borders, parameters):
            raise EaftflowError(ties)
        warnings, default_table = [], None
        if parameters != Parameters():
            default_borders = define_borders(con, run, Parameters())
            if ties := _find_ties(default_borders, Parameters()):
                warnings.append(f"There is no default ranking to compare with: {ties}")
            else:
                default_table = rank(Parameters(), default_borders)
        table = rank(parameters, borders)
        shares = tuple(Share(**row) for row in _rows(con, relations.read_sql("shares")))
        moved = None if default_table is None else _compare(con, table, default_table)
    ranking = write_ranking(
        path,
        table.cast(RANKING),
        parameters={
            **asdict(parameters),
            "thresholds": asdict(borders.thresholds),
            "regions": {share.region: share.tokens for share in shares},
            "run": {
                "format_version": FORMAT_VERSION,
                "model": run.manifest["model"],
                "parts_sha256": parts_hash(run),
                "tokens": run.tokens,
                "complete": run.complete,
            },
        },
        newest=newest,
    )
    return Rescored(
        run=run,
        parameters=parameters,
        ranking=ranking,
        newest=newest,
        borders=borders,
        shares=shares,
        moved=moved,
        warnings=(*warnings, *_warnings(run, parameters, borders, shares)),
    )


def ranking_path(run: Run, parameters: Parameters, out: str | None) -> Path:
    """Where the ranking goes: a bare name means the run's own folder, anything else is a path."""
    name = default_name(parameters) if out is None else out
    if not Path(name).name.strip("."):
        raise EaftflowError(
            f"--out {name!r} names no file. Give a name such as `mine`, or the path of a .parquet "
            "file."
        )
    if Path(name).name == name and not name.endswith(".parquet"):
        return run.path / rankings.FOLDER / f"{name}.parquet"
    if not name.endswith(".parquet"):
        raise EaftflowError(
            f"--out {name} is neither a bare name nor the path of a .parquet file. "
            f"Write {name.rstrip('/')}.parquet."
        )
    return Path(name)


def default_name(parameters: Parameters) -> str:
    """The criterion, and every other parameter that differs from the policy's."""
    default = Parameters()
    changed = [
        f"{field.name}={_brief(getattr(parameters, field.name))}"
        for field in fields(parameters)
        if field.name != "criterion"
        and getattr(parameters, field.name) != getattr(default, field.name)
    ]
    return ",".join([parameters.criterion, *changed])


def describe(rescored: Rescored) -> str:
    """The ranking and what moved, as text for the terminal: one line a layer."""
    return "\n".join(
        [
            *_describe_run(rescored),
            "",
            *_describe_regions(rescored),
            "",
            *_describe_layers(rescored.ranking),
            "",
            *_describe_moved(rescored),
            *_describe_file(rescored),
        ]
    )


def _describe_run(rescored: Rescored) -> Iterator[str]:
    run, parameters, borders = rescored.run, rescored.parameters, rescored.borders
    layers = run.manifest["layers"]
    experts = " or ".join(str(count) for count in sorted({layer["experts"] for layer in layers}))
    shape = f"{len(layers)} MoE layers of {experts} experts"
    yield f"run        {run.path}: {run.tokens:,} tokens, {shape}"
    weighted = any(_uses(parameters.criterion, name) for name in parameters.weights)
    yield f"criterion  {parameters.criterion}{'' if weighted else ' (ignores token weights)'}"
    thresholds = borders.thresholds
    yield (
        f"borders    p_t <= {thresholds.p_q:.4g} takes {borders.p_q_share:.1%}, "
        f"H_t <= {thresholds.H_q:.4g} {borders.H_q_share:.1%}, "
        f"H_t >= {thresholds.H_hi:.4g} {borders.H_hi_share:.1%} of tokens"
    )
    if thresholds.p_hi is not None:
        yield f"           good is p_t >= {thresholds.p_hi:.4g} and H_t <= {thresholds.H_mid:.4g}"


def _describe_regions(rescored: Rescored) -> Iterator[str]:
    yield f"{'region':<10} {'tokens':>13} {'share':>9} {'weight':>8} {'of all weight':>14}"
    for share in rescored.shares:
        if share.region == "neutral" and rescored.parameters.p_hi is None:
            continue
        w_share = "-" if share.w_share is None else f"{share.w_share:.2%}"
        yield (
            f"{share.region:<10} {share.tokens:>13,} {share.token_share:>9.2%} {share.w:>8g} "
            f"{w_share:>14}"
        )


def _describe_layers(ranking: Ranking) -> Iterator[str]:
    layers: dict[int, list[dict[str, Any]]] = {}
    for row in ranking.table.to_pylist():
        layers.setdefault(row["layer"], []).append(row)
    yield "        experts    conflict tokens"
    yield f"layer  <0 unused  seen by    most   {'top experts':<30} bottom experts"
    for layer, rows in layers.items():
        routed = [row for row in rows if row["n"]]
        negative = sum(row["saliency"] < 0 for row in routed if row["saliency"] is not None)
        conflicts = [row["n_conflict"] for row in rows]
        yield (
            f"{layer:>5} {negative:>3} {len(rows) - len(routed):>6} "
            f"{sum(map(bool, conflicts)):>8} {max(conflicts):>7}   "
            f"{_name_experts(rows[:2]):<30} {_name_experts(rows[-2:])}"
        )


def _name_experts(rows: list[dict[str, Any]]) -> str:
    return "  ".join(
        f"{row['expert']} ({'-' if row['saliency'] is None else format(row['saliency'], '.3g')})"
        for row in rows
    )


def _describe_moved(rescored: Rescored) -> Iterator[str]:
    moved = rescored.moved
    if moved is None:
        return
    experts, default = rescored.ranking.table.num_rows, default_name(Parameters())
    yield f"against    {default}: {moved.experts:,} of {experts:,} experts change rank"
    if moved.furthest is None:
        return
    layer, expert, before, after = moved.furthest
    yield f"furthest   expert {expert} of layer {layer}, from rank {before} to {after}"
    for kept in moved.kept:
        yield (
            f"keep {kept.keep_frac:<6g} {kept.changed:,} of {kept.kept:,} kept experts "
            "would have been dropped"
        )


def _describe_file(rescored: Rescored) -> Iterator[str]:
    path = rescored.ranking.path
    yield f"ranking    {path}"
    if not rescored.newest:
        yield f"           outside the run: take it with `eaftflow prune --ranking {path}`"


def _compare(con: duckdb.DuckDBPyConnection, table: pa.Table, default_table: pa.Table) -> Moved:
    con.register("ranking", table)
    con.register("default_ranking", default_table)
    con.register("moves", con.sql(relations.read_sql("moves")).to_arrow_table())
    moves = con.sql(
        "select layer, expert, default_rank, rank from moves where gained != 0 "
        "order by abs(gained) desc, layer, expert"
    ).fetchall()
    kept = tuple(Kept(**row) for row in _rows(con, relations.read_sql("kept")))
    return Moved(experts=len(moves), furthest=moves[0] if moves else None, kept=kept)


def _find_ties(borders: Borders, parameters: Parameters) -> str | None:
    """What is wrong where so many tokens tie at a border that regions mean nothing."""
    thresholds = borders.thresholds
    if thresholds.p_q >= _CERTAIN:
        return (
            f"q={parameters.q} gives p_q={thresholds.p_q}: the model is certain and right on so "
            "many tokens that the lowest of p_t are among them. Lower --q, or capture harder data."
        )
    if thresholds.H_q >= thresholds.H_hi:
        return (
            f"q={parameters.q} and h_hi={parameters.h_hi} give H_q={thresholds.H_q} >= "
            f"H_hi={thresholds.H_hi}: too many tokens have the same entropy to tell certain from "
            "uncertain. Lower --q, raise --h-hi, or capture more varied data."
        )
    return None


def _warnings(
    run: Run, parameters: Parameters, borders: Borders, shares: tuple[Share, ...]
) -> Iterator[str]:
    if not run.complete:
        yield (
            f"This run is incomplete: {run.tokens:,} tokens so far. "
            f"`eaftflow capture --resume --out {run.path}` goes on; then rescore again."
        )
    for name, border, level in (
        ("p_t <= p_q", borders.p_q_share, parameters.q),
        ("H_t <= H_q", borders.H_q_share, parameters.q),
        ("H_t >= H_hi", borders.H_hi_share, 1 - parameters.h_hi),
    ):
        if border > _TIES * level:
            yield (
                f"{name} takes {border:.1%} of the tokens where {level:.1%} were asked for, "
                "because many tie there."
            )
    ignored = [
        name
        for name, weight in parameters.weights.items()
        if weight != getattr(Parameters(), name) and not _uses(parameters.criterion, name)
    ]
    if ignored:
        yield f"{parameters.criterion} ignores token weights: {', '.join(ignored)} changes nothing."
    for share in shares:
        name = f"w_{share.region}"
        weight = parameters.weights.get(name)
        if share.tokens or weight is None or name in ignored:
            continue
        if weight != getattr(Parameters(), name):
            yield f"No token is in the region {share.region}: {name}={weight:g} changes nothing."


def _uses(criterion: str, column: str) -> bool:
    """Whether the criterion's SQL mentions `column`, comments apart."""
    text = re.sub(r"--.*", "", relations.read_sql(f"criteria/{criterion}"))
    return re.search(rf"\b{column}\b", text) is not None


def _rows(con: duckdb.DuckDBPyConnection, query: str) -> list[dict[str, Any]]:
    cursor = con.execute(query)
    names = [column[0] for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _brief(value: float | None) -> str:
    return str(value).removesuffix(".0")
