"""The command line: parse, call one stage, print what it made.

A stage is imported inside its command: torch and transformers take seconds to import, and
`eaftflow --help` must take tenths of one.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import click

from eaftflow import __version__
from eaftflow.errors import EaftflowError

FOLDER = click.Path(path_type=Path, file_okay=False)


class _Commands(click.Group):
    """Turns what a user can act on into one message and exit code 2; lists commands in order."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EaftflowError as error:
            raise _UserError(str(error)) from error


class _UserError(click.ClickException):
    exit_code = 2


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Prune Mixture-of-Experts models by correctness, not magnitude.

    Capture once, rescore as often as you like, prune what the ranking leaves out. With no
    arguments each command takes up where the last one stopped.
    """


# --- capture ---------------------------------------------------------------------------------


@main.command()
@click.argument("model", required=False)
@click.option(
    "--data",
    multiple=True,
    metavar="[NAME=]PATH",
    help="Calibration rows: a JSONL or Parquet file, or a folder of them (a pack each). Columns: "
    "prompt and completion, or messages, or text. Repeatable.  [default: the bundled packs]",
)
@click.option("--out", type=FOLDER, help="Run folder to write.  [default: a new one in runs/]")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with an interrupted run, by its own options. Without --out, the newest run.",
)
@click.option(
    "--seq-len", type=int, help="Tokens of a packed block.  [default: 2048, or the model's limit]"
)
@click.option(
    "--tokens",
    type=int,
    help="Stop after the block in which this many predicted tokens "
    "are reached.  [default: all rows]",
)
@click.option(
    "--batch-tokens", type=int, default=8192, show_default=True, help="Input tokens of one forward."
)
@click.option(
    "--part-tokens",
    type=int,
    default=65_536,
    show_default=True,
    help="Predicted tokens of one part file; a kill loses at most these.",
)
@click.option(
    "--entropy-top-k",
    type=int,
    default=20,
    show_default=True,
    help="H_t is the entropy over this many top tokens.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the shuffle over rows.")
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: cuda where there is one]")
@click.option(
    "--dtype", help="float32, bfloat16 or float16.  [default: the checkpoint's; float32 on CPU]"
)
@click.option("--revision", help="Hub revision of MODEL.")
@click.option("--trust-remote-code", is_flag=True, help="Run the model's own code from its folder.")
@click.pass_context
def capture(
    ctx: click.Context, /, *, out: Path | None, resume: bool, data: tuple[str, ...], **options: Any
) -> None:
    """Run MODEL once over calibration text and store what every token and expert did.

    MODEL is a local folder or a hub name; without it, the bundled model. Writes the tables tokens
    (p_t, H_t), routes (expert, g, norm) and blocks (the text) as Parquet, and a manifest.

    Example: eaftflow capture Qwen/Qwen3-30B-A3B --data code=code.jsonl --tokens 1000000
    """
    from eaftflow.capture import CaptureOptions, capture, resume_capture

    options["data"] = data
    if resume:
        typed = click.core.ParameterSource.COMMANDLINE
        given = {k: v for k, v in options.items() if ctx.get_parameter_source(k) == typed}
        result = resume_capture(out, **given)
    else:
        result = capture(CaptureOptions(**options), out=out)
    run = result.run
    for reason, count in result.dropped.items():
        click.echo(f"dropped   {count:>11,} {reason}")
    click.echo(f"kept      {run.tokens:>11,} of {result.planned:,} predicted tokens")
    for region, count in result.regions.items():
        click.echo(f"          {count:>11,} {region} ({count / max(1, run.tokens):.2%})")
    routes = [part.files["routes"] for part in run.parts]
    records, stored = sum(file.rows for file in routes), sum(file.bytes for file in routes)
    click.echo(
        f"records   {records:>11,} routes in {len(run.parts)} parts, {stored / 1e6:,.1f} MB, "
        f"{stored / max(1, records):.2f} bytes a record"
    )
    if result.seconds:
        click.echo(f"speed     {result.scored / result.seconds:>11,.0f} predicted tokens/s")
    click.echo(f"run       {run.path}")
    if not result.complete:
        click.echo(
            "Interrupted; what was scored is saved. Go on with: "
            f"eaftflow capture --resume --out {run.path}",
            err=True,
        )
        raise SystemExit(130)
    click.echo("next      eaftflow rescore")


# --- rescore, query --------------------------------------------------------------------------


@main.command()
@click.option("--run", type=FOLDER, help="Run to score.  [default: the newest in runs/]")
@click.option("--w-good", type=float, default=1.0, show_default=True, help="Weight of good tokens.")
@click.option(
    "--w-uncertain",
    type=float,
    default=0.25,
    show_default=True,
    help="Weight of tokens predicted badly with high entropy.",
)
@click.option(
    "--w-conflict",
    type=float,
    default=-2.0,
    show_default=True,
    help="Weight of tokens predicted badly with low entropy: confidently wrong.",
)
@click.option(
    "--q",
    type=float,
    default=0.15,
    show_default=True,
    help="Quantile level up to which p_t, and H_t, count as low.",
)
@click.option(
    "--h-hi",
    type=float,
    default=0.85,
    show_default=True,
    help="Quantile level from which H_t counts as high.",
)
@click.option("--p-hi", type=float, help="Strict good: quantile level that p_t must reach.")
@click.option("--h-mid", type=float, help="Strict good: quantile level that H_t must not exceed.")
@click.option(
    "--criterion",
    default="eaft_reap",
    show_default=True,
    help="eaft_reap, eaft_reap_sum, reap, reap_sum or frequency.",
)
@click.option(
    "--out",
    metavar="NAME|PATH",
    help="Name within the run, or path of a .parquet file.  "
    "[default: the criterion and what is not default]",
)
def rescore(*, run: Path | None, out: str | None, **parameters: Any) -> None:
    """Rank the experts of a run under any weights, without the model.

    Writes a ranking, which `eaftflow prune` takes next, and prints what moved against the ranking
    by the default weights. The first time reads every record of the run; after that, new weights
    take milliseconds.

    Example: eaftflow rescore --w-conflict -20 --criterion eaft_reap_sum
    """
    from eaftflow.relations import Parameters
    from eaftflow.rescore import describe, rescore

    def progress(read: int, parts: int) -> None:
        click.echo(f"\rread {read} of {parts} parts", nl=read == parts, err=True)

    rescored = rescore(
        run,
        parameters=Parameters(**parameters),
        out=out,
        progress=progress if sys.stderr.isatty() else None,
    )
    click.echo(describe(rescored))
    for warning in rescored.warnings:
        click.echo(f"Warning: {warning}", err=True)
    if rescored.newest:
        click.echo(f"next       eaftflow prune{'' if run is None else f' --run {run}'}")


@main.command()
@click.argument("sql")
@click.option("--run", type=FOLDER, help="Run to ask.  [default: the newest in runs/]")
def query(*, sql: str, run: Path | None) -> None:
    """Ask a run anything, in DuckDB's SQL.

    The view to ask is `records`, one row for each expert of each token: token_id, layer, expert,
    g, norm, p_t, logp, H_t, region, pack, source, row, block, position, target, top_token.

    Also captured: tokens, routes, blocks, vocab, layers, inputs (the text, by token). Also derived:
    thresholds, regions, cells, weights, experts, saliency, ranking. Derived views follow the run's
    newest ranking.

    Example: eaftflow query "select region, avg(p_t) from records group by region"
    """
    from eaftflow.query import show

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    show(sql, run=run, width=width)


# --- prune -----------------------------------------------------------------------------------


@main.command()
@click.argument("model", type=FOLDER, required=False)
@click.option(
    "--run", type=FOLDER, help="Run to take rankings from.  [default: the newest in runs/]"
)
@click.option(
    "--ranking",
    type=click.Path(path_type=Path),
    help="A file, or a name in the run.  [default: the newest]",
)
@click.option(
    "--keep-frac",
    type=float,
    help="Share of each layer's experts to keep, rounded down.  [default: 0.75]",
)
@click.option("--keep-n", type=int, help="Experts to keep in each layer, instead of a share.")
@click.option(
    "--keep-multiple",
    type=int,
    default=1,
    show_default=True,
    help="Round the number kept up to a multiple of this.",
)
@click.option("--out", type=FOLDER, help="Folder to make.  [default: pruned/MODEL-keepN-RANKING]")
@click.option("--dry-run", is_flag=True, help="Print the plan, with the experts to drop; no more.")
def prune(*, dry_run: bool, **options: Any) -> None:
    """Cut the lowest-ranked experts out of a checkpoint.

    MODEL is the checkpoint's folder, for when it has moved since the run captured it. The result
    is a checkpoint of the same family and format, which loads wherever the original does; the
    original is only read.
    """
    from eaftflow.prune import PruneOptions, describe, describe_dropped, plan_prune, write_pruned

    plan = plan_prune(PruneOptions(**options))
    click.echo(describe(plan))
    for warning in plan.warnings:
        click.echo(f"Warning: {warning}", err=True)
    if dry_run:
        click.echo(describe_dropped(plan))
        return
    if sys.stderr.isatty():
        with click.progressbar(length=plan.bytes_after, label="writing", file=sys.stderr) as bar:
            out = write_pruned(plan, progress=bar.update)
    else:
        out = write_pruned(plan)
    click.echo(
        f"Wrote {out}. Load it with stock transformers:\n"
        "  python -c 'from transformers import AutoModelForCausalLM as M; "
        f'print(M.from_pretrained("{out}"))\''
    )


if __name__ == "__main__":
    main()
