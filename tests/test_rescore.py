"""`eaftflow rescore`: the ranking, what it says, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from eaftflow import store
from eaftflow.cli import main
from eaftflow.errors import EaftflowError
from eaftflow.rankings import newest_ranking, read_ranking
from eaftflow.relations import Parameters, criteria
from eaftflow.rescore import Rescored, default_name, rescore

BuildRun = Callable[..., Path]
EditRun = Callable[..., None]


def invoke(*arguments: object) -> Result:
    """Run `eaftflow rescore ARGUMENTS`."""
    return CliRunner().invoke(main, ["rescore", *map(str, arguments)])


def refusal(*arguments: object) -> str:
    """The message with which `eaftflow rescore ARGUMENTS` ends in exit code 2."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert not isinstance(result.exception, EaftflowError)
    assert result.stderr.count("Error: ") == 1
    return result.stderr


def scores(rescored: Rescored) -> dict[tuple[int, int], float | None]:
    """Saliency by layer and expert."""
    rows = rescored.ranking.table.to_pylist()
    return {(row["layer"], row["expert"]): row["saliency"] for row in rows}


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_every_criterion_against_numpy(build_run: BuildRun, strict: bool) -> None:  # noqa: FBT001
    folder = build_run()
    run = store.open_run(folder)
    tokens = pq.ParquetDataset(run.files("tokens")).read()
    routes = pq.ParquetDataset(run.files("routes")).read()
    p_t, H_t = (tokens[name].to_numpy() for name in ("p_t", "H_t"))

    def quantile(values: np.ndarray, level: float) -> np.float32:
        return np.sort(values)[int(np.ceil(level * len(values))) - 1]

    low = p_t <= quantile(p_t, 0.15)
    good = np.ones(len(p_t), bool)
    if strict:
        good = (p_t >= quantile(p_t, 0.4)) & (H_t <= quantile(H_t, 0.6))
    w = np.where(good, 0.5, 0.0)
    w = np.where(low & (H_t >= quantile(H_t, 0.85)), 0.125, w)
    w = np.where(low & (H_t <= quantile(H_t, 0.15)), -7.0, w)
    layer, expert, token = (routes[name].to_numpy() for name in ("layer", "expert", "token_id"))
    g, norm = (routes[name].to_numpy().astype(np.float64) for name in ("g", "norm"))
    levels = {"p_hi": 0.4, "h_mid": 0.6} if strict else {}
    weights = {"w_good": 0.5, "w_uncertain": 0.125, "w_conflict": -7.0}
    for criterion, record, mean in (
        ("eaft_reap", w[token] * g * norm, True),
        ("eaft_reap_sum", w[token] * g * norm, False),
        ("reap", g * norm, True),
        ("reap_sum", g * norm, False),
        ("frequency", np.ones(len(g)), False),
    ):
        rescored = rescore(folder, parameters=Parameters(criterion=criterion, **weights, **levels))
        ranked = scores(rescored)
        expected = {}
        for key in sorted(ranked):
            chosen = record[(layer == key[0]) & (expert == key[1])]
            expected[key] = (chosen.mean() if mean else chosen.sum()) if len(chosen) else np.nan
        found = np.array([ranked[key] for key in expected], dtype=float)
        np.testing.assert_allclose(found, list(expected.values()), rtol=1e-7, atol=1e-9)
        order = sorted(ranked, key=lambda key: (key[0], np.isnan(expected[key]), -expected[key]))
        assert list(ranked) == order
    assert scores(rescored)[1, 0] is None  # never routed, and there all the same
    assert rescored.ranking.table.num_rows == 3 * 8


def test_same_bytes_for_any_threads_memory_and_chunks(build_run: BuildRun) -> None:
    folder = build_run(tokens=20_000, parts=6)
    found = set()
    for threads, memory_limit, chunk_parts in ((1, None, 15), (2, None, 2), (8, "64MB", 1)):
        shutil.rmtree(folder / "cells", ignore_errors=True)
        rescored = rescore(
            folder,
            parameters=Parameters(w_conflict=-3),
            threads=threads,
            memory_limit=memory_limit,
            chunk_parts=chunk_parts,
        )
        found.add(rescored.ranking.path.read_bytes())
    assert len(found) == 1


