"""Prune: rewrite a checkpoint without the lowest-ranked experts of each layer.

The whole rewrite is planned from config and safetensors headers, and the plan is checked, before a
byte is written. Then tensors stream shard by shard, as byte ranges, into `OUT.partial`, a folder
marked as ours, which is renamed to OUT when everything is on the disk. The model is never built and
no value is decoded, so every format keeps its bits.

Experts keep their order: `new_expert` counts the kept ones by ascending original index. Keeping all
of them therefore gives the original, byte for byte.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from eaftflow import __version__
from eaftflow.architectures import Architecture, Place, find_architecture, present, renumber
from eaftflow.checkpoint import (
    CONFIG,
    INDEX,
    Checkpoint,
    Piece,
    Shard,
    Tensor,
    edit_index,
    edit_numbers,
    fingerprint,
    lay_out,
    read_checkpoint,
    read_shard,
    write_shard,
)
from eaftflow.errors import EaftflowError
from eaftflow.rankings import FOLDER as RANKINGS
from eaftflow.rankings import Ranking, newest_ranking, parts_hash, read_ranking
from eaftflow.store import (
    MANIFEST,
    hash_file,
    lock_run,
    newest_run,
    open_run,
    read_json,
    write_json,
)

RECORD = "eaftflow.json"
OUT_FOLDER = Path("pruned")
DEFAULT_KEEP_FRAC = 0.75

# Only a folder with this file is taken for a rewrite that was killed, and emptied.
_MARK = ".eaftflow-partial"
_LOCK = ".lock"

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """What to prune, by which ranking, how far, and where to."""

    model: Path | None = None  # None: the run's model
    run: Path | None = None  # None: the newest under ./runs
    ranking: Path | None = None  # a file, or a name within the run; None: the run's newest
    keep_frac: float | None = None  # of a layer's experts, rounded down to whole experts
    keep_n: int | None = None  # experts kept a layer; excludes keep_frac
    keep_multiple: int = 1  # rounds the number kept up to a multiple
    out: Path | None = None  # None: pruned/MODEL-keepN-RANKING


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that `write_pruned` will do, checked."""

    checkpoint: Checkpoint
    ranking: Ranking
    out: Path
    experts: int  # a layer, before
    keep_n: int  # a layer, after
    top_k: int
    kept: Mapping[int, tuple[int, ...]]  # by layer; original experts in the order of new_expert
    pieces: Mapping[str, tuple[Piece, ...]]  # by shard; one without tensors left is not here
    config_text: str
    carried: tuple[str, ...]  # files copied as they are
    left_behind: tuple[str, ...]  # top-level names that are not part of this checkpoint
    record: Mapping[str, Any]  # the content of eaftflow.json
    warnings: tuple[str, ...]

    @property
    def partial(self) -> Path:
        """The folder that is written, and then renamed to `out`."""
        return self.out.with_name(self.out.name + ".partial")

    @property
    def bytes_before(self) -> int:
        """The size of the checkpoint's shards."""
        return sum(shard.file_bytes for shard in self.checkpoint.shards)

    @property
    def bytes_after(self) -> int:
        """The size of the shards to be written."""
        return sum(
            8 + len(lay_out(shard, pieces)[0]) + sum(piece.bytes for piece in pieces)
            for shard, pieces in self.shards()
        )

    def shards(self) -> Iterator[tuple[Shard, tuple[Piece, ...]]]:
        """The shards to be written, with what goes into each."""
        for shard in self.checkpoint.shards:
            if shard.name in self.pieces:
                yield shard, self.pieces[shard.name]


