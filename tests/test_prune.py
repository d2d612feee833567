"""Prune against the masked original, for every family in the table; and every way it can fail."""

import errno
import hashlib
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from eaftflow import prune
from eaftflow.architectures import ARCHITECTURES
from eaftflow.checkpoint import CONFIG, INDEX, SINGLE, fingerprint, read_checkpoint
from eaftflow.cli import main
from eaftflow.errors import EaftflowError
from eaftflow.prune import PruneOptions, choose_keep_n, plan_prune, write_pruned
from eaftflow.rankings import PARAMETERS, parts_hash, read_ranking, write_ranking
from eaftflow.schemas import FORMAT_VERSION, RANKING
from eaftflow.store import MANIFEST, open_run, write_json

EXPERTS, TOP_K = 8, 2

_SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROUTED = {"moe_intermediate_size": 16}
_GROUPED = {**_ROUTED, "n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1}
_LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8}
_ROPE = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v3": {**_GROUPED, **_LATENT, **_ROPE, "first_k_dense_replace": 1},
    "glm4_moe": {**_GROUPED, "head_dim": 8, "first_k_dense_replace": 1},
    "gpt_oss": {"num_local_experts": EXPERTS, "head_dim": 8},
    "granitemoe": {"num_local_experts": EXPERTS},
    "mixtral": {"num_local_experts": EXPERTS},
    "olmoe": {"num_experts": EXPERTS},
    "qwen2_moe": {**_ROUTED, "num_experts": EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**_ROUTED, "num_experts": EXPERTS, "head_dim": 8, "norm_topk_prob": True},
}


class Workplace(NamedTuple):
    """A tiny model, and a run with one ranking of it, in the current folder."""

    model: Path
    run: Path
    ranking: Path
    kept: dict[int, list[int]]  # at six of eight experts


def build_model(folder: Path, family: str, *, max_shard_size: str = "1GB", **changes: Any) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**_SHAPE, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "router" in name or "gate.e_score" in name:
                tensor.normal_(std=0.3)  # zero biases would prove nothing
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer.json").write_text('{"of": "no consequence"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def build_ranking(model: Path, run: Path, *, layers: list[int], seed: int = 0) -> Path:
    """Write a manifest and a ranking in random order into `run`."""
    identity = {
        "name": "org/tiny",
        "path": str(model),
        "revision": None,
        "fingerprint": fingerprint(model),
    }
    run.mkdir(parents=True, exist_ok=True)
    manifest = {
        "format_version": FORMAT_VERSION,
        "created_at": f"2026-01-01T00:00:{seed:02d}+00:00",
        "model": identity,
    }
    write_json(run / MANIFEST, manifest)
    rng = random.Random(seed)
    rows = []
    for layer in layers:
        order = rng.sample(range(EXPERTS), EXPERTS)
        rows += [(layer, expert, rank, 1.0 / (1 + rank)) for rank, expert in enumerate(order)]
    names = ("layer", "expert", "rank", "saliency")
    columns: dict[str, Any] = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    columns |= dict.fromkeys(("n", "n_good", "n_uncertain", "n_conflict"), [1] * len(rows))
    parameters = {
        **{name: None for name in PARAMETERS if "." not in name},
        "criterion": "eaft_reap",
        "run": {
            "format_version": FORMAT_VERSION,
            "model": identity,
            "parts_sha256": parts_hash(open_run(run)),
            "tokens": 0,
            "complete": True,
        },
    }
    path = run / "rankings" / "eaft_reap.parquet"
    table = pa.table(columns).cast(RANKING)
    return write_ranking(path, table, parameters=parameters, newest=True).path


def add_part(run: Path, *, tokens: int) -> None:
    """Commit an empty part that claims so many tokens."""
    (run / "_parts").mkdir(exist_ok=True)
    empty = {"path": MANIFEST, "rows": 0, "bytes": (run / MANIFEST).stat().st_size, "sha256": "0"}
    part = {
        "number": 0,
        "first_token": 0,
        "next_token": tokens,
        "first_block": 0,
        "next_block": 1,
        "files": {"tokens": empty},
    }
    write_json(run / "_parts" / "part-000000.json", part)


