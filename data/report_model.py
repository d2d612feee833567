"""Measure the bundled model: what it learnt, how its experts specialise, what pruning costs it.

    python data/report_model.py          # writes reports/bundled_model.md; 20 minutes on 2 cores

Every figure is of the held-out packs, pooled and packed as capture packs them, at seq_len 2,048.
Pruned models are real checkpoints, written by `prune` and loaded by stock transformers.
"""

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import torch
import transformers

import eaftflow
from eaftflow.capture import CaptureOptions, capture, score_batches
from eaftflow.models import Snapshot, load_config, load_model, load_tokenizer
from eaftflow.packing import Blocks, find_packs, pack_rows, read_rows
from eaftflow.prune import PruneOptions, plan_prune, write_pruned
from eaftflow.rankings import read_ranking, write_ranking
from eaftflow.relations import Parameters
from eaftflow.rescore import rescore
from eaftflow.schemas import RANKING

HERE = Path(__file__).resolve().parent
MODEL = HERE / "model"
SEQ_LEN = 2048
KEEP_FRACS = (0.9375, 0.875, 0.75, 0.5)
CANDIDATES = {
    "eaft_reap": Parameters(),
    "eaft_reap, w_conflict -20": Parameters(w_conflict=-20.0),
    "eaft_reap_sum": Parameters(criterion="eaft_reap_sum"),
    "eaft_reap_sum, w_conflict -20": Parameters(criterion="eaft_reap_sum", w_conflict=-20.0),
    "reap": Parameters(criterion="reap"),
    "reap_sum": Parameters(criterion="reap_sum"),
    "frequency": Parameters(criterion="frequency"),
}


def pack_heldout(budget: int | None = None) -> Blocks:
    """The held-out packs, pooled and packed, up to `budget` predicted tokens."""
    rows = [row for pack in find_packs([str(HERE / "heldout")]) for row in read_rows(pack)]
    tokenizer = load_tokenizer(_snapshot(MODEL), trust_remote_code=False)
    return pack_rows(rows, tokenizer, seq_len=SEQ_LEN, budget=budget)


def evaluate(folder: Path, blocks: Blocks) -> pl.DataFrame:
    """The pack, p_t, logp and H_t of every predicted token of `blocks` under a checkpoint."""
    snapshot = _snapshot(folder)
    config = load_config(snapshot, trust_remote_code=False)
    model = load_model(snapshot, config, device="cpu", dtype="float32", trust_remote_code=False)
    batches = [batch.tokens for batch in score_batches(model, [], blocks)]
    table = pa.Table.from_batches(batches).select(["pack", "p_t", "logp", "H_t"])
    return pl.DataFrame(pl.from_arrow(table)).with_columns(pl.col("pack").cast(pl.String))


@contextmanager
def pruned(ranking: Path, keep_frac: float) -> Iterator[Path]:
    """The checkpoint that `ranking` leaves at `keep_frac`, for a while."""
    with tempfile.TemporaryDirectory() as scratch:
        options = PruneOptions(ranking=ranking, keep_frac=keep_frac, out=Path(scratch) / "model")
        yield write_pruned(plan_prune(options))


def rank_by_chance(like: Path, seed: int) -> Path:
    """A ranking file with the experts of `like` in random order."""
    ranking = read_ranking(like)
    table = pl.DataFrame(pl.from_arrow(ranking.table)).with_columns(
        rank=pl.int_range(pl.len(), dtype=pl.Int32).shuffle(seed).over("layer")
    )
    table = table.with_columns(saliency=-pl.col("rank").cast(pl.Float64)).sort("layer", "rank")
    parameters = {**ranking.parameters, "criterion": f"random, seed {seed}"}
    path = like.with_name(f"random-{seed}.parquet")
    return write_ranking(path, table.to_arrow().cast(RANKING), parameters=parameters).path