def plan_prune(options: PruneOptions) -> Plan:
    """The plan for `options`, from config, headers and ranking; nothing is written.

    Raises EaftflowError for everything that would stop the rewrite or make its result wrong.
    """
    ranking = read_ranking(_find_ranking(options))
    checkpoint = read_checkpoint(_find_model(options, ranking))
    architecture = find_architecture(checkpoint.config)
    experts, top_k = _read_counts(checkpoint, architecture)
    places = _locate_tensors(checkpoint, architecture, experts)
    _check_ranking(ranking, checkpoint, {place.layer for place in places.values()}, experts)
    keep_n = choose_keep_n(options, experts=experts, top_k=top_k)
    kept = choose_kept(ranking, keep_n)
    name = f"{Path(ranking.parameters['run']['model']['name']).name}-keep{keep_n}"
    pieces = {
        shard.name: tuple(_cut_shard(shard, places, kept, experts)) for shard in checkpoint.shards
    }
    carried, left_behind = _sort_other_files(checkpoint)
    plan = Plan(
        checkpoint=checkpoint,
        ranking=ranking,
        out=options.out or OUT_FOLDER / f"{name}-{ranking.path.stem}",
        experts=experts,
        keep_n=keep_n,
        top_k=top_k,
        kept=kept,
        pieces={shard: cut for shard, cut in pieces.items() if cut},
        config_text=edit_numbers(
            checkpoint.config_text,
            dict.fromkeys(present(checkpoint.config, architecture.experts_keys), keep_n),
        ),
        carried=carried,
        left_behind=left_behind,
        record={
            "eaftflow": __version__,
            "model": {**ranking.parameters["run"]["model"], "experts": experts, "top_k": top_k},
            "ranking": {"sha256": hash_file(ranking.path), "parameters": ranking.parameters},
            "keep_n": keep_n,
            "options": {
                key: asdict(options)[key] for key in ("keep_frac", "keep_n", "keep_multiple")
            },
            "kept": {str(layer): list(kept[layer]) for layer in sorted(kept)},
            "parent": _read_parent(checkpoint),
        },
        warnings=tuple(_compare_with_run(ranking, options)),
    )
    _check_out(plan)
    return plan


def choose_keep_n(options: PruneOptions, *, experts: int, top_k: int) -> int:
    """How many experts a layer keeps.

    `keep_frac` rounds down to whole experts, in exact decimal arithmetic; `keep_multiple` then
    rounds up. Raises EaftflowError where the number is below top_k or above the model's.
    """
    if options.keep_frac is not None and options.keep_n is not None:
        raise EaftflowError("--keep-frac and --keep-n exclude each other. Give one of them.")
    if options.keep_multiple < 1:
        raise EaftflowError(f"--keep-multiple {options.keep_multiple} must be 1 or more.")
    most = experts - experts % options.keep_multiple
    if most < top_k:
        why = "exceeds" if most == 0 else f"has no multiple from top_k={top_k} up to"
        raise EaftflowError(
            f"keep_multiple={options.keep_multiple} {why} the {experts} experts of a layer. "
            "Use a smaller --keep-multiple."
        )
    if options.keep_n is not None:
        asked, keep_n = f"keep_n={options.keep_n}", options.keep_n
    else:
        keep_frac = DEFAULT_KEEP_FRAC if options.keep_frac is None else options.keep_frac
        if not 0 < keep_frac <= 1:
            raise EaftflowError(
                f"keep_frac={keep_frac} is not a share. Use one above 0 and up to 1."
            )
        asked, keep_n = f"keep_frac={keep_frac}", math.floor(Fraction(str(keep_frac)) * experts)
    if options.keep_multiple > 1:
        keep_n = math.ceil(keep_n / options.keep_multiple) * options.keep_multiple
        asked += f" with keep_multiple={options.keep_multiple}"
    if keep_n < top_k:
        enough = math.ceil(Fraction(top_k * 10_000, experts)) / 10_000
        way_out = f"--keep-n {top_k}" if options.keep_n is not None else f"--keep-frac {enough:g}"
        raise EaftflowError(
            f"{asked} keeps {keep_n} of {experts} experts per layer, "
            f"but the router picks top_k={top_k}. Use {way_out} or more."
        )
    if keep_n > experts:
        raise EaftflowError(
            f"{asked} asks for {keep_n} experts per layer, but the model has {experts}. "
            f"Use --keep-n {most} or less."
        )
    return keep_n


def choose_kept(ranking: Ranking, keep_n: int) -> dict[int, tuple[int, ...]]:
    """The `keep_n` best-ranked experts of each layer, by ascending original index."""
    kept: dict[int, list[int]] = {}
    columns = [ranking.table[name].to_pylist() for name in ("layer", "expert", "rank")]
    for layer, expert, rank in zip(*columns, strict=True):
        if rank < keep_n:
            kept.setdefault(layer, []).append(expert)
    return {layer: tuple(sorted(experts)) for layer, experts in kept.items()}


