"""A safetensors checkpoint on disk: its config, index and headers, its fingerprint, its writing.

Everything is planned from headers; tensor data moves as byte ranges through one small buffer, so
memory is the same for a model of any size, and no value is ever decoded. What a tensor means is the
business of `architectures`, what to do with it that of `prune`.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, and the data,
without gaps:

    {"__metadata__": {...}, "<name>": {"dtype": "BF16", "shape": [2, 16], "data_offsets": [0, 64]}}
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from eaftflow.errors import EaftflowError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPE_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}

_SAMPLES = 16
_SAMPLE_BYTES = 64 * 1024
_BUFFER_BYTES = 1024 * 1024  # more is no faster
_METADATA = "__metadata__"


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A stored tensor; `start` and `stop` are byte positions in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One safetensors file: its name relative to the checkpoint, and what its header says."""

    name: str
    path: Path
    header: bytes  # the JSON as stored, padding included
    metadata: Mapping[str, str] | None
    tensors: tuple[Tensor, ...]  # in the order of their data

    @property
    def file_bytes(self) -> int:
        """The size of the file."""
        return self.tensors[-1].stop if self.tensors else 8 + len(self.header)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose config, index and headers are read and agree with its files."""

    folder: Path
    config_text: str
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]  # sorted by name
    index: Mapping[str, Any] | None  # None where one file holds everything


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What is written of one stored tensor: under which name, and which rows of dimension 0."""

    tensor: Tensor
    name: str
    rows: tuple[int, ...] | None = None  # ascending; None takes the tensor whole

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as written."""
        if self.rows is None:
            return self.tensor.shape
        return (len(self.rows), *self.tensor.shape[1:])

    @property
    def bytes(self) -> int:
        """The size of the data as written."""
        return sum(stop - start for start, stop in self.ranges())

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The byte ranges of the source file to write one after another, neighbours joined."""
        first, last = self.tensor.start, self.tensor.stop
        if self.rows is None:
            yield first, last
            return
        row_bytes = (last - first) // self.tensor.shape[0]
        begin = None
        for row, following in zip(self.rows, (*self.rows[1:], None), strict=True):
            begin = row if begin is None else begin
            if following != row + 1:
                yield first + begin * row_bytes, first + (row + 1) * row_bytes
                begin = None