def test_weights_alone_read_no_record(build_run: BuildRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_run()
    rescore(folder, parameters=Parameters())
    monkeypatch.setattr("eaftflow.relations.define_parts", lambda *_: pytest.fail("read again"))
    rescored = rescore(folder, parameters=Parameters(w_conflict=-20, criterion="eaft_reap_sum"))
    assert rescored.moved is not None
    assert rescored.moved.experts > 0


def test_moved_against_the_default(build_run: BuildRun) -> None:
    folder = build_run()
    default = rescore(folder, parameters=Parameters())
    assert default.moved is None
    other = rescore(folder, parameters=Parameters(w_conflict=-20))
    ranks = [
        {(row["layer"], row["expert"]): row["rank"] for row in ranked.ranking.table.to_pylist()}
        for ranked in (default, other)
    ]
    gained = {key: ranks[0][key] - ranks[1][key] for key in ranks[0]}
    assert other.moved is not None
    assert other.moved.experts == sum(map(bool, gained.values())) > 0
    layer, expert, before, after = other.moved.furthest or pytest.fail("nothing moved")
    assert abs(before - after) == max(map(abs, gained.values()))
    assert (before, after) == tuple(rank[layer, expert] for rank in ranks)
    half = next(kept for kept in other.moved.kept if kept.keep_frac == 0.5)
    assert half.kept == 3 * 4
    assert half.changed == sum(ranks[1][key] < 4 <= ranks[0][key] for key in ranks[0])


# --- the file ----------------------------------------------------------------------------------


def test_ranking_file(build_run: BuildRun) -> None:
    folder = build_run()
    path = rescore(folder, parameters=Parameters(w_conflict=-3, q=0.125)).ranking.path
    assert path == folder / "rankings" / "eaft_reap,q=0.125,w_conflict=-3.parquet"
    assert newest_ranking(folder) == path
    stored = read_ranking(path).parameters
    assert stored["criterion"] == "eaft_reap"
    assert stored["w_conflict"] == -3.0
    assert stored["q"] == 0.125
    assert set(stored["thresholds"]) == {"p_q", "H_q", "H_hi", "p_hi", "H_mid"}
    assert sum(stored["regions"].values()) == 2_000
    assert stored["run"]["model"]["fingerprint"] == "seed-0"
    assert stored["run"]["tokens"] == 2_000
    before = path.read_bytes()
    rescore(folder, parameters=Parameters(w_conflict=-3, q=0.125))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        (Parameters(), "eaft_reap"),
        (Parameters(criterion="reap_sum"), "reap_sum"),
        (Parameters(w_conflict=-3), "eaft_reap,w_conflict=-3"),
        (Parameters(w_good=0.5, h_hi=0.9), "eaft_reap,h_hi=0.9,w_good=0.5"),
        (Parameters(p_hi=0.5, h_mid=0.25), "eaft_reap,p_hi=0.5,h_mid=0.25"),
    ],
)
def test_default_name(parameters: Parameters, name: str) -> None:
    assert default_name(parameters) == name


def test_out(build_run: BuildRun, tmp_path: Path) -> None:
    folder = build_run()
    assert invoke("--run", folder, "--out", "mine").exit_code == 0
    assert newest_ranking(folder) == folder / "rankings" / "mine.parquet"
    elsewhere = tmp_path / "out" / "it.parquet"
    result = invoke("--run", folder, "--out", elsewhere)
    assert f"eaftflow prune --ranking {elsewhere}" in result.output
    assert read_ranking(elsewhere).parameters == read_ranking(newest_ranking(folder)).parameters
    assert newest_ranking(folder).stem == "mine"
    assert "neither a bare name nor the path of a .parquet file" in refusal(
        "--run", folder, "--out", tmp_path / "folder"
    )