def rank_by_pack(run: Path, pack: str) -> Path:
    """A ranking file by REAP over the tokens of one pack alone."""
    ranking = read_ranking(rescore(run, parameters=Parameters(criterion="reap")).ranking.path)
    with eaftflow.connect(run) as con:
        scores = con.execute(
            "select layer, expert, avg(g::double * norm) as score from records "
            "where pack = $pack group by layer, expert",
            {"pack": pack},
        ).to_arrow_table()
    table = (
        pl.DataFrame(pl.from_arrow(ranking.table))
        .join(pl.DataFrame(pl.from_arrow(scores)), on=["layer", "expert"], how="left")
        .with_columns(saliency=pl.col("score"))
        .drop("score")
        .sort("layer", "saliency", "expert", descending=[False, True, False], nulls_last=True)
        .with_columns(rank=pl.int_range(pl.len(), dtype=pl.Int32).over("layer"))
    )
    path = ranking.path.with_name(f"reap-{pack}.parquet")
    arrow = table.select(RANKING.names).to_arrow().cast(RANKING)
    return write_ranking(path, arrow, parameters=ranking.parameters).path


def measure_specialisation(model: Path, run: Path, blocks: Blocks) -> Iterator[dict[str, Any]]:
    """By pack: the loss it gains when half the experts go by its own needs, and by others'."""
    base = _nats_by_pack(evaluate(model, blocks))
    gained: dict[str, dict[str, float]] = {}
    for pack in base:
        with pruned(rank_by_pack(run, pack), 0.5) as folder:
            after = _nats_by_pack(evaluate(folder, blocks))
        gained[pack] = {name: after[name] - base[name] for name in base}
    for pack in base:
        others = [gained[other][pack] for other in base if other != pack]
        yield {"pack": pack, "own": gained[pack][pack], "others": sum(others) / len(others)}