def build_workplace(folder: Path, family: str, *, seed: int = 0, **options: Any) -> Workplace:
    model = build_model(folder / "tiny", family, **options)
    layers = moe_layers(model)
    ranking = build_ranking(model, folder / "runs" / "one", layers=layers, seed=seed)
    rng = random.Random(seed)
    kept = {layer: sorted(rng.sample(range(EXPERTS), EXPERTS)[:6]) for layer in layers}
    assert len({tuple(experts) for experts in kept.values()}) > 1, "layers must differ"
    return Workplace(model, folder / "runs" / "one", ranking, kept)


def moe_layers(model: Path) -> list[int]:
    checkpoint = read_checkpoint(model)
    architecture = ARCHITECTURES[checkpoint.config["model_type"]]
    places = (
        architecture.locate(tensor.name) for shard in checkpoint.shards for tensor in shard.tensors
    )
    return sorted({place.layer for place in places if place is not None})


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> Iterator[Workplace]:
    """A qwen3_moe model and its run; whatever a test does, the model stays as it was."""
    model = shutil.copytree(tiny, tmp_path / "tiny")
    ranking = build_ranking(model, tmp_path / "runs" / "one", layers=[0, 1, 2])
    monkeypatch.chdir(tmp_path)
    yield Workplace(model, tmp_path / "runs" / "one", ranking, {})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny", "qwen3_moe")


def load(folder: Path) -> Any:
    """The model by stock transformers, every key accounted for."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


class MaskedRouters(TorchFunctionMode):
    """Sets dropped experts' router logits to -inf, at the product that makes them."""

    def __init__(self, model: Any, kept: Mapping[int, list[int]]) -> None:
        super().__init__()
        self.dropped = {}
        self.calls = 0
        parameters = dict(model.named_parameters())
        for layer, experts in kept.items():
            block = f"model.layers.{layer}."
            (weight,) = (
                tensor
                for name, tensor in parameters.items()
                if name.startswith(block)
                and name.endswith((".gate.weight", ".router.weight"))
                and tensor.shape[0] == EXPERTS
            )
            mask_E = torch.ones(EXPERTS, dtype=torch.bool)
            mask_E[experts] = False
            self.dropped[weight.data_ptr()] = mask_E
            for name, tensor in model.named_buffers():
                if name.startswith(block) and name.endswith("e_score_correction_bias"):
                    tensor[mask_E] = -torch.inf  # the sigmoid of -inf is 0, and would leave b

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            mask_E = self.dropped.get(args[1].data_ptr())
            if mask_E is not None:
                self.calls += 1
                return out.masked_fill(mask_E, -torch.inf)
        return out


def masked_logits(folder: Path, kept: Mapping[int, list[int]], tokens: torch.Tensor) -> Any:
    model = load(folder)
    with torch.no_grad(), MaskedRouters(model, kept) as masks:
        logits_BTV = model(tokens).logits
    assert masks.calls == len(kept), "every router was masked, once"
    return logits_BTV


def logits(folder: Path, tokens: torch.Tensor) -> Any:
    with torch.no_grad():
        return load(folder)(tokens).logits


TOKENS = torch.arange(2 * 24).reshape(2, 24) * 7 % 61 + 3


