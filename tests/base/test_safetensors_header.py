"""Safetensors headers from strangers are refused before anything is mapped."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers import Maker, llama, rewrite_shards
from mlx.utils import tree_flatten

from mint_mlx.base.errors import MintError
from mint_mlx.base.safetensors_header import index_notes, read_folder, read_header
from mint_mlx.checkpoint.mlxlm import build_model
from mint_mlx.checkpoint.straight import straight_parameters


def write(path: Path, header: Any, data: int, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data))
    return path


def entry(
    dtype: str = "BF16", shape: tuple[Any, ...] = (4,), start: int = 0, end: int = 8
) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_a_good_header_is_read(tmp_path: Path) -> None:
    tensors, data = read_header(
        write(tmp_path / "a.safetensors", {"x": entry(), "__metadata__": {"format": "pt"}}, 8)
    )
    assert tensors["x"].shape == (4,)
    assert data + 8 == (tmp_path / "a.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("header", "data", "problem"),
    [
        ({"x": entry()}, 7, "truncated"),
        ({"x": entry()}, 9, "longer"),
        ({"x": entry(end=6)}, 6, r"shape \[4\] takes 8"),
        ({"x": entry(), "y": entry()}, 8, "overlaps"),
        ({"x": entry(start=8, end=16)}, 16, "gap"),
        ({"x": entry(dtype="Q4")}, 8, "unknown type"),
        ({"x": entry(shape=(-4,))}, 8, "impossible"),
        ({"x": entry(shape=(4.0,))}, 8, "impossible"),
        ({"x": {"dtype": "BF16"}}, 8, "malformed"),
        ({"x": 3}, 8, "malformed"),
        ([1, 2], 0, "not a table"),
        (b"{not json", 0, "not JSON"),
        (b"[" * 100_000, 0, "not JSON"),
    ],
)
def test_bad_headers_are_refused(tmp_path: Path, header: Any, data: int, problem: str) -> None:
    with pytest.raises(MintError, match=problem):
        read_header(write(tmp_path / "a.safetensors", header, data))


@pytest.mark.parametrize(
    ("length", "problem"), [(2**63, "header length"), (10**6, "truncated inside"), (0, "length")]
)
def test_impossible_header_lengths_are_refused(tmp_path: Path, length: int, problem: str) -> None:
    with pytest.raises(MintError, match=problem):
        read_header(write(tmp_path / "a.safetensors", {"x": entry()}, 8, length))


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "..", ""]
)
def test_an_index_cannot_point_outside(make: Maker, name: str) -> None:
    folder = make(llama(1))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": name}})
    )
    with pytest.raises(MintError, match="refused"):
        read_folder(folder)


def test_a_missing_shard_is_named(make: Maker) -> None:
    folder = make(llama(1), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(MintError, match=r"model-00002-of-00003\.safetensors is missing"):
        read_folder(folder)


def test_a_shard_that_is_there_under_another_name_is_not_called_missing(make: Maker) -> None:
    folder = make(llama(1), shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.rename(folder / "weights-2.safetensors")
    with pytest.raises(MintError, match=r"its tensors are in weights-2\.safetensors: rename"):
        read_folder(folder)

    # With only some of the tensors, the others are missing.
    write(folder / "weights-2.safetensors", {"lm_head.weight": entry()}, 8)
    with pytest.raises(MintError, match="is missing"):
        read_folder(folder)


def test_an_index_that_is_out_of_date_is_a_note(make: Maker) -> None:
    """Whether it swaps tensors between shards, or names shards that were merged since."""
    folder = make(llama(1), shards=2)
    assert index_notes(folder, read_folder(folder)) == []
    expected = {tensor for table in read_folder(folder).values() for tensor in table}
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())["weight_map"]
    table["lm_head.weight"], table["model.norm.weight"] = (
        table["model.norm.weight"],
        table["lm_head.weight"],
    )
    index.write_text(json.dumps({"weight_map": table}))
    headers = read_folder(folder)
    assert {tensor for table in headers.values() for tensor in table} == expected
    assert ["2 such tensors" in note for note in index_notes(folder, headers)] == [True]

    text = index.read_text()
    rewrite_shards(folder, lambda tensors: None)
    index.write_text(text)
    headers = read_folder(folder)
    assert list(headers) == ["model.safetensors"]
    assert headers["model.safetensors"].keys() == expected
    assert "is out of date" in index_notes(folder, headers)[0]


def test_an_index_of_shards_that_are_gone_says_nothing_of_a_whole_file(make: Maker) -> None:
    """transformers reads `model.safetensors` whole, and so a head that the index doesn't list."""
    folder = make(llama(1), shards=2)
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())["weight_map"]
    rewrite_shards(folder, lambda tensors: None)
    del table["lm_head.weight"]
    index.write_text(json.dumps({"weight_map": table}))
    assert "lm_head.weight" in read_folder(folder)["model.safetensors"]


