"""Weights that a type can't hold are called that, and not damaged; finite ones are converted."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import Maker, edit_config, llama, qwen3_moe, spoil_weight

from mint_mlx.base.errors import MintError
from mint_mlx.base.quant_config import QuantConfig
from mint_mlx.jobs.convert import convert
from mint_mlx.measure.distortion import measure

UP = "model.layers.0.mlp.up_proj.weight"
EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"
TOO_LARGE = "holds weights above 65504, which float16 cannot hold: bfloat16 can"


@pytest.mark.parametrize(
    "options", [{"uniform": "4bit-g32"}, {"uniform": "keep"}, {"budget": "6bpw"}]
)
@pytest.mark.parametrize("experts", [False, True])  # stacked ones are read whole
def test_weights_that_float16_cannot_hold_are_not_called_damaged(
    make: Maker, tmp_path: Path, options: dict[str, str], experts: bool
) -> None:
    folder = make(qwen3_moe(1) if experts else llama(1))
    edit_config(folder, torch_dtype="float16")
    spoil_weight(folder, EXPERT if experts else UP, 1e5)
    with pytest.raises(MintError, match=f"up_proj.weight {TOO_LARGE}"):
        convert(str(folder), out=tmp_path / "out", smoke=False, **options)
    assert not (tmp_path / "out").exists()


def test_allowing_what_is_not_finite_does_not_make_infinities(make: Maker, tmp_path: Path) -> None:
    folder = make(llama(1))
    edit_config(folder, torch_dtype="float16")
    spoil_weight(folder, UP, 1e5)
    options = {"uniform": "keep", "effort": "fast", "allow_nonfinite": True}
    with pytest.raises(MintError, match=TOO_LARGE):
        convert(str(folder), out=tmp_path / "out", smoke=False, **options)


def test_finite_weights_are_converted_however_large(make: Maker, tmp_path: Path) -> None:
    folder = make(llama(1))
    spoil_weight(folder, UP, 3e38)  # squares beyond float32, and with -3e38 the range as well
    spoil_weight(folder, UP.replace("up", "gate"), -3e38)
    result = convert(str(folder), "8bpw", tmp_path / "out", effort="fast", smoke=False)
    for name, array in mx.load(str(result.path / "model.safetensors")).items():
        if mx.issubdtype(array.dtype, mx.floating):
            assert mx.all(mx.isfinite(array)), name


def test_the_errors_of_large_weights_are_measured() -> None:
    weight = mx.array(np.random.default_rng(0).normal(size=(8, 64)), dtype=mx.bfloat16)
    configs = [QuantConfig(4, 64), QuantConfig(8, 32)]
    nmse, energy = measure(weight, configs)
    large, large_energy = measure(weight * 2.0**100, configs)
    np.testing.assert_allclose(large, nmse, rtol=1e-5)
    np.testing.assert_allclose(large_energy, energy * 2.0**200, rtol=1e-5)
