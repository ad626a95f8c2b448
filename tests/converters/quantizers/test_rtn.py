"""Rounding to nearest."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import pytest
from helpers import Maker, llama, qwen3_moe

from mint_mlx.base.errors import MintError
from mint_mlx.base.quant_config import QuantConfig
from mint_mlx.converters.quantizers.rtn import check_scales, quantize
from mint_mlx.jobs.convert import convert


@pytest.mark.parametrize("experts", [False, True])  # rounded row by row, and whole
def test_nvfp4_does_not_turn_small_weights_into_zeros(
    make: Maker, tmp_path: Path, experts: bool
) -> None:
    small = make(qwen3_moe(1) if experts else llama(1))
    for file in small.glob("*.safetensors"):
        tensors = mx.load(str(file))
        tiny = {name: a * 0.01 if "down_proj" in name else a for name, a in tensors.items()}
        mx.save_safetensors(str(file), tiny, metadata={"format": "pt"})
    with pytest.raises(MintError, match=r"down_proj has weights too small.*down_proj=mxfp4"):
        convert(str(small), uniform="nvfp4", out=tmp_path / "out", smoke=False)

    # What the message offers works.
    more = {"overrides": ["down_proj=mxfp4"], "force": True}
    convert(str(small), uniform="nvfp4", out=tmp_path / "out", smoke=False, **more)


def test_affine_scales_do_not_turn_small_weights_into_zeros() -> None:
    weight = mx.random.normal((8, 128), key=mx.random.key(1)).astype(mx.bfloat16)
    config = QuantConfig(4, 64)
    for factor, is_lost in ((1, False), (1e-6, False), (1e-8, True), (0, False)):
        small = weight * factor
        refused = pytest.raises(MintError, match=r"100% of its groups.* --override 'x=keep'")
        with refused if is_lost else nullcontext():
            check_scales("x", small, quantize(small, config), config)

    # Groups that are small beside the others may go, and codes whose scales are smaller may stay.
    mixed = mx.concatenate([weight, weight * 1e-8])
    check_scales("x", mixed, quantize(mixed, config), config)
    scales = mx.full((8, 2), 1e-9)
    check_scales("x", weight * 1e-8, {"scales": scales, "biases": -8 * scales}, config)
