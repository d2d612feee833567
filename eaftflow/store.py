"""A run on disk: its manifest, its parts, and the protocol that makes a part exist.

A part is written as temporary files, flushed, renamed, and only then named by a commit record in
`_parts/`. Readers take the files that commit records name and nothing else, so a process killed at
any moment leaves either a whole part or none.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eaftflow.errors import EaftflowError
from eaftflow.schemas import FORMAT_VERSION, PART_TABLES

MANIFEST = "manifest.json"
SUMMARY = "summary.json"
RUNS_FOLDER = Path("runs")


@dataclass(frozen=True, kw_only=True)
class TableFile:
    """One table's file of a part."""

    path: str  # relative to the run folder, with forward slashes
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """A committed range of tokens and blocks: `first_*` inclusive, `next_*` exclusive."""

    number: int
    first_token: int
    next_token: int
    first_block: int
    next_block: int
    files: Mapping[str, TableFile]  # by table name


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that exists: its folder, its manifest, its committed parts in order."""

    path: Path
    manifest: Mapping[str, Any]
    parts: tuple[Part, ...]

    @property
    def complete(self) -> bool:
        """True where the capture reached its end and wrote its summary."""
        return (self.path / SUMMARY).exists()

    @property
    def tokens(self) -> int:
        """Predicted tokens in the committed parts."""
        return self.parts[-1].next_token if self.parts else 0

    def files(self, table: str) -> list[Path]:
        """The committed files of `table`, in token order."""
        return [self.path / part.files[table].path for part in self.parts]


def write_json(path: Path, value: object) -> None:
    """Write `value` to `path` so that the file is seen whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The JSON value in `path`. Raises EaftflowError where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EaftflowError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EaftflowError(f"{path} is not valid JSON ({error}). Restore or remove it.") from error


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_run(path: Path) -> Run:
    """The run in folder `path`, every committed file present and of its recorded size.

    Raises EaftflowError where there is no run, its format is another version, or a part is damaged
    or missing.
    """
    if not (path / MANIFEST).is_file():
        raise EaftflowError(
            f"{path} is not a run: it has no {MANIFEST}. "
            "Give a folder that `eaftflow capture` wrote."
        )
    manifest = read_json(path / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise EaftflowError(
            f"{path} has format version {manifest.get('format_version')}, "
            f"this eaftflow reads version {FORMAT_VERSION}. Capture it again."
        )
    parts = tuple(_read_part(record) for record in sorted((path / "_parts").glob("part-*.json")))
    run = Run(path=path, manifest=manifest, parts=parts)
    _check_parts(run)
    return run


def newest_run(root: Path = RUNS_FOLDER) -> Path:
    """The folder of the run under `root` that was created last, by its manifest.

    Raises EaftflowError where `root` holds no run.
    """
    manifests = [(read_json(file), file.parent) for file in root.glob(f"*/{MANIFEST}")]
    runs = [
        (manifest["created_at"], folder)
        for manifest, folder in manifests
        if isinstance(manifest, dict) and "format_version" in manifest
    ]
    if not runs:
        raise EaftflowError(
            f"No run found under {root.resolve()}. Run `eaftflow capture` first, or name a run "
            "folder with --run."
        )
    return max(runs)[1]


def check_hashes(run: Run, *tables: str) -> None:
    """Compare the bytes of every committed file of `tables` with the hash in its commit record.

    Raises EaftflowError where they differ: DuckDB ignores page checksums, and would sum what it
    finds.
    """
    files = [part.files[table] for part in run.parts for table in tables]
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda file: hash_file(run.path / file.path), files)
        for file, found in zip(files, hashes, strict=True):
            if found != file.sha256:
                raise EaftflowError(
                    f"Part file {run.path / file.path} has changed since it was committed: its "
                    "SHA-256 differs from the one in its commit record. Restore the file, or "
                    "capture into a new folder; nothing was scored."
                )


@contextlib.contextmanager
def lock_run(path: Path) -> Iterator[None]:
    """Hold the run folder against a second writer; the lock dies with the process.

    Raises EaftflowError where another process holds it.
    """
    lock = filelock.FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise EaftflowError(
            f"Another process is writing to {path}. Wait for it, or choose another --out."
        ) from None
    try:
        yield
    finally:
        lock.release()


