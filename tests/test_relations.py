"""Every relation of `sql/` against golden cases small enough to check by hand, and its header."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from eaftflow import relations
from eaftflow.errors import EaftflowError
from eaftflow.relations import Parameters
from eaftflow.resources import resource

SQL = resource("sql")
CASES = Path(__file__).parent / "sql"
NAMES = sorted(path.relative_to(SQL).with_suffix("").as_posix() for path in SQL.rglob("*.sql"))

# The method's letters name the same thing everywhere, so a column's name tells its type.
TYPES = {
    **dict.fromkeys(("p_t", "logp", "H_t", "g", "norm"), "FLOAT"),
    **dict.fromkeys(("p_q", "H_q", "H_hi", "p_hi", "H_mid"), "FLOAT"),
    **dict.fromkeys(("g_norm_q32", "g_q32", "norm_q32"), "DECIMAL(38,0)"),
    **dict.fromkeys(("region", "pack", "source", "text", "name"), "VARCHAR"),
    **dict.fromkeys(("w_good", "w_uncertain", "w_conflict", "saliency"), "DOUBLE"),
}


def read_header(name: str) -> dict[str, list[str]]:
    """The `grain:`, `reads:` and `params:` of a relation, as lists of names."""
    found = re.findall(r"^-- (grain|reads|params): (.+)$", relations.read_sql(name), re.MULTILINE)
    assert [key for key, _ in found] == ["grain", "reads", "params"]
    return {key: [] if value in ("none", "one row") else value.split(", ") for key, value in found}


def read_body(name: str) -> str:
    """A relation's SQL without its comments."""
    return re.sub(r"--.*", "", relations.read_sql(name))


def is_ordered(name: str) -> bool:
    """Whether a relation's outermost select promises an order."""
    return re.search(r"^order by", read_body(name), re.MULTILINE) is not None


def cases(name: str) -> list[Path]:
    """The folders of a relation's golden cases."""
    return sorted(path.parent for path in (CASES / name).glob("*/expected.csv"))


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, case, id=f"{name}-{case.name}") for name in NAMES for case in cases(name)],
)
def test_golden(name: str, case: Path) -> None:
    con = relations.open_database()
    for table in read_header(name)["reads"]:
        columns = con.read_csv(case / f"{table}.csv").columns
        types = {column: TYPES[column] for column in columns if column in TYPES}
        con.read_csv(case / f"{table}.csv", dtype=types).create(table)
    found = con.sql(relations.read_sql(name), params=json.loads((case / "params.json").read_text()))
    types = {
        column: "VARCHAR" if column == "region" else str(kind)
        for column, kind in zip(found.columns, found.types, strict=True)
    }
    expected = con.read_csv(case / "expected.csv", dtype=types)
    assert found.columns == expected.columns
    rows, expected_rows = found.fetchall(), expected.fetchall()
    if not is_ordered(name):
        rows, expected_rows = sorted(rows, key=repr), sorted(expected_rows, key=repr)
    assert rows == expected_rows


@pytest.mark.parametrize("name", NAMES)
def test_file(name: str) -> None:
    header, body = read_header(name), read_body(name)
    assert cases(name), "no golden case"
    steps = set(re.findall(r"^(?:with )?(\w+) as \($", body, re.MULTILINE))
    reads = set(re.findall(r"\b(?:from|join)\s+(\w+)", body)) - steps
    assert set(header["reads"]) == reads
    assert set(header["params"]) == set(re.findall(r"\$(\w+)", body))
    assert ";" not in body
    assert not re.search(r"\b(create|insert|delete|drop|set|copy)\b", body)


@pytest.mark.parametrize("name", NAMES)
def test_header_matches_cases(name: str) -> None:
    header = read_header(name)
    for case in cases(name):
        tables = {path.stem for path in case.glob("*.csv")} - {"expected"}
        assert tables == set(header["reads"])
        assert set(json.loads((case / "params.json").read_text())) == set(header["params"])
        columns, *rows = [line.split(",") for line in (case / "expected.csv").read_text().split()]
        keys = [tuple(row[columns.index(column)] for column in header["grain"]) for row in rows]
        assert len(keys) == len(set(keys)), "the grain is not unique"


def test_every_criterion_is_there() -> None:
    assert relations.criteria() == ("eaft_reap", "eaft_reap_sum", "frequency", "reap", "reap_sum")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": 0.0}, "q=0.0 is no quantile level"),
        ({"q": 1.5}, "q=1.5 is no quantile level"),
        ({"h_hi": float("nan")}, "h_hi=nan is no quantile level"),
        ({"q": 0.9}, "q=0.9 must be below h_hi=0.85"),
        ({"p_hi": 0.5}, "p_hi was given without h_mid"),
        ({"h_mid": 0.5}, "h_mid was given without p_hi"),
        ({"p_hi": 1.0, "h_mid": 0.5}, "p_hi=1.0 is no quantile level"),
        ({"w_conflict": float("nan")}, "w_conflict=nan is no weight"),
        ({"w_good": float("inf")}, "w_good=inf is no weight"),
        ({"criterion": "magic"}, "There is no criterion 'magic'. Choose one of eaft_reap, "),
    ],
)
def test_wrong_parameters(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(EaftflowError, match=re.escape(message)):
        Parameters(**wrong)


def test_files_with_glob_characters(tmp_path: Path) -> None:
    con = relations.open_database()
    for name in ("a[1]*=?", "a1"):
        (tmp_path / name).mkdir()
        con.sql(f"select '{name}' as folder").write_parquet(str(tmp_path / name / "x.parquet"))
    literal = relations._literal(tmp_path / "a[1]*=?" / "x.parquet")
    assert con.read_parquet([literal], hive_partitioning=False).fetchall() == [("a[1]*=?",)]