def save_untrained(folder: Path) -> Path:
    """A model of the bundled one's shape and tokenizer with random weights, in `folder`."""
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.jsonl"))
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def describe_training() -> Iterator[str]:
    """The training log in a few lines of Markdown."""
    lines = (MODEL / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    header, last = json.loads(lines[0]), json.loads(lines[-1])
    yield (
        f"{header['parameters']:,} parameters; {last['tokens']:,} tokens in "
        f"{last['step']:,} steps and {last['seconds']:.0f} s on {header['options']['device']}, in "
        f"blocks of {header['options']['seq_len']:,} (`data/model/training_log.jsonl`)."
    )


def describe_loss(base: pl.DataFrame) -> Iterator[str]:
    """Held-out loss by pack, as a Markdown table."""
    yield "| pack | predicted tokens | nats a token | mean p_t |"
    yield "| --- | --- | --- | --- |"
    by_pack = base.group_by("pack").agg(pl.len(), -pl.col("logp").mean(), pl.col("p_t").mean())
    for pack, count, nats, p_t in by_pack.sort("pack").iter_rows():
        yield f"| {pack} | {count:,} | {nats:.3f} | {p_t:.3f} |"
    union = base.select(-pl.col("logp").mean(), pl.col("p_t").mean()).row(0)
    yield f"| UNION | {len(base):,} | {union[0]:.3f} | {union[1]:.3f} |"


def describe_pruning(rankers: dict[str, Path], base: pl.DataFrame, blocks: Blocks) -> Iterator[str]:
    """Perplexity and conflict rate by ranking and keep_frac, as a Markdown table."""
    p_q = base["p_t"].quantile(0.15, "lower")
    H_q = base["H_t"].quantile(0.15, "lower")
    base_ppl = _perplexity(base)
    yield (
        f"Base: UNION perplexity {base_ppl:.3f}, conflict rate on the revised rows "
        f"{_conflict_rate(base, p_q, H_q):.2%} (p_t <= {p_q:.4g} and H_t <= {H_q:.4g}, the base "
        "model's 15 % quantiles)."
    )
    yield ""
    yield f"| ranking | {' | '.join(f'keep {keep:g}' for keep in KEEP_FRACS)} |"
    yield f"| --- |{' --- |' * len(KEEP_FRACS)}"
    for name, ranking in rankers.items():
        cells = []
        for keep_frac in KEEP_FRACS:
            with pruned(ranking, keep_frac) as folder:
                after = evaluate(folder, blocks)
            change = _perplexity(after) / base_ppl - 1
            cells.append(f"{change:+.1%} ({_conflict_rate(after, p_q, H_q):.2%})")
            print(name, keep_frac, cells[-1], flush=True)
        yield f"| {name} | {' | '.join(cells)} |"


def describe_specialisation(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What each pack loses by its own and by the other packs' rankings, as a Markdown table."""
    yield "| pack | by its own | by the others' |"
    yield "| --- | --- | --- |"
    for row in rows:
        yield f"| {row['pack']} | {row['own']:+.3f} | {row['others']:+.3f} |"


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / "reports" / "bundled_model.md")
    out: Path = parser.parse_args().out
    whole, blocks, fewer = pack_heldout(), pack_heldout(budget=30_000), pack_heldout(budget=12_000)
    with tempfile.TemporaryDirectory() as scratch:
        run = capture(CaptureOptions(), out=Path(scratch) / "run")
        untrained = save_untrained(Path(scratch) / "untrained")
        control = capture(
            CaptureOptions(model=str(untrained), tokens=60_000), out=Path(scratch) / "control"
        )
        rankers = {
            name: rescore(run.run.path, parameters=parameters).ranking.path
            for name, parameters in CANDIDATES.items()
        }
        rankers["random"] = rank_by_chance(rankers["reap"], seed=0)
        base = evaluate(MODEL, blocks)
        lines = [
            "# The bundled model",
            "",
            "Written by `python data/report_model.py`.",
            "",
            *describe_training(),
            "",
            "## Held-out loss",
            "",
            *describe_loss(evaluate(MODEL, whole)),
            "",
            "## Calibration",
            "",
            f"{run.run.tokens:,} predicted tokens: "
            + ", ".join(
                f"{name} {count:,} ({count / run.run.tokens:.2%})"
                for name, count in run.regions.items()
            )
            + ".",
            "",
            "## Pruning",
            "",
            "Change of UNION perplexity and, in brackets, the conflict rate on the held-out "
            "catalogue rows, whose revised factors the model was never shown. One training seed, "
            "one calibration set, no intervals: differences of a few percent are not a ranking of "
            f"criteria. {blocks.predictions:,} predicted tokens.",
            "",
            *describe_pruning(rankers, base, blocks),
            "",
            "## Specialised by function",
            "",
            "Nats a token that a pack's held-out loss gains when half of each layer's experts are "
            "cut: by REAP over its own calibration tokens, and by REAP over each of the other "
            "packs', averaged. Experts that specialise make the second much larger. "
            f"{fewer.predictions:,} predicted tokens.",
            "",
            *describe_specialisation(list(measure_specialisation(MODEL, run.run.path, fewer))),
            "",
            "The same with random weights of the same shape:",
            "",
            *describe_specialisation(
                list(measure_specialisation(untrained, control.run.path, fewer))
            ),
        ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(out)


def _snapshot(folder: Path) -> Snapshot:
    return Snapshot(name=folder.name, path=folder)


def _nats_by_pack(tokens: pl.DataFrame) -> dict[str, float]:
    by_pack = tokens.group_by("pack").agg(-pl.col("logp").mean()).sort("pack")
    return dict(by_pack.iter_rows())


def _perplexity(tokens: pl.DataFrame) -> float:
    return math.exp(-tokens.select(pl.col("logp").cast(pl.Float64).mean()).item())


def _conflict_rate(tokens: pl.DataFrame, p_q: float | None, H_q: float | None) -> float:
    revised = tokens.filter(pl.col("pack") == "catalogue")
    conflict = (pl.col("p_t") <= p_q) & (pl.col("H_t") <= H_q)
    return float(revised.select(conflict.mean()).item())


if __name__ == "__main__":
    main()