def write_pruned(plan: Plan, *, progress: Callable[[int], object] = lambda _: None) -> Path:
    """Carry out `plan` and return the folder it made, which appears whole or not at all.

    `progress` is told the bytes of each write. Raises EaftflowError where the file system refuses,
    for want of space or of permission.
    """
    partial = plan.partial
    _check_partial(partial)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        (partial / _MARK).touch()
        with lock_run(partial):
            try:
                _write_files(plan, partial, progress)
                for name in (_MARK, _LOCK):
                    (partial / name).unlink(missing_ok=True)
                partial.rename(plan.out)
                _flush(plan.out.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise EaftflowError(
            f"{plan.out} could not be written ({error.strerror or error}). Nothing was left there "
            "and the original is as it was; make room or permission, or choose another --out."
        ) from error
    return plan.out


def describe(plan: Plan) -> str:
    """The plan as text for the terminal."""
    before, after = plan.bytes_before, plan.bytes_after
    scored = plan.ranking.parameters["run"]
    extent = f"{scored['tokens']:,} tokens{'' if scored['complete'] else ', incomplete run'}"
    lines = [
        f"model    {plan.checkpoint.folder} ({plan.checkpoint.config['model_type']}, "
        f"{len(plan.kept)} MoE layers, {plan.experts} experts, top_k {plan.top_k})",
        f"ranking  {plan.ranking.path} ({plan.ranking.parameters['criterion']}, {extent})",
        f"keep     {plan.keep_n} of {plan.experts} experts per layer",
        f"weights  {_megabytes(before)} -> {_megabytes(after)} MB ({after / before:.1%}) "
        f"in {len(plan.pieces)} of {len(plan.checkpoint.shards)} shards",
        f"out      {plan.out}",
    ]
    if plan.record["parent"] is not None:
        lines.append(
            f"parent   {plan.checkpoint.folder} was pruned before: expert indices are its own, "
            f"{RECORD} keeps both steps"
        )
    if plan.left_behind:
        lines.append(f"not carried over: {', '.join(plan.left_behind)}")
    return "\n".join(lines)


def describe_dropped(plan: Plan) -> str:
    """The experts that each layer loses, as text for the terminal."""
    lines = ["layer  dropped experts"]
    for layer, experts in sorted(plan.kept.items()):
        dropped = sorted(set(range(plan.experts)) - set(experts))
        lines.append(f"{layer:>5}  {' '.join(map(str, dropped)) or 'none'}")
    return "\n".join(lines)


def _find_ranking(options: PruneOptions) -> Path:
    """The ranking's file. A bare name that is no file here means one in the run's own folder."""
    ranking = options.ranking
    if ranking is None:
        return newest_ranking(options.run or newest_run())
    named = ranking.suffix == ".parquet"
    if ranking.name != str(ranking) or (named and ranking.is_file()):
        return ranking
    run = options.run or newest_run()
    return run / RANKINGS / (ranking.name if named else f"{ranking.name}.parquet")


def _compare_with_run(ranking: Ranking, options: PruneOptions) -> Iterator[str]:
    """What sets the ranking apart from its run as it is now, where the run is known."""
    home = ranking.path.absolute().parent
    within = home.name == RANKINGS and (home.parent / MANIFEST).is_file()
    folder = home.parent if within else options.run
    if folder is None:
        return
    scored = ranking.parameters["run"]
    try:
        run = open_run(folder)
    except EaftflowError as error:
        yield f"{ranking.path} cannot be compared with its run. {error}"
        return
    if parts_hash(run) != scored["parts_sha256"]:
        yield (
            f"{ranking.path} was made from {scored['tokens']:,} tokens, but {folder} now holds "
            f"{run.tokens:,}{' others' if run.tokens == scored['tokens'] else ''}. "
            f"`eaftflow rescore --run {folder}` ranks by those."
        )


def _read_parent(checkpoint: Checkpoint) -> Any:
    """The record of an earlier pruning that made this checkpoint, which has its parent in turn."""
    path = checkpoint.folder / RECORD
    return read_json(path) if path.is_file() else None


def _find_model(options: PruneOptions, ranking: Ranking) -> Path:
    """The folder of the model to prune."""
    model = ranking.parameters["run"]["model"]
    folder = options.model or Path(model["path"])
    if not folder.is_dir():
        whose = "" if options.model else f", where {model['name']} was captured from,"
        raise EaftflowError(
            f"The model folder {folder}{whose} does not exist. "
            "Name the folder that holds the model: `eaftflow prune MODEL`."
        )
    return folder


def _read_counts(checkpoint: Checkpoint, architecture: Architecture) -> tuple[int, int]:
    """Experts per layer and top_k, from the config."""
    path = checkpoint.folder / CONFIG
    counts = present(checkpoint.config, architecture.experts_keys)
    top_ks = present(checkpoint.config, architecture.top_k_keys)
    for found, keys in ((counts, architecture.experts_keys), (top_ks, architecture.top_k_keys)):
        if not found:
            raise EaftflowError(f"{path} has none of {', '.join(keys)}. Add the model's number.")
    if len(set(counts.values())) > 1:
        raise EaftflowError(f"{path} contradicts itself: {counts}. Correct it.")
    if architecture.groups_key:
        groups = present(checkpoint.config, (architecture.groups_key,))
        group_count = groups.get(architecture.groups_key, architecture.groups_default)
        if group_count != 1:
            raise EaftflowError(
                f"{checkpoint.folder} routes within {group_count} groups of experts "
                f"({architecture.groups_key}), and groups of unequal size change what the router "
                f"selects. Only {architecture.groups_key}=1 can be pruned yet."
            )
    return next(iter(counts.values())), next(iter(top_ks.values()))


def _locate_tensors(
    checkpoint: Checkpoint, architecture: Architecture, experts: int
) -> dict[str, Place]:
    """The place of each tensor that pruning touches, every layer's set found complete."""
    places = {}
    for shard in checkpoint.shards:
        for tensor in shard.tensors:
            place = architecture.locate(tensor.name)
            if place is not None:
                _check_rows(tensor, place, experts)
                places[tensor.name] = place
            elif architecture.in_router(tensor.name):
                raise EaftflowError(
                    f"{checkpoint.folder} has the router tensor {tensor.name}, which this eaftflow "
                    f"does not know in a {checkpoint.config['model_type']} model. "
                    "Pruning around it could give a wrong model, so nothing was done."
                )
    layers: dict[int, list[Place]] = {}
    for place in places.values():
        layers.setdefault(place.layer, []).append(place)
    if not layers:
        raise EaftflowError(
            f"{checkpoint.folder} has no tensor like {architecture.router[0]}, the router of a "
            f"{checkpoint.config['model_type']} model. Give a checkpoint of the whole model."
        )
    for layer, found in sorted(layers.items()):
        _check_layer(checkpoint.folder, architecture, layer, found, experts)
    for depth in present(checkpoint.config, (architecture.layers_key,)).values():
        if max(layers) >= depth:
            raise EaftflowError(
                f"{checkpoint.folder} has experts in layer {max(layers)}, beyond its {depth} "
                "decoder layers: they serve multi-token prediction and are in no ranking. "
                "Such a checkpoint cannot be pruned yet."
            )
    return places


def _check_rows(tensor: Tensor, place: Place, experts: int) -> None:
    if place.expert is not None:
        if place.expert >= experts:
            raise EaftflowError(
                f"{tensor.name} is of expert {place.expert}, but the config counts {experts} "
                "experts. Correct the config, or get the checkpoint from its publisher."
            )
        return
    rows = tensor.shape[0] if tensor.shape else 0
    if rows != experts or (tensor.stop - tensor.start) % rows:
        raise EaftflowError(
            f"{tensor.name} has the shape {list(tensor.shape)} ({tensor.dtype}); expected "
            f"{experts} rows of whole bytes, one an expert. This layout cannot be pruned yet."
        )


def _check_layer(
    folder: Path, architecture: Architecture, layer: int, found: list[Place], experts: int
) -> None:
    patterns = {place.pattern for place in found}
    missing = [pattern for pattern in architecture.router if pattern not in patterns]
    if not patterns & set(architecture.experts):
        missing.append(architecture.experts[0])
    for pattern in missing:
        raise EaftflowError(
            f"{folder} has no tensor {pattern.replace('{layer}', str(layer))}, although layer "
            f"{layer} has other tensors of an MoE layer. The checkpoint is incomplete."
        )
    tensors = [0] * experts
    for place in found:
        if place.expert is not None:
            tensors[place.expert] += 1
    if len(set(tensors)) > 1:
        fewest = min(range(experts), key=tensors.__getitem__)
        raise EaftflowError(
            f"{folder} holds {tensors[fewest]} tensors of expert {fewest} in layer {layer}, and "
            f"{max(tensors)} of others. The checkpoint is incomplete."
        )


def _check_ranking(
    ranking: Ranking, checkpoint: Checkpoint, layers: set[int], experts: int
) -> None:
    """Hold the ranking against the checkpoint: the same model, all its layers, all its experts."""
    ranked_model = ranking.parameters["run"]["model"]
    found = fingerprint(checkpoint.folder)
    if found != ranked_model["fingerprint"]:
        raise EaftflowError(
            f"{ranking.path} ranks the experts of {ranked_model['name']} (fingerprint "
            f"{ranked_model['fingerprint'][:12]}), but {checkpoint.folder} is another checkpoint "
            f"(fingerprint {found[:12]}). Name the model it was made from, or capture this one."
        )
    counts: dict[int, int] = {}
    for layer in ranking.table["layer"].to_pylist():
        counts[layer] = counts.get(layer, 0) + 1
    if counts != dict.fromkeys(layers, experts):
        raise EaftflowError(
            f"{ranking.path} ranks {_layers_text(counts)}, but {checkpoint.folder} has "
            f"{_layers_text(dict.fromkeys(layers, experts))}. Run `eaftflow rescore` again."
        )


def _layers_text(counts: Mapping[int, int]) -> str:
    numbers = sorted(set(counts.values()))
    experts = " or ".join(map(str, numbers))
    return f"{experts} experts in each of the layers {', '.join(map(str, sorted(counts)))}"


def _cut_shard(
    shard: Shard,
    places: Mapping[str, Place],
    kept: Mapping[int, tuple[int, ...]],
    experts: int,
) -> Iterator[Piece]:
    """What stays of each tensor of a shard."""
    new_expert = {(layer, expert): new for layer in kept for new, expert in enumerate(kept[layer])}
    for tensor in shard.tensors:
        place = places.get(tensor.name)
        if place is None:
            yield Piece(tensor=tensor, name=tensor.name)
        elif place.expert is None:
            rows = kept[place.layer]
            yield Piece(
                tensor=tensor, name=tensor.name, rows=None if len(rows) == experts else rows
            )
        elif (place.layer, place.expert) in new_expert:
            new = new_expert[place.layer, place.expert]
            yield Piece(tensor=tensor, name=renumber(tensor.name, place, new))


def _sort_other_files(checkpoint: Checkpoint) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Files to carry over, and the top-level names of what stays behind.

    Weights in other formats stay behind, with the whole subfolder they are in; so do hidden
    entries, which are the plumbing of git and the hub.
    """
    own = {CONFIG, INDEX, RECORD, *(shard.name for shard in checkpoint.shards)}
    files = [
        path.relative_to(checkpoint.folder)
        for path in sorted(checkpoint.folder.rglob("*"))
        if path.is_file()
    ]
    others = [path for path in files if path.as_posix() not in own]
    left_behind = {
        path.parts[0]
        for path in others
        if path.suffix in _WEIGHTS
        or path.name.endswith(".index.json")
        or path.parts[0].startswith(".")
    }
    carried = tuple(path.as_posix() for path in others if path.parts[0] not in left_behind)
    return carried, tuple(sorted(left_behind))


def _check_out(plan: Plan) -> None:
    out, source = plan.out.resolve(), plan.checkpoint.folder.resolve()
    if out.is_relative_to(source):
        raise EaftflowError(
            f"--out {plan.out} is, or lies in, the model's own folder {plan.checkpoint.folder}. "
            "Choose a folder outside it."
        )
    if out.exists():
        raise EaftflowError(f"{plan.out} exists already. Remove it, or choose another --out.")
    _check_partial(plan.partial)
    parent = next(parent for parent in out.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise EaftflowError(
            f"{plan.out} cannot be made: {parent} is no folder that you may write to. "
            "Choose another --out."
        )
    needed = plan.bytes_after + sum(
        (plan.checkpoint.folder / name).stat().st_size for name in plan.carried
    )
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise EaftflowError(
            f"{plan.out} needs {_megabytes(needed)} MB, but {parent} has {_megabytes(free)} MB "
            "free. Make room, or choose another --out."
        )


def _check_partial(partial: Path) -> None:
    """Refuse a folder that no prune began: its content is somebody's."""
    if not os.path.lexists(partial) or (partial / _MARK).is_file():
        return
    if not partial.is_dir() or any(partial.iterdir()):
        raise EaftflowError(
            f"{partial}, where the new checkpoint would be prepared, exists and is not of "
            "eaftflow's making. Move it away, or choose another --out."
        )


def _write_files(plan: Plan, folder: Path, progress: Callable[[int], object]) -> None:
    for stale in sorted(folder.rglob("*"), reverse=True):  # of a run that was killed
        if stale.is_dir():
            stale.rmdir()
        elif stale not in (folder / _MARK, folder / _LOCK):
            stale.unlink()
    for shard, pieces in plan.shards():
        target = folder / shard.name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_shard(shard, pieces, target, progress=progress)
        written = {tensor.name: tensor.shape for tensor in read_shard(folder, shard.name).tensors}
        if written != {piece.name: piece.shape for piece in pieces}:
            raise RuntimeError(f"{target} does not hold the tensors that were planned")
    if plan.checkpoint.index is not None:
        index = edit_index(plan.checkpoint, plan.pieces)
        (folder / INDEX).write_bytes(index.encode())
    (folder / CONFIG).write_bytes(plan.config_text.encode())
    for name in plan.carried:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.checkpoint.folder / name, folder / name)
    write_json(folder / RECORD, plan.record)
    for path in (*folder.rglob("*"), folder):  # once at the end: the disk writes while we read
        _flush(path)


def _flush(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}"