def drop_uncommitted(run: Run) -> list[Path]:
    """Delete files in the table folders that no commit record names, and return their paths."""
    committed = {path for table in PART_TABLES for path in run.files(table)}
    leftovers = [
        path
        for pattern in (*(f"{table}/part-*.parquet*" for table in PART_TABLES), "_parts/*.tmp")
        for path in sorted(run.path.glob(pattern))
        if path not in committed
    ]
    for path in leftovers:
        path.unlink()
    return leftovers


def commit_part(
    run: Path, number: int, *, tables: Mapping[str, pa.Table], blocks: tuple[int, int]
) -> Part:
    """Write one part's `tables` and its commit record, and return the part.

    `tables` holds every table of PART_TABLES; `routes` gets one row group a layer. `blocks` is the
    half-open range of packed blocks that the part covers.
    """
    token_ids = tables["tokens"].column("token_id")
    files = {
        name: _write_table(run, f"{name}/part-{number:06d}.parquet", name, tables[name])
        for name in ("routes", "blocks", "tokens")
    }
    part = Part(
        number=number,
        first_token=token_ids[0].as_py(),
        next_token=token_ids[-1].as_py() + 1,
        first_block=blocks[0],
        next_block=blocks[1],
        files=files,
    )
    (run / "_parts").mkdir(exist_ok=True)
    write_json(run / "_parts" / f"part-{number:06d}.json", asdict(part))
    return part


_DELTA, _SPLIT = "DELTA_BINARY_PACKED", "BYTE_STREAM_SPLIT"
_DICTIONARY = {"tokens": ["pack", "source"], "routes": ["layer", "expert"], "blocks": []}
_ENCODING = {
    "tokens": {
        **dict.fromkeys(["token_id", "row", "block", "position", "target", "top_token"], _DELTA),
        **dict.fromkeys(["p_t", "logp", "H_t"], _SPLIT),
    },
    "routes": {"token_id": _DELTA, "g": _SPLIT, "norm": _SPLIT},
    "blocks": dict.fromkeys(["block", "position", "token"], _DELTA),
}


def _write_table(run: Path, relative: str, name: str, table: pa.Table) -> TableFile:
    path = run / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        with pq.ParquetWriter(
            file,
            PART_TABLES[name],
            compression="zstd",
            compression_level=1,
            write_page_checksum=True,
            use_dictionary=_DICTIONARY[name],
            column_encoding=_ENCODING[name],
        ) as writer:
            for group in _row_groups(name, table):
                writer.write_table(group, row_group_size=max(1, group.num_rows))
        file.flush()
        os.fsync(file.fileno())
    record = TableFile(
        path=relative,
        rows=table.num_rows,
        bytes=temporary.stat().st_size,
        sha256=hash_file(temporary),
    )
    temporary.replace(path)
    return record


def _row_groups(name: str, table: pa.Table) -> Iterator[pa.Table]:
    """One slice a layer for routes, the whole table otherwise."""
    if name != "routes":
        yield table
        return
    runs = pc.run_end_encode(table.column("layer").combine_chunks())
    start = 0
    for end in runs.run_ends.to_pylist():
        yield table.slice(start, end - start)
        start = end


def _read_part(record: Path) -> Part:
    value = read_json(record)
    files = {name: TableFile(**file) for name, file in value.pop("files").items()}
    return Part(**value, files=files)


def _check_parts(run: Run) -> None:
    """Raise EaftflowError unless the parts follow on each other, and all files are there whole."""
    remedy = "Restore it, or capture into a new folder; nothing was scored."
    token, block = 0, 0
    for number, part in enumerate(run.parts):
        if (part.number, part.first_token, part.first_block) != (number, token, block):
            raise EaftflowError(
                f"{run.path / '_parts'} has no sound record of part {number}, which should begin "
                f"at token {token:,}; the next one is part {part.number}, from token "
                f"{part.first_token:,}. {remedy}"
            )
        token, block = part.next_token, part.next_block
        for file in part.files.values():
            path = run.path / file.path
            found = path.stat().st_size if path.exists() else None
            if found != file.bytes:
                what = "is missing" if found is None else f"has {found} bytes"
                raise EaftflowError(
                    f"Part file {path} {what}, its commit record says {file.bytes} bytes. {remedy}"
                )
    if run.complete and (expected := read_json(run.path / SUMMARY)["tokens"]) != run.tokens:
        raise EaftflowError(
            f"{run.path} holds {run.tokens:,} tokens, but its summary says {expected:,}: the last "
            f"part's record is missing. {remedy}"
        )