def run_prune(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["prune", *arguments])


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- what it computes ------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_pruned_logits_equal_masked_logits(
    tmp_path: Path, family: str, max_shard_size: str
) -> None:
    workplace = build_workplace(tmp_path, family, max_shard_size=max_shard_size)
    before = contents(workplace.model)
    assert (INDEX in before) == (max_shard_size == "20KB")
    plan = plan_prune(PruneOptions(ranking=workplace.ranking, out=tmp_path / "pruned"))
    out = write_pruned(plan)
    assert {layer: list(experts) for layer, experts in plan.kept.items()} == workplace.kept
    assert contents(workplace.model) == before
    expected_BTV = masked_logits(workplace.model, workplace.kept, TOKENS)
    torch.testing.assert_close(logits(out, TOKENS), expected_BTV, rtol=1e-5, atol=1e-5)
    assert (logits(workplace.model, TOKENS) - expected_BTV).abs().max() > 1e-2, "no-op mask"
    assert sum(path.stat().st_size for path in out.glob("*.safetensors")) == plan.bytes_after


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_random_kept_sets(tmp_path: Path, family: str, seed: int) -> None:
    keep_n = 2 + seed
    workplace = build_workplace(tmp_path, family, seed=seed)
    plan = plan_prune(
        PruneOptions(ranking=workplace.ranking, keep_n=keep_n, out=tmp_path / "pruned")
    )
    kept = {layer: list(experts) for layer, experts in plan.kept.items()}
    expected_BTV = masked_logits(workplace.model, kept, TOKENS)
    actual_BTV = logits(write_pruned(plan), TOKENS)
    torch.testing.assert_close(actual_BTV, expected_BTV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_keeping_all_experts_is_the_identity(
    tmp_path: Path, family: str, max_shard_size: str
) -> None:
    workplace = build_workplace(tmp_path, family, max_shard_size=max_shard_size)
    options = PruneOptions(ranking=workplace.ranking, keep_frac=1.0, out=tmp_path / "pruned")
    after = contents(write_pruned(plan_prune(options)))
    assert after.pop("eaftflow.json")
    assert after == contents(workplace.model)


def test_pruning_twice_equals_pruning_once(tmp_path: Path) -> None:
    """Half of the experts in one step, or three quarters and then two thirds of those."""
    workplace = build_workplace(tmp_path, "gpt_oss")
    once = plan_prune(PruneOptions(ranking=workplace.ranking, keep_n=4, out=tmp_path / "once"))
    first = plan_prune(PruneOptions(ranking=workplace.ranking, keep_n=6, out=tmp_path / "first"))
    write_pruned(once)
    write_pruned(first)
    record = json.loads((tmp_path / "first" / "eaftflow.json").read_text())
    for layer, kept in first.kept.items():
        weight = load_file(tmp_path / "once" / SINGLE)[f"model.layers.{layer}.mlp.router.weight"]
        of_first = load_file(tmp_path / "first" / SINGLE)[f"model.layers.{layer}.mlp.router.weight"]
        rows = [record["kept"][str(layer)].index(expert) for expert in once.kept[layer]]
        assert torch.equal(weight, of_first[rows])
        assert set(once.kept[layer]) <= set(kept)


def test_pruning_the_pruned_leads_back_to_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace = build_workplace(tmp_path, "qwen3_moe")
    monkeypatch.chdir(tmp_path)
    first = plan_prune(PruneOptions(ranking=workplace.ranking, keep_frac=1, out=Path("first")))
    assert first.record["parent"] is None
    assert "pruned before" not in prune.describe(first)
    write_pruned(first)
    again = build_ranking(Path("first"), Path("runs/two"), layers=[0, 1, 2], seed=5)
    second = plan_prune(PruneOptions(ranking=again, keep_n=3, out=Path("second")))
    assert "first was pruned before: expert indices are its own" in prune.describe(second)
    record = json.loads((write_pruned(second) / "eaftflow.json").read_text())
    assert record["parent"] == json.loads(Path("first/eaftflow.json").read_text())
    original, pruned = load_file(workplace.model / SINGLE), load_file(Path("second") / SINGLE)
    for layer, experts in record["kept"].items():
        rows = [record["parent"]["kept"][layer][expert] for expert in experts]
        name = f"model.layers.{layer}.mlp.gate.weight"
        assert torch.equal(pruned[name], original[name][rows])


def test_mxfp4_is_sliced_without_a_value_decoded(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    model.mkdir()
    config = {
        "model_type": "gpt_oss",
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "num_hidden_layers": 2,
        "quantization_config": {"quant_method": "mxfp4"},
    }
    (model / CONFIG).write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(8, 4).bfloat16()}
    for layer in (0, 1):
        mlp = f"model.layers.{layer}.mlp"
        for name, tail in (("gate_up_proj", (6, 2, 16)), ("down_proj", (4, 3, 16))):
            for suffix, shape in (("blocks", tail), ("scales", tail[:-1])):
                tensors[f"{mlp}.experts.{name}_{suffix}"] = torch.randint(
                    0, 256, (EXPERTS, *shape), dtype=torch.uint8, generator=generator
                )
            tensors[f"{mlp}.experts.{name}_bias"] = torch.randn(EXPERTS, tail[0]).bfloat16()
        tensors[f"{mlp}.router.weight"] = torch.randn(EXPERTS, 4).bfloat16()
        tensors[f"{mlp}.router.bias"] = torch.randn(EXPERTS).bfloat16()
    save_file(tensors, model / SINGLE, metadata={"format": "pt"})
    ranking = build_ranking(model, tmp_path / "runs" / "one", layers=[0, 1])
    plan = plan_prune(PruneOptions(ranking=ranking, keep_n=3, out=tmp_path / "pruned"))
    pruned = load_file(write_pruned(plan) / SINGLE)
    for name, tensor in tensors.items():
        rows = slice(None) if "layers" not in name else list(plan.kept[int(name.split(".")[2])])
        assert pruned[name].dtype == tensor.dtype
        assert torch.equal(pruned[name], tensor[rows]), name


def test_shard_left_without_tensors_is_not_written(tmp_path: Path) -> None:
    """A checkpoint of one tensor a shard: the shards of dropped experts go."""
    model = build_model(tmp_path / "tiny", "mixtral")
    tensors = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    homes = {name: f"model-{number:05d}.safetensors" for number, name in enumerate(tensors)}
    for name, home in homes.items():
        save_file({name: tensors[name]}, model / home, metadata={"format": "pt"})
    parameters = sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_parameters": parameters}, "weight_map": homes}
    (model / INDEX).write_text(json.dumps(index))
    ranking = build_ranking(model, tmp_path / "runs" / "one", layers=[0, 1, 2])
    plan = plan_prune(PruneOptions(ranking=ranking, out=tmp_path / "pruned"))
    assert len(plan.pieces) == len(tensors) - 3 * 3 * 2  # layers, tensors an expert, dropped
    out = write_pruned(plan)
    index = json.loads((out / INDEX).read_text())
    assert set(index["weight_map"].values()) == {path.name for path in out.glob("*.safetensors")}
    stored = [tensor for path in out.glob("*.safetensors") for tensor in load_file(path).values()]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored)
    assert index["metadata"]["total_parameters"] == load(out).num_parameters()


