"""Tensors of a written checkpoint are replaced in place, or nothing is changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mint_mlx.base.errors import MintError
from mint_mlx.converters.output.refined import hashes_of
from mint_mlx.converters.output.replace_tensors import replace_tensors
from mint_mlx.converters.output.verify import verify_copy

NAMES = ("a.scales", "a.biases", "b.scales")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two shards; each tensor has its number in all places."""
    arrays = {name: mx.full((2, 4), i, mx.bfloat16) for i, name in enumerate(NAMES)}
    for shard, names in enumerate((NAMES[:2], NAMES[2:]), start=1):
        file = tmp_path / f"model-{shard:05d}-of-00002.safetensors"
        mx.save_safetensors(str(file), {name: arrays[name] for name in names})
    return tmp_path


def values(folder: Path) -> dict[str, float]:
    read = {}
    for file in sorted(folder.glob("*.safetensors")):
        read |= {name: array.astype(mx.float32) for name, array in mx.load(str(file)).items()}
    assert all(mx.all(array == array[0, 0]).item() for array in read.values())
    return {name: array[0, 0].item() for name, array in read.items()}


def test_only_what_is_given_is_replaced(folder: Path) -> None:
    sizes = [file.stat().st_size for file in sorted(folder.iterdir())]
    new = {name: mx.full((2, 4), 7, mx.bfloat16) for name in ("a.biases", "b.scales")}
    replace_tensors(folder, new)
    assert values(folder) == {"a.scales": 0, "a.biases": 7, "b.scales": 7}
    assert [file.stat().st_size for file in sorted(folder.iterdir())] == sizes


def test_a_tensor_that_is_not_stored_is_refused(folder: Path) -> None:
    with pytest.raises(MintError, match=r"c\.scales under another name"):
        replace_tensors(folder, {"c.scales": mx.zeros((2, 4), mx.bfloat16)})
    assert values(folder) == {"a.scales": 0, "a.biases": 1, "b.scales": 2}


def test_a_tensor_of_another_form_is_refused_and_nothing_is_changed(folder: Path) -> None:
    with pytest.raises(MintError, match=r"a\.scales takes 16 bytes"):
        replace_tensors(folder, {"a.scales": mx.zeros((2, 4), mx.float32)})
    assert values(folder) == {"a.scales": 0, "a.biases": 1, "b.scales": 2}


def test_a_copy_that_is_read_back_differently_is_noticed(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("copy"))
    new = {"a.biases": mx.full((2, 4), 7, mx.bfloat16)}
    replace_tensors(copy, new)
    verify_copy(copy, folder, hashes_of(new))

    # A changed tensor, and one that nothing was to change.
    with pytest.raises(MintError, match=r"a\.biases .* is not what was written"):
        verify_copy(copy, folder, {})
    replace_tensors(copy, {"b.scales": mx.zeros((2, 4), mx.bfloat16)})
    with pytest.raises(MintError, match=r"b\.scales .* is not what was written"):
        verify_copy(copy, folder, hashes_of(new))
