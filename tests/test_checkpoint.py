"""Reading headers, the fingerprint, the byte-range writer, editing JSON as text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eaftflow.checkpoint import (
    CONFIG,
    INDEX,
    SINGLE,
    Piece,
    edit_index,
    edit_numbers,
    fingerprint,
    lay_out,
    read_checkpoint,
    read_shard,
    write_shard,
)
from eaftflow.errors import EaftflowError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_single(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text('{"model_type": "mixtral"}')
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def write_sharded(folder: Path, *shards: dict[str, torch.Tensor], **metadata: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text('{"model_type": "mixtral"}')
    for name, tensors in zip(SHARDS, shards, strict=True):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = {
        tensor: name for name, tensors in zip(SHARDS, shards, strict=True) for tensor in tensors
    }
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return folder


def write_raw(path: Path, header: str, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)


# --- the fingerprint -------------------------------------------------------------------------


def test_fingerprint_repeats_and_ignores_where_the_folder_is(tmp_path: Path) -> None:
    tensors = {"weight": torch.arange(600_000, dtype=torch.float32)}
    one = fingerprint(write_single(tmp_path / "one", tensors))
    assert one == fingerprint(write_single(tmp_path / "two", tensors))
    assert len(one) == 64


@pytest.mark.parametrize("size", [1_000, 600_000])
def test_fingerprint_tells_fine_tunes_apart(tmp_path: Path, size: int) -> None:
    weight = torch.randn(size)
    base = fingerprint(write_single(tmp_path / "base", {"weight": weight}))
    assert base != fingerprint(write_single(tmp_path / "tuned", {"weight": weight * 1.01}))
    assert base != fingerprint(write_single(tmp_path / "renamed", {"weights": weight}))


def test_fingerprint_depends_on_the_config(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "model", {"weight": torch.zeros(4)})
    before = fingerprint(folder)
    (folder / CONFIG).write_text('{"model_type": "olmoe"}')
    assert fingerprint(folder) != before


# --- what is refused -------------------------------------------------------------------------


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(EaftflowError, match="no safetensors checkpoint"):
        read_checkpoint(tmp_path)


def test_folder_without_config(tmp_path: Path) -> None:
    for read in (read_checkpoint, fingerprint):
        with pytest.raises(EaftflowError, match=r"no config\.json"):
            read(tmp_path / "nowhere")


@pytest.mark.parametrize("data", [b"{,}", b"[]", b'{"name": "\xff"}'])
def test_broken_config(tmp_path: Path, data: bytes) -> None:
    folder = write_single(tmp_path, {"a": torch.zeros(2)})
    (folder / CONFIG).write_bytes(data)
    with pytest.raises(EaftflowError, match=r"config\.json is not a config in JSON"):
        read_checkpoint(folder)


@pytest.mark.parametrize("cut", [1, 20, 10_000])
def test_truncated_shard(tmp_path: Path, cut: int) -> None:
    folder = write_single(tmp_path, {"weight": torch.zeros(100)})
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-cut])
    for read in (read_checkpoint, fingerprint):
        with pytest.raises(EaftflowError, match=r"model\.safetensors is truncated"):
            read(folder)


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    folder = write_single(tmp_path, {"weight": torch.zeros(100)})
    with (folder / SINGLE).open("ab") as file:
        file.write(b"more")
    with pytest.raises(EaftflowError, match="bytes after its last tensor"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "has 4 bytes"),
        ('{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', "unknown dtype F99"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "a gap or an overlap"),
        ('{"a": {"shape": [1], "data_offsets": [0, 4]}}', "dtype"),
        ('{"a": 1}', "broken safetensors header"),
        ("[]", "broken safetensors header"),
        ("not JSON", "broken safetensors header"),
        (
            '{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},'
            ' "a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}',
            "a appears twice",
        ),
    ],
)
def test_broken_header(tmp_path: Path, header: str, reason: str) -> None:
    write_raw(tmp_path / SINGLE, header, bytes(8))
    with pytest.raises(EaftflowError, match=reason):
        read_shard(tmp_path, SINGLE)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "..\\model"])
def test_index_that_leaves_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"weight": name}}))
    with pytest.raises(EaftflowError, match="lies outside the folder"):
        read_checkpoint(tmp_path)


def test_index_naming_a_missing_file(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, {"a": torch.zeros(2)}, {"b": torch.zeros(2)})
    (folder / SHARDS[1]).unlink()
    with pytest.raises(EaftflowError, match=f"{SHARDS[1]}, which is missing"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(EaftflowError, match="is not a safetensors index"):
        read_checkpoint(tmp_path)


def test_index_that_misplaces_a_tensor(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, {"a": torch.zeros(2)}, {"b": torch.zeros(2)})
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"b"', '"c"'))
    with pytest.raises(EaftflowError, match="places the tensor c"):
        read_checkpoint(folder)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = write_sharded(
        tmp_path, {"a": torch.zeros(2), "b": torch.zeros(2)}, {"a": torch.ones(2)}
    )
    with pytest.raises(EaftflowError, match="holds the tensor a twice"):
        read_checkpoint(folder)


# --- writing ---------------------------------------------------------------------------------


def test_rows_become_joined_byte_ranges(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(8, 4)}, tmp_path / SINGLE)
    (tensor,) = read_shard(tmp_path, SINGLE).tensors
    piece = Piece(tensor=tensor, name="weight", rows=(0, 1, 2, 5, 7))
    row = 16
    ranges = [(start - tensor.start, stop - tensor.start) for start, stop in piece.ranges()]
    assert ranges == [(0, 3 * row), (5 * row, 6 * row), (7 * row, 8 * row)]
    assert piece.shape == (5, 4)
    assert piece.bytes == 5 * row


def test_whole_pieces_give_the_same_file(tmp_path: Path) -> None:
    tensors = {
        "b.é": torch.randn(3, 5).bfloat16(),
        "a": torch.randn(7),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt", "note": "ü"})
    shard = read_shard(tmp_path, SINGLE)
    pieces = [Piece(tensor=tensor, name=tensor.name) for tensor in shard.tensors]
    write_shard(shard, pieces, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / SINGLE).read_bytes()


def test_a_foreign_header_is_kept_when_nothing_changes(tmp_path: Path) -> None:
    header = '{ "a" : {"shape": [2], "dtype": "U8", "data_offsets": [0, 2]},  "__metadata__": {} }'
    write_raw(tmp_path / SINGLE, header, b"xy")
    shard = read_shard(tmp_path, SINGLE)
    write_shard(shard, [Piece(tensor=shard.tensors[0], name="a")], tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / SINGLE).read_bytes()


def test_sliced_and_renamed_tensors_load(tmp_path: Path) -> None:
    tensors = {"fused": torch.randn(6, 3, 2), "one": torch.randn(4), "gone": torch.randn(4)}
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    shard = read_shard(tmp_path, SINGLE)
    by_name = {tensor.name: tensor for tensor in shard.tensors}
    pieces = [
        Piece(tensor=by_name["fused"], name="fused", rows=(1, 2, 5)),
        Piece(tensor=by_name["one"], name="two"),
    ]
    told: list[int] = []
    write_shard(shard, pieces, tmp_path / "new.safetensors", progress=told.append)
    loaded = load_file(tmp_path / "new.safetensors")
    assert set(loaded) == {"fused", "two"}
    assert torch.equal(loaded["fused"], tensors["fused"][[1, 2, 5]])
    assert torch.equal(loaded["two"], tensors["one"])
    assert sum(told) == sum(piece.bytes for piece in pieces)
    assert read_shard(tmp_path, "new.safetensors").metadata == {"format": "pt"}


def test_tensors_stay_aligned_when_rows_are_cut(tmp_path: Path) -> None:
    """A foreign file may hold bf16 before float32; an odd number of rows would shift the latter."""
    header = json.dumps(
        {
            "bias": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]},
            "weight": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        }
    )
    weight = torch.tensor([1.5, -2.0])
    write_raw(tmp_path / SINGLE, header, bytes(8) + weight.numpy().tobytes())
    shard = read_shard(tmp_path, SINGLE)
    bias, stored = shard.tensors
    pieces = [Piece(tensor=bias, name="bias", rows=(0, 2, 3)), Piece(tensor=stored, name="weight")]
    write_shard(shard, pieces, tmp_path / "new.safetensors")
    assert [piece.name for piece in lay_out(shard, pieces)[1]] == ["weight", "bias"]
    assert torch.equal(load_file(tmp_path / "new.safetensors")["weight"], weight)


def test_a_source_that_changed_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / SINGLE)
    shard = read_shard(tmp_path, SINGLE)
    save_file({"b": torch.zeros(4)}, tmp_path / SINGLE)
    with pytest.raises(EaftflowError, match="changed after it was planned"):
        write_shard(shard, [Piece(tensor=shard.tensors[0], name="a")], tmp_path / "copy")


# --- the index and the config as text --------------------------------------------------------


def test_index_follows_the_pieces(tmp_path: Path) -> None:
    folder = write_sharded(
        tmp_path,
        {"fused": torch.zeros(4, 3), "other": torch.zeros(2)},
        {"one": torch.zeros(5), "gone": torch.zeros(7)},
        total_parameters=26,
        total_size=104,
        note="kept",
    )
    checkpoint = read_checkpoint(folder)
    by_name = {tensor.name: tensor for shard in checkpoint.shards for tensor in shard.tensors}
    pieces = {
        SHARDS[0]: [
            Piece(tensor=by_name["fused"], name="fused", rows=(0, 3)),
            Piece(tensor=by_name["other"], name="other"),
        ],
        SHARDS[1]: [Piece(tensor=by_name["one"], name="two")],
    }
    assert json.loads(edit_index(checkpoint, pieces)) == {
        "metadata": {"total_parameters": 13, "total_size": 52, "note": "kept"},
        "weight_map": {"fused": SHARDS[0], "other": SHARDS[0], "two": SHARDS[1]},
    }


def test_index_keeps_its_bytes_when_nothing_changes(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, {"a": torch.zeros(2)}, {"b": torch.zeros(2)}, total_size=-1)
    checkpoint = read_checkpoint(folder)
    pieces = {
        shard.name: [Piece(tensor=tensor, name=tensor.name) for tensor in shard.tensors]
        for shard in checkpoint.shards
    }
    assert edit_index(checkpoint, pieces) == (folder / INDEX).read_text()


def test_edit_numbers_changes_the_numbers_and_nothing_else() -> None:
    text = (
        ' {\r\n\t"num_experts" :8, "name": "num_experts\\": 8, é", "list": [{"num_experts": 8}],\n'
        '"text_config": { "num_experts" : 8 ,"eps": 1e-06}, "empty": {}, "num_experts_":8 }\n'
    )
    assert edit_numbers(text, {"num_experts": 16}) == text.replace(":8,", ":16,", 1)
    assert edit_numbers(text, {"text_config.num_experts": 4}) == text.replace(" : 8 ", " : 4 ")
    assert edit_numbers(text, {"absent": 1, "num_experts": 8}) == text
    assert edit_numbers("{}", {"num_experts": 8}) == "{}"