# --- the command -----------------------------------------------------------------------------


def test_prune_without_arguments(workplace: Workplace) -> None:
    result = run_prune()
    assert result.exit_code == 0, result.output
    out = Path("pruned/tiny-keep6-eaft_reap")
    assert f"Wrote {out}" in result.output
    assert "keep     6 of 8 experts per layer" in result.output
    assert "eaft_reap.parquet (eaft_reap, 0 tokens)\n" in result.output
    assert result.stderr == ""
    assert "writing" not in result.output, "a progress bar is for terminals"
    before = (workplace.model / CONFIG).read_text()
    assert (out / CONFIG).read_text() == before.replace(
        '"num_local_experts": 8', '"num_local_experts": 6'
    )
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    record = json.loads((out / "eaftflow.json").read_text())
    assert record["keep_n"] == 6
    assert {len(kept) for kept in record["kept"].values()} == {6}
    assert record["model"]["fingerprint"] == fingerprint(workplace.model)
    assert record["ranking"]["parameters"]["criterion"] == "eaft_reap"
    assert not list(Path("pruned").glob("*.partial"))


@pytest.mark.usefixtures("workplace")
def test_the_printed_command_works(capsys: pytest.CaptureFixture[str]) -> None:
    python, option, code = shlex.split(run_prune().output.splitlines()[-1])
    assert (python, option) == ("python", "-c")
    exec(code)
    assert "Qwen3MoeForCausalLM" in capsys.readouterr().out


@pytest.mark.usefixtures("workplace")
def test_dry_run_prints_the_plan_and_writes_nothing() -> None:
    result = run_prune("--dry-run", "--keep-n", "7")
    assert result.exit_code == 0, result.output
    plan = plan_prune(PruneOptions(keep_n=7))
    for layer, kept in plan.kept.items():
        (dropped,) = set(range(EXPERTS)) - set(kept)
        assert f"    {layer}  {dropped}\n" in result.output
    assert not Path("pruned").exists()


