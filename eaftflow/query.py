"""Ask a run anything, in SQL."""

import contextlib
from dataclasses import fields
from pathlib import Path

import duckdb

from eaftflow import relations
from eaftflow.cells import cells_file, define_borders, load_cells
from eaftflow.errors import EaftflowError
from eaftflow.rankings import FOLDER, LATEST, newest_ranking, read_ranking
from eaftflow.relations import Parameters
from eaftflow.store import newest_run, open_run

ROWS = 1_000
"""A table with more rows than this shows the first and the last of them."""


def connect(folder: Path | str | None = None) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with the views of the run in `folder`, by default the newest in `runs/`.

    Captured: `tokens`, `routes`, `blocks`, `vocab`, `layers`, and `inputs` (the text, by token).
    Derived: `records`, `regions`, `thresholds`, `cells`, `weights`, `experts`, `saliency`,
    `ranking`; they reflect the parameters of the run's newest ranking, or the policy's defaults
    where there is none yet. `eaftflow.schemas` documents the former, `sql/` the latter.

    Raises EaftflowError where the run, or its newest ranking, is missing or damaged.
    """
    run = open_run(Path(folder) if folder is not None else newest_run())
    if not run.parts:
        raise EaftflowError(f"{run.path} holds no tokens yet. Let `eaftflow capture` run longer.")
    parameters = _newest_parameters(run.path)
    con = relations.open_database()
    relations.define_layers(con, run)
    relations.define_vocab(con, run)
    borders = define_borders(con, run, parameters)
    relations.define_parts(con, run, run.parts)
    for name in ("regions", "records", "inputs"):
        relations.define(con, name)
    cells = cells_file(run, borders.thresholds)
    if cells.is_file():
        load_cells(con, run, cells)
    else:
        relations.define(con, "partial_cells")
        relations.define(con, "cells")
    relations.define_saliency(con, parameters)
    relations.define(con, "ranking")
    return con


def show(text: str, *, run: Path | None = None, width: int) -> None:
    """Print what the SQL `text` finds in `run`, as a table at most `width` characters wide.

    Raises EaftflowError with DuckDB's message where the SQL fails.
    """
    with contextlib.closing(connect(run)) as con:
        # Else a mistyped table finds Python variables of this function.
        con.execute("set python_enable_replacements = false").fetchall()
        try:
            relation = con.sql(text)
            if relation is not None:
                relation.show(max_width=width, max_rows=ROWS)
        except duckdb.Error as error:
            raise EaftflowError(f"The query failed. {error}") from error


def _newest_parameters(run: Path) -> Parameters:
    if not (run / FOLDER / LATEST).exists():
        return Parameters()
    stored = read_ranking(newest_ranking(run)).parameters
    return Parameters(**{field.name: stored[field.name] for field in fields(Parameters)})
