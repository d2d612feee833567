"""Capture end to end on tiny random models."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import BuildRun
from tiny import save_model

import eaftflow
from eaftflow import capture as stage
from eaftflow import store
from eaftflow.capture import CaptureOptions, capture, count_regions, resume_capture
from eaftflow.cli import main
from eaftflow.errors import EaftflowError
from eaftflow.store import Run, open_run

ROWS = [
    {"prompt": f"the lamp {n}", "completion": f"stood on the hill and {n} times {n}", "source": s}
    for n in range(60)
    for s in ("lamp", "hill")
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model("gpt_oss", tmp_path / "model")
    return tmp_path / "model"


def read(run: Run, table: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in run.files(table))


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["capture", *map(str, arguments)])


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_rows_are_what_the_model_did_one_token_before(
    family: str, tmp_path: Path, data: Path
) -> None:
    """The one-token shift: p_t of the target at position + 1, routing at position."""
    model = save_model(family, tmp_path / "model")
    options = CaptureOptions(
        model=str(tmp_path / "model"), data=(str(data),), seq_len=32, batch_tokens=96
    )
    result = capture(options, out=tmp_path / "run")
    tokens, routes = read(result.run, "tokens"), read(result.run, "routes")
    token_NS = read(result.run, "blocks")["token"].to_numpy().reshape(-1, 32).copy()
    assert result.complete
    assert tokens["token_id"].to_pylist() == list(range(result.planned))
    assert routes.num_rows == tokens.num_rows * 2 * 2

    scored: dict[int, list[Any]] = {}
    routers = [
        layer.mlp.router if family == "gpt_oss" else layer.mlp.gate for layer in model.model.layers
    ]
    for layer, router in enumerate(routers):
        router.register_forward_hook(lambda _m, _a, out, layer=layer: scored.update({layer: out}))
    slots = routes["expert"].to_numpy().reshape(2, -1, 2)  # layer, token, slot
    g = routes["g"].to_numpy().reshape(2, -1, 2)
    for index in random.Random(0).sample(range(tokens.num_rows), 12):
        token = tokens.slice(index, 1).to_pylist()[0]
        block, position = token["block"], token["position"]
        with torch.no_grad():  # a batch of one block, cut right after the predicting position
            ids = torch.from_numpy(token_NS[block : block + 1, : position + 1]).long()
            logits = model(ids).logits[0, -1].double()
        assert token["target"] == token_NS[block, position + 1]
        assert token["p_t"] == pytest.approx(
            torch.softmax(logits, -1)[token["target"]].item(), rel=1e-4
        )
        assert token["top_token"] == logits.argmax().item()
        for layer in (0, 1):
            _, g_TK, expert_TK = scored[layer]
            assert slots[layer, index].tolist() == expert_TK[-1].tolist()
            assert g[layer, index] == pytest.approx(g_TK[-1].numpy(), rel=1e-4)


def test_only_completions_are_scored_and_rows_keep_their_names(
    tmp_path: Path, data: Path, model: Path
) -> None:
    options = CaptureOptions(model=str(model), data=(f"lamps={data}",), seq_len=64)
    run = capture(options, out=tmp_path / "run").run
    tokens = read(run, "tokens").to_pylist()
    vocabulary = pq.read_table(run.path / "vocab.parquet")["text"].to_pylist()
    texts: dict[int, str] = {}
    for token in tokens:
        assert token["pack"] == "lamps"
        assert token["source"] == ROWS[token["row"]]["source"]
        texts[token["row"]] = texts.get(token["row"], "") + vocabulary[token["target"]]
    for row, text in texts.items():  # nothing but completions, whole but for a block's position 0
        letters = iter(str(ROWS[row]["completion"]))
        assert all(letter in letters for letter in text)
    whole = [row for row, text in texts.items() if text == ROWS[row]["completion"]]
    assert len(whole) > len(texts) * 0.6


def test_parts_and_batches_do_not_change_the_rows(tmp_path: Path, data: Path, model: Path) -> None:
    base = {"model": str(model), "data": (str(data),), "seq_len": 32}
    one = capture(CaptureOptions(**base), out=tmp_path / "one").run
    many = capture(CaptureOptions(**base, part_tokens=50), out=tmp_path / "many").run
    assert (len(one.parts), len(many.parts)) == (1, 1)  # one batch holds it all
    many = capture(
        CaptureOptions(**base, part_tokens=50, batch_tokens=64), out=tmp_path / "more"
    ).run
    assert len(many.parts) > 5
    assert read(one, "blocks").equals(read(many, "blocks"))
    exact = ["token_id", "pack", "source", "row", "block", "position", "target"]
    assert read(one, "tokens").select(exact).equals(read(many, "tokens").select(exact))
    p_one, p_many = (read(run, "tokens")["p_t"].to_numpy() for run in (one, many))
    np.testing.assert_allclose(p_one, p_many, rtol=1e-4)


def test_killed_at_random_moments_and_resumed_has_the_same_rows(
    tmp_path: Path, data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--data", data, "--seq-len", 32, "--batch-tokens", 32, "--part-tokens", 40]
    assert invoke(model, *options, "--out", tmp_path / "whole").exit_code == 0
    whole, killed, kills = open_run(tmp_path / "whole"), tmp_path / "killed", 0
    write_table = store._write_table

    def write_slowly(*arguments: Any) -> Any:  # so that kills land between and within the files
        time.sleep(0.01)
        written = write_table(*arguments)
        time.sleep(0.01)
        return written

    monkeypatch.setattr(store, "_write_table", write_slowly)
    rng = random.Random(0)
    for _ in range(200):
        resume = ["--resume"] if (killed / store.MANIFEST).exists() else []
        child = multiprocessing.get_context("fork").Process(
            target=invoke, args=(model, *options, "--out", killed, *resume)
        )
        child.start()
        child.join(rng.uniform(0.1, 1.2))
        if child.exitcode is None:
            os.kill(child.pid or 0, signal.SIGKILL)
            kills += 1
        child.join()
        if (killed / store.SUMMARY).exists():
            break
    resumed = open_run(killed)
    assert kills >= 3
    assert resumed.complete
    for table in ("tokens", "routes", "blocks"):
        assert read(whole, table).combine_chunks().equals(read(resumed, table).combine_chunks())
    committed = {file for table in store.PART_TABLES for file in resumed.files(table)}
    assert {file for file in killed.rglob("part-*") if file.suffix != ".json"} == committed


def test_ctrl_c_saves_what_was_scored(
    tmp_path: Path, data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CaptureOptions(model=str(model), data=(str(data),), seq_len=32, batch_tokens=32)
    batches = stage.score_batches

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        for number, batch in enumerate(batches(*args, **kwargs)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(stage, "score_batches", interrupted)
    result = capture(options, out=tmp_path / "run")
    assert not result.complete
    assert not result.run.complete
    assert result.run.parts[-1].next_block == 3
    monkeypatch.undo()
    result = resume_capture(tmp_path / "run")
    assert result.complete
    assert result.run.tokens == result.planned
    again = resume_capture(tmp_path / "run")  # nothing left to do
    assert (again.complete, again.scored) == (True, 0)


def test_summary_tells_what_was_kept_dropped_and_where_it_lies(
    tmp_path: Path, data: Path, model: Path
) -> None:
    result = invoke(model, "--data", data, "--seq-len", 64, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    for expected in ("dropped", "kept", "conflict (", "bytes a record", "eaftflow rescore"):
        assert expected in result.output
    assert str(tmp_path / "run") in result.output


def test_needs_neither_duckdb_nor_polars(tmp_path: Path, data: Path, model: Path) -> None:
    code = (
        "import sys; sys.modules['duckdb'] = sys.modules['polars'] = None\n"
        "from eaftflow.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "capture", str(model), "--data", str(data)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run"), "--seq-len", "64"], check=False
    )
    assert done.returncode == 0


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at-all"], "neither a local folder nor to be had"),
        (["EMPTY"], "has no config.json"),
        (["MODEL", "--data", "missing.jsonl"], "missing.jsonl does not exist"),
        (["MODEL", "--data", "BROKEN"], "broken.jsonl, line 2 is not valid JSON"),
        (["MODEL", "--data", "STRANGE"], "has the columns answer, question"),
        (["MODEL", "--data", "MUTE"], "No completion tokens in 30 rows"),
        (["MODEL", "--data", "DATA", "--seq-len", "4096"], "more than the model's 256 positions"),
        (["MODEL", "--data", "DATA", "--seq-len", "1"], "seq_len=1 is too small"),
        (["MODEL", "--data", "DATA", "--tokens", "0"], "tokens=0 is too small"),
        (["MODEL", "--data", "DATA", "--entropy-top-k", "1"], "entropy_top_k=1"),
        (["MODEL", "--data", "DATA", "--dtype", "int8"], "dtype=int8 is unknown"),
        (
            ["MODEL", "--data", "DATA", "--device", "toaster"],
            "device=toaster cannot be used on this machine",
        ),
        (["MODEL", "--data", "DATA", "--device", "meta"], "device=meta holds no values"),
        (["MODEL", "--data", "DATA", "--out", "FULL"], "is not empty: it holds thesis.txt"),
        (["MODEL", "--data", "DATA", "--out", "FULL", "--resume"], "is not a run"),
        (["DENSE", "--data", "DATA"], "has no experts module"),
        (["MODEL", "--data", "DATA", "--revision", "main"], "is a local folder. Leave it out"),
        (["MODEL", "--data", ""], "holds no path"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    data: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    places = {"MODEL": model, "DATA": data, "EMPTY": tmp_path / "empty", "FULL": tmp_path / "full"}
    places["EMPTY"].mkdir()
    places["FULL"].mkdir()
    (places["FULL"] / "thesis.txt").write_text("mine")
    if "DENSE" in arguments:
        places["DENSE"] = tmp_path / "dense"
        save_model("qwen3", places["DENSE"])
    for name, text in {
        "BROKEN": '{"text": "fine"}\n{"text": \n',
        "STRANGE": '{"question": "q", "answer": "a"}\n',
        "MUTE": '{"prompt": "p", "completion": ""}\n' * 30,
    }.items():
        places[name] = tmp_path / f"{name.lower()}.jsonl"
        places[name].write_text(text)
    result = invoke(*[places.get(argument, argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert message in result.output.replace("\n", " ")
    assert result.output.startswith("Error: ")
    assert result.output.count("\n") == 1
    assert (places["FULL"] / "thesis.txt").read_text() == "mine"


def test_a_second_capture_into_one_folder_is_refused(
    tmp_path: Path, data: Path, model: Path
) -> None:
    options = [model, "--data", data, "--seq-len", 64, "--out", tmp_path / "run"]
    assert invoke(*options).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    again = invoke(*options)
    assert again.exit_code == 2
    assert "already holds a run" in again.output
    other = invoke(*options, "--seed", 3, "--resume")
    assert other.exit_code == 2
    assert "captured with seed=0, now it is 3" in other.output
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {p: t for p, t in after.items() if p.name != ".lock"} == {
        p: t for p, t in before.items() if p.name != ".lock"
    }


def test_values_that_are_not_finite_are_named_and_nothing_is_lost(
    tmp_path: Path, data: Path
) -> None:
    broken = save_model("gpt_oss", tmp_path / "model")
    with torch.no_grad():
        broken.model.layers[1].mlp.experts.down_proj[3] = float("nan")
    broken.save_pretrained(tmp_path / "model")
    options = CaptureOptions(model=str(tmp_path / "model"), data=(str(data),), seq_len=32)
    with pytest.raises(EaftflowError, match=r"values are not finite in .* of blocks 0 to"):
        capture(options, out=tmp_path / "run")


def test_a_checkpoint_that_does_not_fill_the_model_is_refused(tmp_path: Path, data: Path) -> None:
    save_model("qwen3_moe", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    options = CaptureOptions(model=str(tmp_path / "model"), data=(str(data),), seq_len=32)
    with pytest.raises(EaftflowError, match=r"leaves \d+ tensors .* without weights"):
        capture(options, out=tmp_path / "run")


def test_resume_takes_the_options_of_the_run_and_refuses_others(
    tmp_path: Path, data: Path, model: Path
) -> None:
    out = tmp_path / "run"
    options = [model, "--data", data, "--seq-len", 32, "--batch-tokens", 32, "--part-tokens", 200]
    assert invoke(*options, "--out", out).exit_code == 0
    whole = read(open_run(out), "tokens")

    def lose_the_end() -> None:
        (out / store.SUMMARY).unlink()
        for part in open_run(out).parts[2:]:
            (out / "_parts" / f"part-{part.number:06d}.json").unlink()

    lose_the_end()
    assert invoke("--resume", "--out", out).exit_code == 0
    assert read(open_run(out), "tokens").equals(whole)

    lose_the_end()
    moved = tmp_path / "moved"
    moved.mkdir()
    named = f"rows={data.rename(moved / 'other.jsonl')}"
    assert invoke(model, "--data", named, "--resume", "--out", out).exit_code == 0
    assert read(open_run(out), "tokens").equals(whole)

    lose_the_end()
    (moved / "other.jsonl").write_text(json.dumps(ROWS[0]) * 50)
    changed = invoke("--data", named, "--resume", "--out", out)
    assert changed.exit_code == 2
    (moved / "other.jsonl").write_text((json.dumps(ROWS[0]) + "\n") * 99)
    changed = invoke("--data", named, "--resume", "--out", out)
    assert changed.exit_code == 2
    assert "cannot be resumed: file 0 of pack rows is not what was captured" in changed.output


def test_region_counts_are_those_of_the_sql(build_run: BuildRun) -> None:
    run = open_run(build_run(tokens=3_000))
    with eaftflow.connect(run.path) as con:
        rows = con.execute("select region::varchar, count(*) from regions group by 1").fetchall()
    assert count_regions(run) == {"good": 0, "uncertain": 0, "conflict": 0, **dict(rows)}