@pytest.mark.parametrize("run", [(), ("--run", "runs/one")])
def test_rankings_by_name_and_by_path(workplace: Workplace, run: tuple[str, ...]) -> None:
    other = workplace.ranking.with_name("eaft_reap,w_conflict=-0.5.parquet")
    shutil.copyfile(workplace.ranking, other)
    result = run_prune(*run, "--ranking", "eaft_reap,w_conflict=-0.5")
    assert result.exit_code == 0, result.output
    assert Path("pruned/tiny-keep6-eaft_reap,w_conflict=-0.5").is_dir()
    assert run_prune("--ranking", str(workplace.ranking), "--out", "new").exit_code == 0
    listed = run_prune(*run, "--ranking", other.name, "--out", "listed")
    assert listed.exit_code == 0, listed.output
    shutil.copyfile(workplace.ranking, "mine.parquet")
    assert run_prune(*run, "--ranking", "mine.parquet", "--out", "mine").exit_code == 0


@pytest.mark.parametrize("named", [(), ("--run", "runs/one", "--ranking", "mine.parquet")])
def test_a_ranking_that_its_run_has_outgrown_warns(
    workplace: Workplace, named: tuple[str, ...]
) -> None:
    shutil.copyfile(workplace.ranking, "mine.parquet")
    add_part(workplace.run, tokens=1234)
    result = run_prune("--dry-run", *named)
    assert result.exit_code == 0, result.output
    assert "made from 0 tokens, but" in result.stderr
    assert "runs/one now holds 1,234. `eaftflow rescore --run" in result.stderr
    add_part(workplace.run, tokens=0)
    assert "now holds 0 others." in run_prune("--dry-run", *named).stderr
    assert run_prune("--dry-run", "--ranking", "./mine.parquet").stderr == "", "run unknown"


def test_a_damaged_run_does_not_stop_its_ranking(workplace: Workplace) -> None:
    add_part(workplace.run, tokens=5)
    with (workplace.run / MANIFEST).open("a") as file:
        file.write("\n")
    result = run_prune("--dry-run")
    assert result.exit_code == 0, result.output
    assert "Warning: " in result.stderr
    assert "cannot be compared with its run. Part file" in result.stderr


def test_a_ranking_of_an_incomplete_run_says_so(workplace: Workplace) -> None:
    ranking = read_ranking(workplace.ranking)
    scored = {**ranking.parameters["run"], "tokens": 5000, "complete": False}
    parameters = {**ranking.parameters, "run": scored}
    write_ranking(workplace.ranking, ranking.table, parameters=parameters)
    assert "(eaft_reap, 5,000 tokens, incomplete run)\n" in run_prune("--dry-run").output


