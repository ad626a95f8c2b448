"""What scales the inputs of a layer, learned from the stock model: scaled back, it is the same."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from families import write_family

from mint_mlx.checkpoint import mlxlm
from mint_mlx.runtime.input_scales import gain, trace

KNOWN = ("qwen3_moe", "gpt_oss", "deepseek_v3", "llama4", "olmoe", "gemma4_text", "mixtral")
"""Of these, routed experts after a reshape, latent attention, gains of their own, a clamped up."""


@pytest.mark.parametrize("family", KNOWN)
def test_scaling_a_gain_and_its_columns_back_changes_nothing(family: str, tmp_path: Path) -> None:
    model = mlxlm.build_model(write_family(tmp_path / family, family))
    model.set_dtype(mx.float32)
    tokens = mx.array([[3, 5, 7, 11, 2, 9]])
    before = model(tokens)
    scales = trace(model)
    modules = dict(model.named_modules())

    # All readers of a norm are known, else the function would change.
    factors: dict[str, mx.array] = {}
    rng = np.random.default_rng(0)
    for path, norm in scales.norms.items():
        columns = modules[path].weight.shape[-1]
        if norm not in factors:
            factors[norm] = mx.array(np.exp2(rng.integers(-2, 3, columns)).astype(np.float32))
            modules[norm].weight = modules[norm].weight / factors[norm]
        modules[path].weight = modules[path].weight * factors[norm]
    for path, up in scales.factors.items():
        factor = mx.array(np.exp2(rng.integers(-2, 3, modules[path].weight.shape[-1])))
        factor = factor.astype(mx.float32)
        modules[up].weight = modules[up].weight * factor[:, None]
        modules[path].weight = modules[path].weight / factor
    assert factors
    np.testing.assert_allclose(np.array(model(tokens)), np.array(before), rtol=2e-4, atol=2e-4)


def test_a_gain_is_what_the_norm_does_whatever_it_stores() -> None:
    class Plus(nn.RMSNorm):  # as Gemma's
        def __call__(self, x: mx.array) -> mx.array:
            return mx.fast.rms_norm(x, 1.0 + self.weight, self.eps)

    stored = mx.array(np.linspace(-0.5, 2, 64).astype(np.float32))
    plus, layer_norm = Plus(64), nn.LayerNorm(64)
    plus.weight = stored
    layer_norm.weight, layer_norm.bias = stored, 3 * stored
    np.testing.assert_allclose(gain(plus, 64), 1 + np.array(stored), rtol=1e-4)
    np.testing.assert_allclose(gain(layer_norm, 64), np.abs(np.array(stored)), rtol=1e-4)
