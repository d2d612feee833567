"""`eaftflow query` and `eaftflow.connect`: which views there are, and what they answer."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest
from click.testing import CliRunner, Result

import eaftflow
from eaftflow.cli import main
from eaftflow.errors import EaftflowError
from eaftflow.rankings import read_ranking
from eaftflow.relations import Parameters
from eaftflow.rescore import rescore
from eaftflow.schemas import BLOCKS, RANKING, ROUTES, TOKENS, VOCAB

BuildRun = Callable[..., Path]

COLUMNS = {
    "tokens": TOKENS.names,
    "routes": ROUTES.names,
    "blocks": BLOCKS.names,
    "vocab": VOCAB.names,
    "layers": ["layer", "name", "experts", "top_k"],
    "inputs": ["block", "position", "token", "text"],
    "thresholds": ["p_q", "H_q", "H_hi", "p_hi", "H_mid"],
    "regions": ["token_id", "region"],
    "records": [
        *("token_id", "layer", "expert", "g", "norm", "p_t", "logp", "H_t", "region", "pack"),
        *("source", "row", "block", "position", "target", "top_token"),
    ],
    "weights": ["w_good", "w_uncertain", "w_conflict"],
    "cells": ["layer", "expert", "region", "n", "g_norm_q32", "g_q32", "norm_q32"],
    "saliency": ["layer", "expert", "saliency"],
    "ranking": RANKING.names,
}

CONFLICTS_IN_CONTEXT = """
    select
        records.token_id,
        string_agg(inputs.text, '' order by inputs.position) as context,
        any_value(target.text) as target,
        any_value(preferred.text) as preferred
    from records
    inner join inputs
        on
            records.block = inputs.block
            and inputs.position between records.position - 8 and records.position
    inner join vocab as target on records.target = target.token
    inner join vocab as preferred on records.top_token = preferred.token
    where records.layer = 1 and records.expert = 3 and records.region = 'conflict'
    group by records.token_id
    order by records.token_id