@pytest.mark.usefixtures("workplace")
def test_duckdb_and_torch_stay_out() -> None:
    code = (
        "import sys\n"
        "from eaftflow.cli import main\n"
        "main(['prune', '--dry-run'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'polars', 'duckdb'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_commands_are_listed_in_the_order_of_use() -> None:
    text = CliRunner().invoke(main, ["--help"]).output.partition("Commands:")[2]
    assert [line.split()[0] for line in text.splitlines() if line.startswith("  ")] == [
        *("capture", "rescore", "query", "prune")
    ]


@pytest.mark.parametrize("command", ["rescore", "query", "prune"])
def test_help_writes_defaults_in_one_style(command: str) -> None:
    text = " ".join(CliRunner().invoke(main, [command, "--help"]).output.split())
    assert re.findall(r"\[(?!default: )[a-z]", text) == []
    assert "[default: the newest in runs/]" in text


def test_both_names_of_the_expert_count_change(workplace: Workplace) -> None:
    path = workplace.model / CONFIG
    text = path.read_text().replace("{", '{\n  "num_experts": 8,', 1)
    path.write_text(text)
    build_ranking(workplace.model, workplace.run, layers=[0, 1, 2])
    assert run_prune("--out", "new").exit_code == 0
    assert Path("new", CONFIG).read_text() == text.replace('experts": 8', 'experts": 6')


def test_other_files_are_carried_over_and_other_weights_are_not(workplace: Workplace) -> None:
    model = workplace.model
    for name in ("assets/notes.txt", "original/params.json", "original/model.bin", ".git/HEAD"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("x")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors"):
        (model / name).write_text("x")
    result = run_prune("--out", "new")
    left = (
        ".git, consolidated.safetensors, original, pytorch_model.bin, pytorch_model.bin.index.json"
    )
    assert f"not carried over: {left}\n" in result.output
    own = {CONFIG, SINGLE, "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    assert set(contents(Path("new"))) == {*own, "assets/notes.txt", "eaftflow.json"}


def test_links_of_the_hub_cache_are_followed(workplace: Workplace) -> None:
    blobs = workplace.model.with_name("blobs")
    workplace.model.rename(blobs)
    workplace.model.mkdir()
    for path in blobs.iterdir():
        (workplace.model / path.name).symlink_to(path)
    assert run_prune("--out", "new").exit_code == 0
    assert not any(path.is_symlink() for path in Path("new").iterdir())


@pytest.mark.usefixtures("workplace")
def test_a_partial_folder_of_a_killed_run_is_replaced() -> None:
    partial = Path("new.partial")
    (partial / "nested").mkdir(parents=True)
    (partial / ".eaftflow-partial").touch()
    (partial / "nested" / "half").write_text("x")
    (partial / "nested" / ".lock").write_text("of a carried folder")
    (partial / SINGLE).write_text("half a model")
    assert run_prune("--out", "new").exit_code == 0
    assert "nested/half" not in contents(Path("new"))
    assert not partial.exists()
    assert load(Path("new"))


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("name", ["thesis.txt", ".lock"])
def test_a_partial_folder_of_the_users_is_left_alone(name: str) -> None:
    plan = plan_prune(PruneOptions(out=Path("new")))
    mine = Path("new.partial", name)
    mine.parent.mkdir()
    mine.write_text("mine")
    for result in (run_prune("--out", "new"), run_prune("--out", "new", "--dry-run")):
        assert result.exit_code == 2
        assert "new.partial, where the new checkpoint would be prepared, exists" in result.output
    with pytest.raises(EaftflowError, match="Move it away, or choose another --out"):
        write_pruned(plan)
    assert mine.read_text() == "mine"
    assert not Path("new").exists()


@pytest.mark.usefixtures("workplace")
def test_a_killed_process_leaves_nothing_under_the_final_name() -> None:
    script = (
        "import os, signal\n"
        "from eaftflow import prune\n"
        "prune.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "prune.write_pruned(prune.plan_prune(prune.PruneOptions(out=prune.Path('new'))))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], check=False)
    assert run.returncode == -9
    assert not Path("new").exists()
    assert Path("new.partial").exists()
    assert run_prune("--out", "new").exit_code == 0
    assert load(Path("new"))


# --- how many ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "experts", "keep_n"),
    [
        ({}, 32, 24),
        ({"keep_frac": 0.5}, 31, 15),
        ({"keep_frac": 0.29}, 100, 29),  # 28.999999999999996 in doubles
        ({"keep_frac": 1.0}, 7, 7),
        ({"keep_frac": 0.5, "keep_multiple": 4}, 36, 20),
        ({"keep_n": 17}, 32, 17),
        ({"keep_n": 17, "keep_multiple": 4}, 32, 20),
    ],
)
def test_rounding(options: dict[str, Any], experts: int, keep_n: int) -> None:
    assert choose_keep_n(PruneOptions(**options), experts=experts, top_k=2) == keep_n


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"keep_frac": 0.05},
            "keep_frac=0.05 keeps 6 of 128 experts per layer, but the router picks top_k=8. "
            "Use --keep-frac 0.0625 or more.",
        ),
        (
            {"keep_n": 7},
            "keep_n=7 keeps 7 of 128 experts per layer, but the router picks top_k=8. "
            "Use --keep-n 8 or more.",
        ),
        (
            {"keep_n": 127, "keep_multiple": 10},
            "keep_n=127 with keep_multiple=10 asks for 130 experts per layer, but the model has "
            "128. Use --keep-n 120 or less.",
        ),
        ({"keep_frac": 0.0}, "keep_frac=0.0 is not a share. Use one above 0 and up to 1."),
        (
            {"keep_frac": float("nan")},
            "keep_frac=nan is not a share. Use one above 0 and up to 1.",
        ),
        (
            {"keep_frac": 0.5, "keep_n": 4},
            "--keep-frac and --keep-n exclude each other. Give one of them.",
        ),
        ({"keep_multiple": 0}, "--keep-multiple 0 must be 1 or more."),
        (
            {"keep_multiple": 129},
            "keep_multiple=129 exceeds the 128 experts of a layer. Use a smaller --keep-multiple.",
        ),
    ],
)
def test_impossible_numbers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EaftflowError) as raised:
        choose_keep_n(PruneOptions(**options), experts=128, top_k=8)
    assert str(raised.value) == message