@pytest.mark.parametrize("shard", ["model-00001-of-00002.safetensors", "model-1.safetensors"])
def test_an_index_that_names_a_tensor_that_is_nowhere_is_refused(shard: str, make: Maker) -> None:
    folder = make(llama(1), shards=2)
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": table | {"lm_head.bias": shard}}))
    with pytest.raises(MintError, match=r"where it is not|model-1.safetensors is missing"):
        read_folder(folder)


def test_what_an_index_names_is_read_whatever_its_name(make: Maker) -> None:
    folder = make(llama(1), shards=2)
    expected = parameters(folder)
    index = folder / "model.safetensors.index.json"
    for file in folder.glob("model-*.safetensors"):
        file.rename(file.with_name(file.name.replace("model", "part")))
    text = index.read_text()
    index.write_text(text.replace("model-", "part-"))
    assert sorted(read_folder(folder)) == [f"part-0000{n}-of-00002.safetensors" for n in (1, 2)]
    actual = parameters(folder)
    assert actual.keys() == expected.keys()
    assert all(mx.array_equal(actual[name], array) for name, array in expected.items())
    assert sorted(read_folder(folder)) == sorted(row_files(folder))
    index.unlink()
    with pytest.raises(MintError, match=r"no model.* but part-00001-of-00002.safetensors"):
        read_folder(folder)


def parameters(folder: Path) -> dict[str, mx.array]:
    arrays = dict(tree_flatten(build_model(folder).parameters()))
    mx.eval(arrays)
    return arrays


def row_files(folder: Path) -> set[str]:
    return {file for tensors in straight_parameters(folder).values() for file, *_ in tensors}


def test_of_two_copies_the_index_decides(make: Maker) -> None:
    folder = make(llama(1), shards=2)
    expected = parameters(folder)
    zeros = {name: mx.zeros_like(array) for name, array in expected.items()}
    mx.save_safetensors(str(folder / "model-old.safetensors"), zeros)
    actual = parameters(folder)
    assert all(mx.array_equal(actual[name], array) for name, array in expected.items())
    headers = read_folder(folder)
    assert "model-old.safetensors" not in headers
    (note,) = index_notes(folder, headers)
    assert "model-old.safetensors holds a second copy" in note


def test_a_tensor_that_the_index_does_not_list_is_not_read_from_another_save(make: Maker) -> None:
    """As transformers reads a folder into which a smaller model was saved again."""
    folder = make(llama(1), shards=2)
    headers = read_folder(folder)
    mx.save_safetensors(str(folder / "model-00003-of-00003.safetensors"), {"late": mx.zeros((2,))})
    assert read_folder(folder) == headers
    (note,) = index_notes(folder, headers)
    assert note.startswith("model-00003-of-00003.safetensors is not read: the index doesn't name")


def test_a_whole_file_beside_shards_of_other_weights_is_refused(make: Maker) -> None:
    folder = make(llama(1), shards=2)
    arrays = {k: v for file in folder.glob("*.safetensors") for k, v in mx.load(str(file)).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    assert "model.safetensors" not in read_folder(folder)  # the same weights twice

    arrays["model.norm.weight"] = arrays["model.norm.weight"] * 2
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    with pytest.raises(MintError, match=r"two models: model\.norm\.weight .* delete"):
        read_folder(folder)


def test_two_copies_of_the_weights_are_refused(make: Maker) -> None:
    folder = make(llama(1))
    (folder / "model-copy.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(MintError, match="two copies"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("file", "problem"),
    [("x.gguf", "GGUF"), ("pytorch_model.bin", "PyTorch"), ("x.txt", "no model")],
)
def test_other_formats_are_named(tmp_path: Path, file: str, problem: str) -> None:
    (tmp_path / file).write_text("")
    with pytest.raises(MintError, match=problem):
        read_folder(tmp_path)