"""


def invoke(*arguments: object) -> Result:
    """Run `eaftflow query ARGUMENTS`."""
    return CliRunner().invoke(main, ["query", *map(str, arguments)])


@pytest.mark.parametrize("scored", [False, True])
def test_views(build_run: BuildRun, scored: bool) -> None:  # noqa: FBT001
    folder = build_run()
    if scored:
        rescore(folder, parameters=Parameters())
    con = eaftflow.connect(folder)
    for view, columns in COLUMNS.items():
        assert con.table(view).columns == columns
    assert con.sql("select count(*) from records").fetchall() == [(2_000 * 3 * 2,)]
    assert con.sql("select count(*), sum(n) from ranking").fetchall() == [(24, 2_000 * 3 * 2)]
    assert con.sql("select count(*) from inputs where text is null").fetchall() == [(0,)]


def test_views_follow_the_newest_ranking(build_run: BuildRun) -> None:
    folder = build_run()
    default = eaftflow.connect(folder).sql("from ranking").fetchall()
    for parameters in (
        Parameters(),
        Parameters(w_conflict=-20, q=0.1),
        Parameters(criterion="reap_sum", p_hi=0.5, h_mid=0.5),
    ):
        path = rescore(folder, parameters=parameters).ranking.path
        con = eaftflow.connect(folder)
        stored = [tuple(row.values()) for row in read_ranking(path).table.to_pylist()]
        assert con.sql("from ranking").fetchall() == stored
        assert con.sql("select w_conflict from weights").fetchall() == [(parameters.w_conflict,)]
        assert (stored == default) == (parameters == Parameters())


def test_records_agree_with_cells(build_run: BuildRun) -> None:
    con = eaftflow.connect(build_run())
    by_hand = """
        select layer, expert, region::varchar as region, count(*) as n
        from records group by all
    """
    cells = "select layer, expert, region, n from cells"
    assert sorted(con.sql(by_hand).fetchall()) == sorted(con.sql(cells).fetchall())


def test_conflicts_decoded_in_context(build_run: BuildRun) -> None:
    con = eaftflow.connect(build_run())
    rows = con.sql(CONFLICTS_IN_CONTEXT).fetchall()
    assert rows
    token_id, context, target, preferred = rows[-1]
    block, position, *tokens = con.execute(
        "select block, position, target, top_token from tokens where token_id = $id",
        {"id": token_id},
    ).fetchall()[0]
    blocks = con.sql("from blocks order by block, position").fetchall()
    seen = [token for b, p, token in blocks if b == block and position - 8 <= p <= position]
    assert context == "".join(f" word{token}" for token in seen)
    assert [target, preferred] == [f" word{token}" for token in tokens]


def test_command(build_run: BuildRun) -> None:
    folder = build_run()
    result = invoke("select layer, count(*) as n from routes group by layer", "--run", folder)
    assert result.exit_code == 0, result.output
    assert "│     5 │  4000 │" in result.output


def test_newest_run_is_the_default(
    build_run: BuildRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_run("runs/one")
    monkeypatch.chdir(tmp_path)
    assert "2000" in invoke("select count(*) from tokens").output


def test_statement_without_rows(build_run: BuildRun, tmp_path: Path) -> None:
    target = tmp_path / "ranking.csv"
    result = invoke(f"copy ranking to '{target}'", "--run", build_run())
    assert result.exit_code == 0, result.output
    assert target.read_text().startswith("layer,expert,rank,saliency")


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("selct 1", "syntax error at or near"),
        ("select * from text", "Table with name text does not exist"),
        ("select nothing from tokens", 'Referenced column "nothing" not found'),
        ("select cast('x' as integer) from tokens", "Could not convert string 'x'"),
    ],
)
def test_bad_sql(build_run: BuildRun, sql: str, message: str) -> None:
    result = invoke(sql, "--run", build_run())
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: The query failed.")
    assert message in result.stderr


def test_bad_runs(build_run: BuildRun, tmp_path: Path) -> None:
    folder = build_run()
    path = rescore(folder, parameters=Parameters()).ranking.path
    path.write_bytes(b"PAR1 no")
    result = invoke("from ranking", "--run", folder)
    assert result.exit_code == 2
    assert "eaft_reap.parquet cannot be read as Parquet" in result.stderr
    assert "is not a run" in invoke("from ranking", "--run", tmp_path).stderr
    with pytest.raises(EaftflowError, match="is not a run"):
        eaftflow.connect(str(tmp_path))
    path.unlink()
    assert "is gone" in invoke("from tokens", "--run", folder).stderr


def test_read_only_run(build_run: BuildRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_run()
    monkeypatch.setattr("os.access", lambda *_: False)
    assert eaftflow.connect(folder).sql("select count(*) from ranking").fetchall() == [(24,)]
    assert not (folder / "cells").exists()


def test_damaged_vocab(build_run: BuildRun) -> None:
    folder = build_run()
    (folder / "vocab.parquet").unlink()
    assert "vocab.parquet does not exist" in invoke("from tokens", "--run", folder).stderr


def test_import_is_cheap() -> None:
    code = "import eaftflow, sys; assert not {'duckdb', 'pyarrow', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- README ------------------------------------------------------------------------------------

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SQL_BLOCKS = re.findall(r"^```sql\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("sql", [block for block in SQL_BLOCKS if "_parts" not in block])
def test_readme_question(build_run: BuildRun, sql: str) -> None:
    assert eaftflow.connect(build_run()).sql(sql).fetchall()


@pytest.mark.parametrize("sql", [block for block in SQL_BLOCKS if "_parts" in block])
def test_readme_without_eaftflow(
    build_run: BuildRun, monkeypatch: pytest.MonkeyPatch, sql: str
) -> None:
    folder = build_run()
    monkeypatch.chdir(folder)
    con = duckdb.connect()
    con.execute(sql).fetchall()
    columns = "select token_id, layer, expert, g, norm, p_t, H_t, region::varchar, position, target"
    query = f"{columns} from records order by token_id, layer, expert"
    assert con.sql(query).fetchall() == eaftflow.connect(folder).sql(query).fetchall()