def test_a_multiple_that_fits_no_count() -> None:
    with pytest.raises(EaftflowError, match="keep_multiple=5 has no multiple from top_k=6 up to"):
        choose_keep_n(PruneOptions(keep_multiple=5), experts=8, top_k=6)


@pytest.mark.parametrize("experts", [7, 60, 128, 160])
def test_the_suggested_share_suffices(experts: int) -> None:
    with pytest.raises(EaftflowError) as raised:
        choose_keep_n(PruneOptions(keep_frac=0.001), experts=experts, top_k=6)
    share = float(str(raised.value).split("--keep-frac ")[1].split()[0])
    assert choose_keep_n(PruneOptions(keep_frac=share), experts=experts, top_k=6) == 6


# --- bad input -------------------------------------------------------------------------------


def refused(*arguments: str, out: Path = Path("new")) -> str:
    """The one message of a refused prune that wrote nothing."""
    before = contents(Path("tiny"))
    result = run_prune("--out", str(out), *arguments)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("Error: ")
    assert result.output.count("\n") == 1
    assert contents(Path("tiny")) == before
    assert not list(Path.cwd().glob("new*"))
    return result.output


def edit_config(workplace: Workplace, **changes: Any) -> None:
    """Change the config, and rank the changed model."""
    config = json.loads((workplace.model / CONFIG).read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value != "absent"}
    (workplace.model / CONFIG).write_text(json.dumps(config))
    build_ranking(workplace.model, workplace.run, layers=[0, 1, 2])


