"""Parts exist whole or not at all."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import BuildRun

from eaftflow import store
from eaftflow.errors import EaftflowError


def test_a_part_is_what_its_commit_record_says(build_run: BuildRun) -> None:
    run = store.open_run(build_run(tokens=500, parts=3))
    assert [part.number for part in run.parts] == [0, 1, 2]
    assert run.tokens == 500
    for part in run.parts:
        for name, file in part.files.items():
            path = run.path / file.path
            assert store.hash_file(path) == file.sha256
            assert pq.read_metadata(path).num_rows == file.rows
            assert file.path == f"{name}/part-{part.number:06d}.parquet"


def test_routes_have_one_row_group_a_layer_and_page_checksums(build_run: BuildRun) -> None:
    run = store.open_run(build_run(tokens=300, parts=1, layers=3))
    [path] = run.files("routes")
    file = pq.ParquetFile(path, page_checksum_verification=True)
    layers = [
        file.read_row_group(group, ["layer"])["layer"].unique().to_pylist() for group in range(3)
    ]
    assert (file.num_row_groups, layers) == (3, [[1], [3], [5]])
    encodings = file.metadata.row_group(0).column(3).encodings
    assert "BYTE_STREAM_SPLIT" in encodings


def test_files_without_a_commit_record_do_not_exist_and_are_dropped(build_run: BuildRun) -> None:
    path = build_run(tokens=500, parts=3, complete=False)
    (path / "_parts" / "part-000002.json").unlink()
    (path / "tokens" / "part-000003.parquet.tmp").write_bytes(b"half")
    run = store.open_run(path)
    assert len(run.parts) == 2
    assert len(run.files("tokens")) == 2
    dropped = {str(file.relative_to(path)) for file in store.drop_uncommitted(run)}
    assert dropped == {
        "tokens/part-000002.parquet",
        "routes/part-000002.parquet",
        "blocks/part-000002.parquet",
        "tokens/part-000003.parquet.tmp",
    }
    assert store.open_run(path) == run


def test_a_truncated_part_is_named(build_run: BuildRun) -> None:
    path = build_run()
    victim = path / "routes" / "part-000001.parquet"
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(EaftflowError, match=r"routes/part-000001\.parquet has \d+ bytes"):
        store.open_run(path)
    victim.unlink()
    with pytest.raises(EaftflowError, match=r"routes/part-000001\.parquet is missing"):
        store.open_run(path)


def test_not_a_run(tmp_path: Path, build_run: BuildRun) -> None:
    with pytest.raises(EaftflowError, match="is not a run: it has no manifest"):
        store.open_run(tmp_path)
    path = build_run()
    manifest = json.loads((path / store.MANIFEST).read_text())
    store.write_json(path / store.MANIFEST, {**manifest, "format_version": 99})
    with pytest.raises(EaftflowError, match="format version 99, this eaftflow reads version 1"):
        store.open_run(path)
    (path / store.MANIFEST).write_text("{")
    with pytest.raises(EaftflowError, match=r"manifest\.json is not valid JSON"):
        store.open_run(path)


def test_newest_run_is_by_manifest_not_by_file_time(tmp_path: Path, build_run: BuildRun) -> None:
    build_run("new", seed=7)
    build_run("old", seed=3)
    assert store.newest_run(tmp_path) == tmp_path / "new"
    with pytest.raises(EaftflowError, match=r"No run found under .*capture"):
        store.newest_run(tmp_path / "nothing")


def test_a_run_has_one_writer_at_a_time(tmp_path: Path) -> None:
    second = store.lock_run(tmp_path)
    with (
        store.lock_run(tmp_path),
        pytest.raises(EaftflowError, match="Another process is writing"),
        second,
    ):
        pass
    with store.lock_run(tmp_path):  # free again
        pass


def test_a_lost_commit_record_is_noticed(build_run: BuildRun) -> None:
    middle = build_run("middle", tokens=500, parts=3)
    (middle / "_parts" / "part-000001.json").unlink()
    with pytest.raises(EaftflowError, match=r"no sound record of part 1, which should begin at"):
        store.open_run(middle)
    last = build_run("last", tokens=500, parts=3)
    (last / "_parts" / "part-000002.json").unlink()
    with pytest.raises(EaftflowError, match=r"holds 320 tokens, but its summary says 500"):
        store.open_run(last)


def test_a_foreign_manifest_is_no_run(tmp_path: Path, build_run: BuildRun) -> None:
    path = build_run()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / store.MANIFEST).write_text('{"name": "an app"}')
    assert store.newest_run(tmp_path) == path
