"""Rankings on disk: what is refused, and which one is newest."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eaftflow.errors import EaftflowError
from eaftflow.rankings import newest_ranking, read_ranking, write_ranking
from eaftflow.schemas import RANKING


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
    written = write_ranking(path, table(), parameters={"criterion": "reap", "w": -2.5})
    read = read_ranking(path)
    assert read.table.equals(written.table)
    assert read.table.schema.equals(RANKING)
    assert read.parameters == {"criterion": "reap", "w": -2.5}


def test_newest_is_the_last_written(tmp_path: Path) -> None:
    for name in ("b", "a", "b"):
        write_ranking(tmp_path / "rankings" / f"{name}.parquet", table(), parameters={})
        assert newest_ranking(tmp_path) == tmp_path / "rankings" / f"{name}.parquet"


def test_ranking_elsewhere_is_not_the_newest(tmp_path: Path) -> None:
    write_ranking(tmp_path / "mine.parquet", table(), parameters={})
    with pytest.raises(EaftflowError, match=r"has no ranking yet\. Run `eaftflow rescore"):
        newest_ranking(tmp_path)


def test_newest_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "rankings" / "a.parquet"
    write_ranking(path, table(), parameters={})
    path.unlink()
    with pytest.raises(EaftflowError, match=r"a\.parquet, the newest ranking by .*, is gone"):
        newest_ranking(tmp_path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(EaftflowError, match="does not exist"):
        read_ranking(tmp_path / "none.parquet")


def test_flipped_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_ranking(path, table(), parameters={})
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with pytest.raises(EaftflowError, match="cannot be read as Parquet"):
        read_ranking(path)


def test_truncated(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_ranking(path, table(), parameters={})
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
        write_ranking(tmp_path / "a.parquet", table(**wrong), parameters={})
    assert not list(tmp_path.iterdir())
