"""Rankings on disk: what is refused, and which one is newest."""

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eaftflow.errors import EaftflowError
from eaftflow.rankings import (
    METADATA_KEY,
    PARAMETERS,
    check_target,
    newest_ranking,
    read_ranking,
    write_ranking,
)
from eaftflow.relations import Parameters
from eaftflow.schemas import RANKING

MODEL = {"name": "m", "path": "m", "fingerprint": "f"}
RUN = {"format_version": 1, "tokens": 4, "complete": True, "parts_sha256": "0", "model": MODEL}
SOUND = {**{name: None for name in PARAMETERS if "." not in name}, "criterion": "reap", "run": RUN}


def table(**columns: list[Any]) -> pa.Table:
    """Two layers of two experts; `columns` replace these."""
    values = {
        "layer": [1, 1, 3, 3],
        "expert": [1, 0, 0, 1],
        "rank": [0, 1, 0, 1],
        "saliency": [2.0, None, 1.0, -1.0],
        **{name: [0, 0, 0, 0] for name in ("n", "n_good", "n_uncertain", "n_conflict")},
    }
    return pa.table({**values, **columns}).cast(RANKING)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "rankings" / "first.parquet"
    written = write_ranking(path, table(), parameters={**SOUND, "w_good": -2.5})
    read = read_ranking(path)
    assert read.table.equals(written.table)
    assert read.table.schema.equals(RANKING)
    assert read.parameters == {**SOUND, "w_good": -2.5}


def test_newest_is_the_last_written(tmp_path: Path) -> None:
    for name in ("b", "a", "b"):
        path = tmp_path / "rankings" / f"{name}.parquet"
        write_ranking(path, table(), parameters=SOUND, newest=True)
        assert newest_ranking(tmp_path) == path


def test_only_what_is_said_to_be_newest_is(tmp_path: Path) -> None:
    write_ranking(tmp_path / "rankings" / "mine.parquet", table(), parameters=SOUND)
    with pytest.raises(EaftflowError, match=r"has no ranking yet\. Run `eaftflow rescore"):
        newest_ranking(tmp_path)


def test_newest_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "rankings" / "a.parquet"
    write_ranking(path, table(), parameters=SOUND, newest=True)
    path.unlink()
    with pytest.raises(EaftflowError, match=r"a\.parquet, the newest ranking by .*, is gone"):
        newest_ranking(tmp_path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(EaftflowError, match="does not exist"):
        read_ranking(tmp_path / "none.parquet")


def test_flipped_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_ranking(path, table(), parameters=SOUND)
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with pytest.raises(EaftflowError, match="cannot be read as Parquet"):
        read_ranking(path)


def test_truncated(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_ranking(path, table(), parameters=SOUND)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(EaftflowError, match="cannot be read as Parquet"):
        read_ranking(path)


def test_another_table(tmp_path: Path) -> None:
    pq.write_table(pa.table({"layer": [1]}), tmp_path / "a.parquet")
    with pytest.raises(EaftflowError, match="no ranking of this eaftflow"):
        read_ranking(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"saliency": [2.0, float("nan"), 1.0, 0.0]}, "a saliency that is not finite"),
        ({"saliency": [float("inf"), 1.0, 1.0, 0.0]}, "a saliency that is not finite"),
        ({"expert": [1, 1, 0, 1]}, "does not rank each expert of layer 1 exactly once"),
        ({"rank": [0, 1, 1, 2]}, "does not rank each expert of layer 3 exactly once"),
    ],
)
def test_unsound(tmp_path: Path, wrong: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(EaftflowError, match=message):
        write_ranking(tmp_path / "a.parquet", table(**wrong), parameters=SOUND)
    assert not list(tmp_path.iterdir())


def test_parameters_of_the_policy_are_promised() -> None:
    assert {field.name for field in fields(Parameters)} <= set(PARAMETERS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "lacks criterion among its parameters. Run `eaftflow rescore` again"),
        ("[]", "lacks criterion among"),
        (json.dumps({**SOUND, "run": None}), r"lacks run\.format_version among"),
        (json.dumps({**SOUND, "run": {**RUN, "model": {}}}), r"lacks run\.model\.name among"),
        ("{", "has parameters that are not JSON"),
    ],
)
def test_incomplete_parameters(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table().replace_schema_metadata({METADATA_KEY: text.encode()}), path)
    with pytest.raises(EaftflowError, match=message):
        read_ranking(path)


def test_incomplete_parameters_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(EaftflowError, match="The new ranking lacks criterion"):
        write_ranking(tmp_path / "a.parquet", table(), parameters={})
    assert not list(tmp_path.iterdir())


def test_targets_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dd.parquet").mkdir()
    (tmp_path / "file.txt").write_text("x")
    for name, message in (
        ("dd.parquet", "is a folder"),
        ("file.txt/x.parquet", r"file\.txt is no folder that you may write to"),
        ("file.txt/deep/x.parquet", r"file\.txt is no folder that you may write to"),
        ("x" * 300 + ".parquet", "could not be written"),
    ):
        with pytest.raises(EaftflowError, match=message):
            check_target(tmp_path / name)
        with pytest.raises(EaftflowError, match="could not be written"):
            write_ranking(tmp_path / name, table(), parameters=SOUND)
    check_target(tmp_path / "new" / "x.parquet")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(EaftflowError, match="no folder that you may write to"):
        check_target(tmp_path / "x.parquet")
    assert {path.name for path in tmp_path.rglob("*")} == {"dd.parquet", "file.txt"}


def test_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(_: pa.Table, path: Path, **__: object) -> None:
        path.write_text("half a ranking")
        raise OSError("no space left")

    monkeypatch.setattr(pq, "write_table", fill)
    with pytest.raises(EaftflowError, match=r"a\.parquet could not be written \(no space left\)"):
        write_ranking(tmp_path / "a.parquet", table(), parameters=SOUND)
    assert not list(tmp_path.iterdir())
