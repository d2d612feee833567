"""Correctness-aware expert pruning for Mixture-of-Experts models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import duckdb

__version__ = "0.1.0"


def connect(folder: "Path | str | None" = None) -> "duckdb.DuckDBPyConnection":
    """A DuckDB connection to the run in `folder`, as `eaftflow.query.connect` describes it."""
    from eaftflow.query import connect as connect_run

    return connect_run(folder)
