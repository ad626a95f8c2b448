"""A checkpoint is written in the 16-bit type of its tensors where its config states no other."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from helpers import Maker, edit_config, llama

from mint_mlx.checkpoint.layers import list_layers
from mint_mlx.checkpoint.source import load_source, open_model
from mint_mlx.jobs.convert import convert

FLOATS = (mx.float16, mx.bfloat16, mx.float32)


def arrays(folder: Path) -> dict[str, mx.array]:
    """All tensors of a checkpoint of one shard."""
    loaded: dict[str, mx.array] = mx.load(str(folder / "model.safetensors"))
    return loaded


def types(folder: Path) -> set[mx.Dtype]:
    """The types of a checkpoint's floating-point tensors."""
    return {array.dtype for array in arrays(folder).values() if array.dtype in FLOATS}


@pytest.mark.parametrize("stated", [None, "float32"])
def test_float16_beside_norms_in_float32(make: Maker, tmp_path: Path, stated: str | None) -> None:
    """MLX would compute in float32 where half of the tensors became bfloat16."""
    folder = make(llama(1), dtype=mx.float16)
    tensors = arrays(folder)
    mixed = {k: v.astype(mx.float32) if "norm" in k else v for k, v in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), mixed)
    edit_config(folder, torch_dtype=stated)

    source = load_source(str(folder))
    assert {layer.dtype for layer in list_layers(open_model(source), source.config).layers} == {
        "F16"
    }
    convert(str(folder), "5bpw", out=tmp_path / "out", effort="fast", smoke=False)
    assert types(tmp_path / "out") == {mx.float16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "float16"


def test_bfloat16_beside_float32_without_a_type(make: Maker, tmp_path: Path) -> None:
    folder = make(llama(1), dtype=mx.bfloat16)
    edit_config(folder, torch_dtype=None)
    convert(str(folder), "5bpw", out=tmp_path / "out", effort="fast", smoke=False)
    assert types(tmp_path / "out") == {mx.bfloat16}


def test_what_is_quantized_keeps_the_scales_that_it_has(make: Maker, tmp_path: Path) -> None:
    """`mlx_lm.convert --dtype float16` leaves `bfloat16` in config.json (mlx-lm 0.32)."""
    folder = make(llama(1), dtype=mx.float16)
    edit_config(folder, torch_dtype="float16")
    packed, kept = tmp_path / "packed", tmp_path / "kept"
    convert(str(folder), uniform="4bit-g64", out=packed, smoke=False)
    assert types(packed) == {mx.float16}
    edit_config(packed, torch_dtype="bfloat16")

    convert(str(packed), uniform="keep", out=kept, smoke=False)
    before, after = arrays(packed), arrays(kept)
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype
        assert mx.array_equal(array, after[name])
    assert json.loads((kept / "config.json").read_text())["torch_dtype"] == "float16"
