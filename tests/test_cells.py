"""Cells: computed once, the same for any machine, and never from damaged data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from eaftflow import relations, store
from eaftflow.cells import cells_file, define_borders, define_cells
from eaftflow.errors import EaftflowError
from eaftflow.rankings import parts_hash
from eaftflow.relations import Parameters
from eaftflow.schemas import PART_TABLES

BuildRun = Callable[..., Path]
EditRun = Callable[..., None]


def compute(folder: Path, *, chunk_parts: int = 15, **settings: object) -> Path:
    """Compute the cells of the run in `folder` at the default levels, and return their file."""
    run = store.open_run(folder)
    con = relations.open_database(**settings)  # type: ignore[arg-type]
    relations.define_layers(con, run)
    thresholds = define_borders(con, run, Parameters()).thresholds
    define_cells(con, run, thresholds, chunk_parts=chunk_parts)
    con.close()
    return cells_file(run, thresholds)


def test_against_numpy(build_run: BuildRun) -> None:
    folder = build_run()
    run = store.open_run(folder)
    tokens = pq.ParquetDataset(run.files("tokens")).read()
    routes = pq.ParquetDataset(run.files("routes")).read()
    p_t, H_t = (tokens[name].to_numpy() for name in ("p_t", "H_t"))
    low = p_t <= np.sort(p_t)[int(np.ceil(0.15 * len(p_t))) - 1]
    certain = H_t <= np.sort(H_t)[int(np.ceil(0.15 * len(H_t))) - 1]
    unsure = H_t >= np.sort(H_t)[int(np.ceil(0.85 * len(H_t))) - 1]
    region = np.where(low & certain, "conflict", np.where(low & unsure, "uncertain", "good"))
    layer, expert, token = (routes[name].to_numpy() for name in ("layer", "expert", "token_id"))
    g, norm = (routes[name].to_numpy().astype(np.float64) for name in ("g", "norm"))
    cells = pq.read_table(compute(folder)).to_pylist()
    assert len(cells) > 60
    for cell in cells:
        chosen = (layer == cell["layer"]) & (expert == cell["expert"])
        chosen &= region[token] == cell["region"]
        assert cell["n"] == chosen.sum() > 0
        for name, values in (("g_norm", g * norm), ("g", g), ("norm", norm)):
            found = float(cell[f"{name}_q32"]) / 2**32
            assert found == pytest.approx(values[chosen].sum(), rel=1e-8)
    assert sum(cell["n"] for cell in cells) == len(token)


def test_same_bytes_for_any_threads_memory_and_chunks(build_run: BuildRun) -> None:
    folder = build_run(tokens=30_000, parts=7)
    found = set()
    for threads, memory_limit, chunk_parts in (
        (1, None, 15),
        (2, None, 3),
        (8, None, 1),
        (8, "64MB", 2),
        (3, "64MB", 100),
    ):
        path = compute(folder, threads=threads, memory_limit=memory_limit, chunk_parts=chunk_parts)
        found.add((path, path.read_bytes()))
        path.unlink()
    assert len(found) == 1


def read_tables(folder: Path) -> dict[str, pa.Table]:
    """The whole of each part table."""
    run = store.open_run(folder)
    return {name: pq.ParquetDataset(run.files(name)).read() for name in PART_TABLES}


def test_same_cells_for_any_parts(build_run: BuildRun) -> None:
    folder = build_run(parts=1)
    whole = pq.read_table(compute(folder))
    tables = read_tables(folder)
    for number in range(4):
        quarter = pc.equal(pc.divide(tables["tokens"]["token_id"], 500), number)
        routed = pc.equal(pc.divide(tables["routes"]["token_id"], 500), number)
        part = tables | {
            "tokens": tables["tokens"].filter(quarter),
            "routes": tables["routes"].filter(routed),
        }
        store.commit_part(folder, number, tables=part, blocks=(number, number + 1))
    assert pq.read_table(compute(folder)).equals(whole)


def test_cache_is_used_and_keyed(build_run: BuildRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_run()
    path = compute(folder)
    stamp = path.stat().st_mtime_ns
    monkeypatch.setattr("eaftflow.cells.check_hashes", lambda *_: pytest.fail("read again"))
    assert compute(folder) == path
    assert path.stat().st_mtime_ns == stamp
    other = build_run("other", seed=1)
    assert parts_hash(store.open_run(other)) != parts_hash(store.open_run(folder))


def test_changed_byte_is_named(build_run: BuildRun) -> None:
    folder = build_run()
    part = folder / "routes" / "part-000002.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(EaftflowError, match=r"routes/part-000002\.parquet has changed since"):
        compute(folder)
    assert not list((folder / "cells").glob("*.parquet"))


def test_lost_record_is_noticed(build_run: BuildRun) -> None:
    folder = build_run(parts=1)
    (part,) = store.open_run(folder).parts
    tables = {name: pq.read_table(folder / file.path) for name, file in part.files.items()}
    tables["routes"] = tables["routes"].slice(1)
    store.commit_part(folder, 0, tables=tables, blocks=(part.first_block, part.next_block))
    with pytest.raises(
        EaftflowError, match="3,999 records of layer 1, but 2,000 tokens x top_k are 4,000"
    ):
        compute(folder)


def test_damaged_cache(build_run: BuildRun) -> None:
    folder = build_run()
    path = compute(folder)
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    with pytest.raises(EaftflowError, match=r"of layer 1.*It is only a cache: remove it"):
        compute(folder)
    path.write_bytes(b"PAR1")
    with pytest.raises(EaftflowError, match=r"cannot be read.*It is only a cache: remove it"):
        compute(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e9])
def test_not_a_number(build_run: BuildRun, edit_run: EditRun, value: float) -> None:
    folder = build_run(parts=1)
    norm = read_tables(folder)["routes"]["norm"].to_pylist()
    edit_run(folder, "routes", norm=[*norm[:7], value, *norm[8:]])
    with pytest.raises(EaftflowError, match="not finite or reaches 2\\^31, in parts 0 to 0"):
        compute(folder)