def test_out_into_the_rankings_folder_by_path(
    build_run: BuildRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_run()
    rescore(folder, parameters=Parameters())
    monkeypatch.chdir(folder / "rankings")
    result = invoke("--run", "..", "--out", "here.parquet")
    assert result.exit_code == 0, result.output
    assert newest_ranking(folder).stem == "here"
    assert "outside the run" not in result.output
    assert "next       eaftflow prune --run ..\n" in result.output


def test_out_into_another_folder_named_rankings(build_run: BuildRun, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "rankings" / "x.parquet"
    result = invoke("--run", build_run(), "--out", elsewhere)
    assert "outside the run" in result.output
    assert "next " not in result.output
    assert list(elsewhere.parent.iterdir()) == [elsewhere]


def test_bad_out_is_refused_before_the_sums(
    build_run: BuildRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_run()
    (tmp_path / "dd.parquet").mkdir()
    (tmp_path / "file.txt").write_text("x")
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr("eaftflow.relations.open_database", lambda **_: pytest.fail("summed"))
    for out, message in (
        (tmp_path / "dd.parquet", "dd.parquet is a folder."),
        (tmp_path / "file.txt" / "x.parquet", "file.txt is no folder that you may write to"),
        *((name, f"--out {name!r} names no file") for name in (".", "..", "", "a/..", "/")),
    ):
        assert message in refusal("--run", folder, "--out", out)
    assert set(tmp_path.rglob("*")) == before


# --- the command -------------------------------------------------------------------------------


def test_output(build_run: BuildRun) -> None:
    folder = build_run()
    result = invoke("--run", folder, "--w-conflict", -20)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert max(map(len, result.output.replace(str(folder), "RUN").splitlines())) <= 100
    text = result.output
    assert f"run        {folder}: 2,000 tokens, 3 MoE layers of 8 experts" in text
    assert re.search(r"conflict +\d+ +\d\.\d\d% +-20 +\d+\.\d\d%", text)
    assert re.search(r"^ +1 +\d+ +1 ", text, re.MULTILINE), "one expert of layer 1 is unused"
    assert re.search(r"against    eaft_reap: \d+ of 24 experts change rank", text)
    assert re.search(r"keep 0.5    \d+ of 12 kept experts would have been dropped", text)


def test_output_stays_short_with_many_layers(build_run: BuildRun) -> None:
    folder = build_run(tokens=300, layers=48, experts=128, parts=1)
    result = invoke("--run", folder, "--w-conflict", -20)
    lines = result.output.replace(str(folder), "RUN").splitlines()
    assert len(lines) < 75
    assert max(map(len, lines)) <= 100


def test_options_are_the_parameters() -> None:
    command = main.commands["rescore"]
    given = command.make_context("rescore", []).params
    assert {name: given[name] for name in asdict(Parameters())} == asdict(Parameters())
    (criterion,) = (option for option in command.params if option.name == "criterion")
    assert all(name in criterion.help for name in criteria())


def test_newest_run_is_the_default(
    build_run: BuildRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_run("runs/newer", seed=2)
    build_run("runs/older", seed=1)
    monkeypatch.chdir(tmp_path)
    result = invoke()
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("\nnext       eaftflow prune\n")
    assert f"run        {Path('runs/newer')}: " in result.output


def test_incomplete_run_warns(build_run: BuildRun) -> None:
    folder = build_run(complete=False)
    result = invoke("--run", folder)
    assert result.exit_code == 0
    assert "Warning: This run is incomplete: 2,000 tokens so far." in result.stderr
    assert f"eaftflow capture --resume --out {folder}" in result.stderr


def test_weight_that_cannot_matter_warns(build_run: BuildRun, edit_run: EditRun) -> None:
    folder = build_run(parts=1)
    ignored = invoke("--run", folder, "--criterion", "reap", "--w-conflict", -3)
    assert "Warning: reap ignores token weights: w_conflict changes nothing." in ignored.stderr
    assert "criterion  reap (ignores token weights)" in ignored.output
    edit_run(folder, "tokens", p_t=np.linspace(0, 0.9, 2000), H_t=np.linspace(1, 0, 2000))
    empty = invoke("--run", folder, "--w-conflict", -3)
    assert "No token is in the region conflict: w_conflict=-3 changes nothing." in empty.stderr
    assert invoke("--run", folder).stderr == "", "nothing was set"


def test_ties_warn(build_run: BuildRun, edit_run: EditRun) -> None:
    folder = build_run(parts=1)
    H_t = np.linspace(0, 1, 2000)
    edit_run(folder, "tokens", H_t=np.where(H_t < 0.3, 0, H_t))
    result = invoke("--run", folder)
    assert result.exit_code == 0
    assert "H_t <= H_q takes 30.0% of the tokens where 15.0% were asked for" in result.stderr


def test_too_many_ties_are_refused(build_run: BuildRun, edit_run: EditRun) -> None:
    folder = build_run(parts=1)
    edit_run(folder, "tokens", p_t=np.where(np.arange(2000) < 100, 0.5, 1.0))
    assert "q=0.15 gives p_q=1.0" in refusal("--run", folder)
    result = invoke("--run", folder, "--q", 0.04)
    assert result.exit_code == 0
    assert "no default ranking to compare with: q=0.15 gives p_q=1.0" in result.stderr
    edit_run(folder, "tokens", p_t=np.linspace(0, 0.9, 2000), H_t=np.zeros(2000))
    assert "H_q=0.0 >= H_hi=0.0" in refusal("--run", folder)
    assert not list((folder / "rankings").glob("eaft_reap.parquet"))


def test_bad_options(build_run: BuildRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_run()
    assert "q=2.0 is no quantile level" in refusal("--run", folder, "--q", 2)
    assert "w_conflict=nan is no weight" in refusal("--run", folder, "--w-conflict", "nan")
    assert "p_hi was given without h_mid" in refusal("--run", folder, "--p-hi", 0.5)
    assert "no criterion 'magic'" in refusal("--run", folder, "--criterion", "magic")
    assert "'x' is not a valid float" in refusal("--w-good", "x")
    assert "none is not a run: it has no manifest.json" in refusal("--run", tmp_path / "none")
    monkeypatch.chdir(tmp_path / "run")
    assert "No run found under" in refusal()
    assert not (folder / "rankings").exists()


def test_damaged_runs(build_run: BuildRun) -> None:
    folder = build_run()
    part = folder / "routes" / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    message = refusal("--run", folder)
    assert "routes/part-000001.parquet has " in message
    assert "its commit record says" in message
    part.unlink()
    assert "routes/part-000001.parquet is missing" in refusal("--run", folder)
    for record in (*(folder / "_parts").iterdir(), folder / store.SUMMARY):
        record.unlink()
    assert "holds no tokens yet" in refusal("--run", folder)


def test_too_large_weight(build_run: BuildRun) -> None:
    folder = build_run()
    assert "saliency that is not finite. Use smaller weights" in refusal(
        "--run", folder, "--w-good", 1e308, "--criterion", "eaft_reap_sum"
    )


def test_torch_stays_out(build_run: BuildRun) -> None:
    folder = build_run()
    code = (
        "import sys\n"
        "from eaftflow.cli import main\n"
        f"main(['rescore', '--run', {str(folder)!r}], standalone_mode=False)\n"
        f"main(['query', 'from ranking', '--run', {str(folder)!r}], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'polars', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_metadata_is_plain_json(build_run: BuildRun) -> None:
    path = rescore(build_run(), parameters=Parameters()).ranking.path
    metadata = pq.read_schema(path).metadata
    assert json.loads(metadata[b"eaftflow"])["criterion"] == "eaft_reap"