def edit_tensors(workplace: Workplace, changes: Mapping[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove tensors, and rank the changed model."""
    tensors = {**load_file(workplace.model / SINGLE), **changes}
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        workplace.model / SINGLE,
        metadata={"format": "pt"},
    )
    build_ranking(workplace.model, workplace.run, layers=[0, 1, 2])


@pytest.mark.usefixtures("workplace")
class TestRefusals:
    """Everything that is checked before a byte is written."""

    def test_fewer_than_top_k(self) -> None:
        assert "Use --keep-frac 0.25 or more." in refused("--keep-frac", "0.2")

    def test_more_than_there_are(self) -> None:
        assert "Use --keep-n 8 or less." in refused("--keep-n", "9")

    def test_both_ways_to_say_how_many(self) -> None:
        assert "exclude each other" in refused("--keep-n", "4", "--keep-frac", "0.5")

    def test_unknown_family(self, workplace: Workplace) -> None:
        edit_config(workplace, model_type="jetmoe")
        assert "jetmoe cannot be pruned yet. Supported: deepseek_v3, glm4_moe" in refused()

    def test_no_run(self) -> None:
        shutil.rmtree("runs")
        assert "Run `eaftflow capture` first" in refused()

    def test_no_ranking(self) -> None:
        shutil.rmtree("runs/one/rankings")
        assert "has no ranking yet" in refused()

    def test_ranking_without_parameters(self, workplace: Workplace) -> None:
        table = pq.read_table(workplace.ranking).replace_schema_metadata({"eaftflow": "{}"})
        pq.write_table(table, workplace.ranking)
        assert "lacks criterion among its parameters" in refused()

    def test_missing_ranking(self) -> None:
        assert "nowhere.parquet does not exist" in refused("--ranking", "nowhere.parquet")

    def test_missing_model(self, workplace: Workplace) -> None:
        assert "The model folder nowhere does not exist" in refused("nowhere")
        workplace.model.rename("moved")
        Path("tiny").mkdir(exist_ok=True)
        Path("tiny").rmdir()
        result = run_prune("--out", "new")
        assert result.exit_code == 2
        assert "where org/tiny was captured from, does not exist" in result.output
        assert run_prune("moved", "--out", "new").exit_code == 0

    def test_ranking_of_another_model(self, workplace: Workplace) -> None:
        other = build_model(Path("other"), "qwen3_moe", initializer_range=0.1)
        message = refused(str(other))
        assert fingerprint(workplace.model)[:12] in message
        assert fingerprint(other)[:12] in message
        assert "org/tiny" in message

    def test_ranking_with_fewer_layers(self, workplace: Workplace) -> None:
        build_ranking(workplace.model, workplace.run, layers=[0, 2])
        assert "each of the layers 0, 2, but" in refused()

    def test_config_without_expert_count(self, workplace: Workplace) -> None:
        edit_config(workplace, num_local_experts="absent")
        assert "has none of num_experts, num_local_experts" in refused()

    def test_config_that_contradicts_itself(self, workplace: Workplace) -> None:
        edit_config(workplace, num_experts=7)
        assert "contradicts itself" in refused()

    def test_config_with_another_expert_count(self, workplace: Workplace) -> None:
        edit_config(workplace, num_local_experts=7)
        assert "counts 7 experts" in refused()

    def test_group_limited_routing(self) -> None:
        shutil.rmtree("tiny")
        model = build_model(Path("tiny"), "deepseek_v3", n_group=2)
        build_ranking(model, Path("runs/one"), layers=[1, 2])
        assert "within 2 groups of experts (n_group)" in refused()

    def test_missing_router(self, workplace: Workplace) -> None:
        edit_tensors(workplace, {"model.layers.1.mlp.gate.weight": None})
        assert "no tensor model.layers.1.mlp.gate.weight, although" in refused()

    def test_missing_expert_tensor(self, workplace: Workplace) -> None:
        edit_tensors(workplace, {"model.layers.1.mlp.experts.3.up_proj.weight": None})
        assert "2 tensors of expert 3 in layer 1, and 3 of others" in refused()

    def test_router_with_other_rows(self, workplace: Workplace) -> None:
        edit_tensors(workplace, {"model.layers.1.mlp.gate.weight": torch.zeros(9, 32)})
        assert "has the shape [9, 32] (F32); expected 8 rows" in refused()

    def test_expert_beyond_the_count(self, workplace: Workplace) -> None:
        edit_tensors(workplace, {"model.layers.1.mlp.experts.8.up_proj.weight": torch.zeros(2)})
        assert "is of expert 8, but the config counts 8 experts" in refused()

    def test_unknown_router_tensor(self, workplace: Workplace) -> None:
        edit_tensors(workplace, {"model.layers.1.mlp.gate.temperature": torch.zeros(8)})
        assert "mlp.gate.temperature, which this eaftflow does not know" in refused()

    def test_multi_token_prediction_layer(self, workplace: Workplace) -> None:
        tensors = load_file(workplace.model / SINGLE)
        copies = {
            name.replace("layers.2.", "layers.3."): tensor.clone()
            for name, tensor in tensors.items()
            if "layers.2." in name
        }
        edit_tensors(workplace, copies)
        assert "in layer 3, beyond its 3 decoder layers" in refused()

    def test_checkpoint_of_another_model_with_the_same_config(self, workplace: Workplace) -> None:
        edit_tensors(workplace, dict.fromkeys(load_file(workplace.model / SINGLE)))
        assert "has no tensor like model.layers.{layer}.mlp.gate.weight" in refused()

    def test_truncated_shard(self, workplace: Workplace) -> None:
        data = (workplace.model / SINGLE).read_bytes()
        (workplace.model / SINGLE).write_bytes(data[:-7])
        assert "is truncated" in refused()

    def test_out_is_the_model(self) -> None:
        for out in ("tiny", "tiny/pruned", "./tiny/../tiny"):
            assert "Choose a folder outside it." in refused(out=Path(out))

    def test_out_exists(self) -> None:
        Path("taken").mkdir()
        assert "taken exists already" in refused(out=Path("taken"))

    def test_out_below_a_file(self) -> None:
        Path("file").write_text("x")
        assert "is no folder that you may write to" in refused(out=Path("file/new"))

    def test_no_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5))
        assert "Make room, or choose another --out." in refused()

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
    def test_file_system_refuses_midway(self, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        def fail(*_: object) -> None:
            raise OSError(code, errno.errorcode[code])

        monkeypatch.setattr(prune, "write_json", fail)
        result = run_prune("--out", "new")
        assert result.exit_code == 2
        assert "Nothing was left there and the original is as it was" in result.output
        assert not list(Path.cwd().glob("new*"))

    def test_interrupted_midway(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(prune, "write_json", interrupt)
        assert run_prune("--out", "new").exit_code != 0
        assert not list(Path.cwd().glob("new*"))
