"""Bytes of a quantized source that stand for NaN are found as its layers are read."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from helpers import Maker, Weights, edit_weights, llama

from mint_mlx.base.errors import MintError
from mint_mlx.base.quant_config import mx_mode
from mint_mlx.checkpoint.arrays import has_nan_codes
from mint_mlx.jobs.convert import convert

UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("mode", "name", "byte"),
    [("mxfp4", "scales", 255), ("nvfp4", "scales", 0xFF), ("mxfp8", "weight", 0x7F)],
)
def test_bytes_that_stand_for_nan(mode: str, name: str, byte: int) -> None:
    config = mx_mode(mode)
    weight, scales = mx.quantize(mx.random.normal((8, 64)), config.group_size, mode=mode)
    tensors = {"weight": weight, "scales": scales}
    assert not has_nan_codes(tensors, config)
    spoiled = tensors[name].view(mx.uint8)
    spoiled[3, 1] = byte
    assert has_nan_codes(tensors | {name: spoiled.view(tensors[name].dtype)}, config)


def test_it_is_the_source_that_is_called_damaged(make: Maker, tmp_path: Path) -> None:
    options = {"uniform": "mxfp4", "out": tmp_path / "source", "smoke": False}
    folder = convert(str(make(llama(1))), **options).path

    def spoiled(weights: Weights) -> Weights:
        weights[f"{UP}.scales"][1, 0] = 255
        return weights

    edit_weights(folder, spoiled)
    for uniform in ("keep", "4bit-g32", "mxfp4"):
        with pytest.raises(MintError, match=f"{UP} holds NaN or infinite values"):
            convert(str(folder), uniform=uniform, out=tmp_path / uniform, smoke=False, force=True)