def fingerprint(folder: Path) -> str:
    """The identity of the checkpoint in `folder`: 64 hexadecimal digits, cheap at any size.

    SHA-256 over the bytes of config.json and, for each shard sorted by name, its name, its size,
    its header and 16 evenly spaced 64 KiB **samples** of its data; shards of up to 1 MiB of data
    are read whole. It tells fine-tunes of one base model apart, because training moves nearly all
    weights; it does not prove that two checkpoints are equal byte for byte.

    Raises EaftflowError where the folder holds no readable safetensors checkpoint, or a shard is
    truncated.
    """
    digest = hashlib.sha256()
    digest.update(_read_config(folder))
    for name in shard_names(folder):
        shard = read_shard(folder, name)
        digest.update(json.dumps([name, shard.file_bytes]).encode())
        digest.update(shard.header)
        first = 8 + len(shard.header)
        data_bytes = shard.file_bytes - first
        with shard.path.open("rb") as file:
            file.seek(first)
            if data_bytes <= _SAMPLES * _SAMPLE_BYTES:
                digest.update(file.read())
                continue
            for sample in range(_SAMPLES):
                file.seek(first + sample * (data_bytes - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def shard_names(folder: Path) -> tuple[str, ...]:
    """The shards of the checkpoint in `folder`, sorted, as paths relative to it.

    As transformers does, `model.safetensors` is taken before an index. Raises EaftflowError where
    there is neither, or where the index names a file that is missing or lies outside the folder.
    """
    if (folder / SINGLE).is_file():
        return (SINGLE,)
    if not (folder / INDEX).is_file():
        raise EaftflowError(
            f"{folder} holds no safetensors checkpoint: neither {SINGLE} nor {INDEX} is there. "
            "Give a folder that transformers can load; convert other weight formats first."
        )
    names = sorted(set(_read_index(folder)["weight_map"].values()))
    for name in names:
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or "\\" in name:
            raise EaftflowError(
                f"{folder / INDEX} names the shard {name!r}, which lies outside the folder. "
                "Such an index is broken or hostile; get the checkpoint from its publisher."
            )
        if not (folder / name).is_file():
            raise EaftflowError(
                f"{folder / INDEX} names the shard {name}, which is missing. "
                "Complete the download of the checkpoint."
            )
    return tuple(names)


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, from its config, index and headers alone.

    Raises EaftflowError where one is missing or broken, a shard is truncated, two shards hold a
    tensor of the same name, or the index and the headers disagree.
    """
    data = _read_config(folder)
    try:
        config_text = data.decode()
        config = json.loads(config_text)
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise EaftflowError(
            f"{folder / CONFIG} is not a config in JSON ({error}). Restore the file."
        ) from error
    shards = tuple(read_shard(folder, name) for name in shard_names(folder))
    homes: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in homes:
                raise EaftflowError(
                    f"{folder} holds the tensor {tensor.name} twice, in {homes[tensor.name]} and "
                    f"in {shard.name}. Remove the shard that does not belong to the checkpoint."
                )
            homes[tensor.name] = shard.name
    index = None if (folder / SINGLE).is_file() else _read_index(folder)
    for name, home in index["weight_map"].items() if index else ():
        if homes.get(name) != home:
            raise EaftflowError(
                f"{folder / INDEX} places the tensor {name} in {home}, which does not hold it. "
                "Restore the index, or the shard."
            )
    return Checkpoint(
        folder=folder, config_text=config_text, config=config, shards=shards, index=index
    )


def read_shard(folder: Path, name: str) -> Shard:
    """The shard `name` of `folder`, from its header.

    Raises EaftflowError where the header is broken or does not fit the file.
    """
    path = folder / name
    header = _read_header(path)
    try:
        entries = json.loads(header, object_pairs_hook=_without_duplicates)
        metadata = entries.pop(_METADATA, None)
        first = 8 + len(header)
        tensors = sorted(
            (_parse_tensor(name, entry, first) for name, entry in entries.items()),
            key=lambda tensor: (tensor.start, tensor.stop),
        )
        _check_layout(tensors, first)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EaftflowError(
            f"{path} has a broken safetensors header ({error}). Download it again."
        ) from error
    shard = Shard(name=name, path=path, header=header, metadata=metadata, tensors=tuple(tensors))
    size = path.stat().st_size
    if size != shard.file_bytes:
        what = "is truncated" if size < shard.file_bytes else "has bytes after its last tensor"
        raise EaftflowError(
            f"{path} {what}: it has {size} bytes, its header describes {shard.file_bytes}. "
            "Download it again."
        )
    return shard


def lay_out(shard: Shard, pieces: Sequence[Piece]) -> tuple[bytes, tuple[Piece, ...]]:
    """The header of the file that holds `pieces` of `shard`, and the pieces in its data's order.

    The order is the given one, unless cutting rows leaves a tensor unaligned to its dtype: then
    wide dtypes come first. Where nothing changes, the header is the shard's own, byte for byte.
    """
    if not _aligned(pieces):
        pieces = sorted(pieces, key=lambda piece: -DTYPE_BITS[piece.tensor.dtype])
    entries: dict[str, Any] = {} if shard.metadata is None else {_METADATA: shard.metadata}
    stop = 0
    for piece in pieces:
        start, stop = stop, stop + piece.bytes
        entries[piece.name] = {
            "dtype": piece.tensor.dtype,
            "shape": list(piece.shape),
            "data_offsets": [start, stop],
        }
    if entries == json.loads(shard.header):
        return shard.header, tuple(pieces)
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8), tuple(pieces)


def write_shard(
    shard: Shard,
    pieces: Sequence[Piece],
    target: Path,
    *,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Write the new file `target` that holds `pieces` of `shard`. The disk may still be busy.

    `progress` is told the bytes of each write. Raises EaftflowError where the source is no longer
    the file whose header was read; an OSError passes through.
    """
    if _read_header(shard.path) != shard.header:
        raise EaftflowError(f"{shard.path} changed after it was planned from. Start again.")
    header, pieces = lay_out(shard, pieces)
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    with shard.path.open("rb", buffering=0) as source, target.open("xb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for piece in pieces:
            for start, stop in piece.ranges():
                for count in _copy_range(source, file, start, stop, buffer):
                    progress(count)


def edit_index(checkpoint: Checkpoint, pieces: Mapping[str, Sequence[Piece]]) -> str:
    """The text of the index for a checkpoint rewritten as `pieces`, by shard name.

    `total_size`, and `total_parameters` where there is one, are brought up to date; tensors keep
    their order. Where no tensor changes, the text is the index's own.
    """
    assert checkpoint.index is not None, "a checkpoint of one file has no index"
    stored = [tensor for shard in checkpoint.shards for tensor in shard.tensors]
    written = {piece.tensor.name: piece for cut in pieces.values() for piece in cut}
    if len(written) == len(stored) and all(
        piece.rows is None and piece.name == name for name, piece in written.items()
    ):
        return (checkpoint.folder / INDEX).read_bytes().decode()
    metadata = dict(checkpoint.index.get("metadata") or {})
    metadata["total_size"] = sum(piece.bytes for piece in written.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] += sum(math.prod(piece.shape) for piece in written.values())
        metadata["total_parameters"] -= sum(math.prod(tensor.shape) for tensor in stored)
    weight_map = {
        written[name].name: home
        for name, home in checkpoint.index["weight_map"].items()
        if name in written
    }
    index = {**checkpoint.index, "metadata": metadata, "weight_map": weight_map}
    return json.dumps(index, indent=2, ensure_ascii=False) + "\n"


def edit_numbers(text: str, values: Mapping[str, int]) -> str:
    """The JSON object `text` with the values at some keys replaced, every other character kept.

    Keys are paths with dots, such as `num_experts` or `text_config.num_experts`. Keys that the
    text lacks are ignored.
    """
    edited, position = [], 0
    for key, start, stop in _value_spans(text, text.index("{"), ""):
        if key in values:
            edited += [text[position:start], str(values[key])]
            position = stop
    return "".join(edited) + text[position:]


def _read_config(folder: Path) -> bytes:
    try:
        return (folder / CONFIG).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise EaftflowError(
            f"{folder} is not a model folder: it has no {CONFIG}. "
            "Give the folder of a transformers checkpoint."
        ) from None


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        weight_map = index["weight_map"]
        if not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError("`weight_map` must name a file for each tensor")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EaftflowError(
            f"{path} is not a safetensors index ({error}). Restore the file."
        ) from error
    return dict(index)


def _read_header(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise EaftflowError(
                f"{path} is truncated or no safetensors file: it has {size} bytes, its header "
                f"claims {length}. Download it again."
            )
        return file.read(length)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} appears twice")
    return value


def _parse_tensor(name: str, entry: Mapping[str, Any], first: int) -> Tensor:
    shape = tuple(int(length) for length in entry["shape"])
    start, stop = entry["data_offsets"]
    bits = DTYPE_BITS.get(entry["dtype"])
    if bits is None:
        raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
    if (stop - start) * 8 != math.prod(shape) * bits:
        raise ValueError(f"{name}, {entry['dtype']} {list(shape)}, has {stop - start} bytes")
    return Tensor(
        name=name, dtype=entry["dtype"], shape=shape, start=first + start, stop=first + stop
    )


def _check_layout(tensors: Sequence[Tensor], first: int) -> None:
    for tensor in tensors:
        if tensor.start != first:
            raise ValueError(f"a gap or an overlap before {tensor.name}")
        first = tensor.stop


def _aligned(pieces: Sequence[Piece]) -> bool:
    position = 0
    for piece in pieces:
        if position * 8 % DTYPE_BITS[piece.tensor.dtype]:
            return False
        position += piece.bytes
    return True


def _copy_range(
    source: FileIO, target: BinaryIO, start: int, stop: int, buffer: memoryview
) -> Iterator[int]:
    source.seek(start)
    while start < stop:
        count = source.readinto(buffer[: stop - start])
        if not count:
            raise EaftflowError(f"{source.name} became shorter while it was read. Start again.")
        target.write(buffer[:count])
        start += count
        yield count


_DECODER = json.JSONDecoder()
_BLANKS = re.compile(r"[ \t\r\n]*")


def _value_spans(text: str, position: int, prefix: str) -> Iterator[tuple[str, int, int]]:
    """Key, start and stop of each value in the object that opens at `position`, nested ones too."""
    position = _skip_blanks(text, position + 1)
    while text[position] != "}":
        key, position = _DECODER.raw_decode(text, position)
        position = _skip_blanks(text, position) + 1  # the colon
        start = _skip_blanks(text, position)
        value, position = _DECODER.raw_decode(text, start)
        if isinstance(value, dict):
            yield from _value_spans(text, start, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", start, position
        position = _skip_blanks(text, position)
        if text[position] == ",":
            position = _skip_blanks(text, position + 1)


def _skip_blanks(text: str, position: int) -> int:
    match = _BLANKS.match(text, position)
    return match.end() if match else position
