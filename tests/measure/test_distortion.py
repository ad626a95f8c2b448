"""The error of MLX's own quantizer, for each expert."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mint_mlx.base.quant_config import MX_MODES, QuantConfig, affine, mx_mode
from mint_mlx.measure import distortion
from mint_mlx.measure.distortion import measure


def direct(weight: mx.array, config: QuantConfig) -> float:
    """The definition, in float64 numpy."""
    packed = mx.quantize(weight, config.group_size, config.bits, mode=config.mode)
    size = {"group_size": config.group_size, "bits": config.bits, "mode": config.mode}
    restored = mx.dequantize(*packed, **size)
    w, q = (np.asarray(a.astype(mx.float32), dtype=np.float64) for a in (weight, restored))
    return float(((w - q) ** 2).sum() / (w**2).sum())


@pytest.mark.parametrize("config", [*affine(), *(mx_mode(m) for m in MX_MODES)], ids=str)
def test_nmse_is_that_of_the_round_trip_for_each_expert(config: QuantConfig) -> None:
    draws = mx.random.normal((3, 24, 256), key=mx.random.key(0))
    weight = (draws * mx.array([[[1.0]], [[3.0]], [[0.1]]])).astype(mx.bfloat16)
    nmse, _ = measure(weight, [config])
    assert nmse.shape == (1, 3)
    expected = [direct(weight[expert], config) for expert in range(3)]
    np.testing.assert_allclose(nmse[0], expected, rtol=1e-4)


def test_chunks_do_not_change_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = mx.random.normal((2, 40, 128), key=mx.random.key(1)).astype(mx.bfloat16)
    whole, energy = measure(weight, affine())
    monkeypatch.setattr(distortion, "CHUNK", 1000)
    np.testing.assert_allclose(measure(weight, affine())[0], whole, rtol=1e-5)
    squares = np.array(weight.astype(mx.float32)) ** 2
    np.testing.assert_allclose(energy, squares.sum((-2, -1)), rtol=1e-4)


def test_an_expert_of_zeros_has_no_error() -> None:
    weight = mx.concatenate([mx.zeros((1, 8, 64)), mx.ones((1, 8, 64))]).astype(mx.bfloat16)
    assert measure(weight, [QuantConfig(2, 64)])[0][0, 0] == 0
