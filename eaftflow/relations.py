"""The relations of `sql/` on a DuckDB connection: from a run's Parquet files to a ranking.

Each file of `sql/` is one relation, named by its stem, and reads others by name:

    tokens ─ thresholds ─ regions ─┬─ partial_cells ─ cells ─ experts ─ saliency ─ ranking
    routes ────────────────────────┴─ records         layers, weights ┘

`saliency` is whichever file of `sql/criteria/` is asked for. Relations with parameters become
tables, all others views, which are evaluated when they are read.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from eaftflow.errors import EaftflowError
from eaftflow.resources import resource
from eaftflow.schemas import PART_TABLES
from eaftflow.store import Part, Run

VOCAB = "vocab.parquet"

# Up to this many parts, DuckDB plans better with the statistics of every footer; beyond, reading
# them all costs more than it saves.
CHUNK_PARTS = 15

LAYERS = pa.schema(
    [
        pa.field("layer", pa.int16()),
        pa.field("name", pa.string()),  # of the module in the model
        pa.field("experts", pa.int32()),
        pa.field("top_k", pa.int32()),
    ]
)
"""The relation `layers`, from the manifest. Grain: one MoE layer."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What a ranking depends on besides the run. The defaults are the method's policy.

    Raises EaftflowError on values that make no sense.
    """

    q: float = 0.15  # quantile level of p_q and of H_q
    h_hi: float = 0.85  # quantile level of H_hi
    p_hi: float | None = None  # the strict good: quantile level of p_hi, and
    h_mid: float | None = None  # of H_mid; both or neither
    w_good: float = 1.0
    w_uncertain: float = 0.25
    w_conflict: float = -2.0
    criterion: str = "eaft_reap"

    def __post_init__(self) -> None:
        """Check every value, and the values against each other."""
        for name in ("q", "h_hi", "p_hi", "h_mid"):
            level = getattr(self, name)
            if level is not None and not 0 < level < 1:
                raise EaftflowError(
                    f"{name}={level} is no quantile level. Give a number between 0 and 1, "
                    "both excluded."
                )
        if self.q >= self.h_hi:
            raise EaftflowError(
                f"q={self.q} must be below h_hi={self.h_hi}: the same prediction would be both "
                "certain and uncertain. Lower q, or raise h_hi."
            )
        if (self.p_hi is None) != (self.h_mid is None):
            given, missing = ("p_hi", "h_mid") if self.h_mid is None else ("h_mid", "p_hi")
            raise EaftflowError(
                f"{given} was given without {missing}. The strict good needs both "
                "(--p-hi and --h-mid); leave both out and everything else is good."
            )
        for name in ("w_good", "w_uncertain", "w_conflict"):
            weight = getattr(self, name)
            if not math.isfinite(weight):
                raise EaftflowError(f"{name}={weight} is no weight. Give a finite number.")
        if self.criterion not in criteria():
            raise EaftflowError(
                f"There is no criterion {self.criterion!r}. Choose one of {', '.join(criteria())}."
            )

    @property
    def levels(self) -> dict[str, float | None]:
        """The parameters of the relation `thresholds`."""
        return {name: getattr(self, name) for name in ("q", "h_hi", "p_hi", "h_mid")}

    @property
    def weights(self) -> dict[str, float]:
        """The parameters of the relation `weights`."""
        return {name: getattr(self, name) for name in ("w_good", "w_uncertain", "w_conflict")}


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The one row of the relation `thresholds`: float32 values, exactly."""

    p_q: float
    H_q: float
    H_hi: float
    p_hi: float | None
    H_mid: float | None


@cache
def criteria() -> tuple[str, ...]:
    """The names of the criteria that ship in `sql/criteria/`."""
    return tuple(sorted(path.stem for path in (resource("sql") / "criteria").glob("*.sql")))


@cache
def read_sql(name: str) -> str:
    """The text of the relation `name`, such as `cells` or `criteria/reap`."""
    return (resource("sql") / f"{name}.sql").read_text(encoding="utf-8")


def open_database(
    *, threads: int | None = None, memory_limit: str | None = None
) -> duckdb.DuckDBPyConnection:
    """A new database in memory. The defaults are DuckDB's: every core, 80 % of memory."""
    config: dict[str, str | bool | int | float | list[str]] = {}
    if threads is not None:
        config["threads"] = threads
    if memory_limit is not None:
        config["memory_limit"] = memory_limit
    if int(duckdb.__version__.partition(".")[0]) >= 2:
        # New in 2.0, and several times dearer in time and memory on aggregates over these joins.
        config["disabled_optimizers"] = "partial_aggregate_pushdown"
    return duckdb.connect(config=config)


def define(
    con: duckdb.DuckDBPyConnection,
    name: str,
    *,
    file: str | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> None:
    """Define the relation `name` by its `file` in `sql/`, which is named like it unless given.

    With `parameters` it becomes a table, without a view: DuckDB takes no parameters in views.
    """
    text = read_sql(file or name)
    if parameters is None:
        con.execute(f"create or replace view {name} as {text}").fetchall()
    else:
        con.execute(f"create or replace table {name} as {text}", parameters).fetchall()


def define_parts(con: duckdb.DuckDBPyConnection, run: Run, parts: Sequence[Part]) -> None:
    """Define `tokens`, `routes` and `blocks` over the files of `parts` and nothing else."""
    for table in PART_TABLES:
        files = [_literal(run.path / part.files[table].path) for part in parts]
        # Only `union_by_name` reads the footers of all files, and with them the statistics.
        statistics = len(files) <= CHUNK_PARTS
        relation = con.read_parquet(files, union_by_name=statistics, hive_partitioning=False)
        relation.create_view(table, replace=True)


def define_layers(con: duckdb.DuckDBPyConnection, run: Run) -> None:
    """Define `layers`, one row a MoE layer of the model."""
    con.register("layers", pa.Table.from_pylist(run.manifest["layers"], schema=LAYERS))


def define_vocab(con: duckdb.DuckDBPyConnection, run: Run) -> None:
    """Define `vocab` over the run's vocabulary file.

    Raises EaftflowError where it is missing.
    """
    path = run.path / VOCAB
    if not path.is_file():
        raise EaftflowError(f"{path} does not exist. The run is damaged; capture it again.")
    con.read_parquet(_literal(path), hive_partitioning=False).create_view("vocab", replace=True)


def define_thresholds(con: duckdb.DuckDBPyConnection, thresholds: Thresholds) -> None:
    """Define `thresholds` by known values."""
    columns = asdict(thresholds)
    select = ", ".join(f"${name}::float as {name}" for name in columns)
    con.execute(f"create or replace table thresholds as select {select}", columns).fetchall()


def define_saliency(con: duckdb.DuckDBPyConnection, parameters: Parameters) -> None:
    """Define `weights`, `experts` and `saliency` over `layers` and `cells`."""
    define(con, "weights", parameters=parameters.weights)
    define(con, "experts")
    define(con, "saliency", file=f"criteria/{parameters.criterion}")


def _literal(path: Path) -> str:
    """`path` as a DuckDB glob that matches it alone."""
    return re.sub(r"([*?\[])", r"[\1]", str(path))
