"""The error of MLX's own quantizer, for each expert."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mint_mlx.base.quant_config import MX_MODES, QuantConfig, affine, mx_mode
from mint_mlx.measure import distortion
from mint_mlx.measure.distortion import measure, row_errors, row_ranges
from mint_mlx.runtime.device import on_cpu


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
    monkeypatch.setattr(distortion, "CHUNK_OF_NUMPY", 1000)
    np.testing.assert_allclose(measure(weight, affine())[0], whole, rtol=1e-5)
    squares = np.array(weight.astype(mx.float32)) ** 2
    np.testing.assert_allclose(energy, squares.sum((-2, -1)), rtol=1e-4)


def test_an_expert_of_zeros_has_no_error() -> None:
    weight = mx.concatenate([mx.zeros((1, 8, 64)), mx.ones((1, 8, 64))]).astype(mx.bfloat16)
    assert measure(weight, [QuantConfig(2, 64)])[0][0, 0] == 0


@pytest.mark.skipif(not on_cpu(), reason="on a GPU MLX measures all errors")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("weighted", [None, 1, 3])
def test_numpy_measures_what_mlx_does(dtype: mx.Dtype, weighted: int | None) -> None:
    weight = (mx.random.normal((3, 20, 256), key=mx.random.key(2)) * 0.02).astype(dtype)
    columns = None
    if weighted is not None:
        columns = np.random.default_rng(0).random((weighted, 256), dtype=np.float32)
    by_numpy = row_errors(weight, affine(), columns)
    by_mlx = distortion._errors_by_mlx(weight, affine(), columns)
    for sums, expected in zip(by_numpy, by_mlx, strict=True):
        assert (sums is None) == (expected is None)
        if sums is not None:
            np.testing.assert_allclose(sums, expected, rtol=1e-5)


def test_modes_keep_their_places_among_affine_configurations() -> None:
    weight = mx.random.normal((2, 8, 128), key=mx.random.key(3)).astype(mx.bfloat16)
    configs = [QuantConfig(4, 64), mx_mode("mxfp4"), QuantConfig(8, 32), mx_mode("nvfp4")]
    together = row_errors(weight, configs, np.ones((1, 128), dtype=np.float32))
    assert together.weighted_errors is not None
    for index, config in enumerate(configs):
        alone = row_errors(weight, [config])
        np.testing.assert_allclose(together.errors[index], alone.errors[0], rtol=1e-6)
        np.testing.assert_allclose(together.weighted_errors[index], alone.errors[0], rtol=1e-6)


def test_weights_beyond_float32_squares_are_left_to_mlx() -> None:
    weight = mx.random.normal((3, 8, 64), key=mx.random.key(4))
    weight = (weight * mx.array([1e25, 1.0, 1e-3])[:, None, None]).astype(mx.bfloat16)
    sums = row_errors(weight, [QuantConfig(4, 64)])
    assert np.isfinite(sums.energy).all()
    expected = [direct(weight[expert], QuantConfig(4, 64)) for expert in range(3)]
    nmse = sums.errors[0].sum(axis=-1) / sums.energy.sum(axis=-1)
    np.testing.assert_allclose(nmse, expected, rtol=1e-4)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
def test_ranges_are_those_of_each_groups_weights(dtype: mx.Dtype) -> None:
    weight = mx.random.normal((2, 5, 256), key=mx.random.key(5)).astype(dtype)
    ranges, energy = row_ranges(weight, [32, 128])
    exact = np.array(weight.astype(mx.float32))
    np.testing.assert_allclose(energy, np.square(exact).sum(axis=-1), rtol=1e-5)
    for sums, size in zip(ranges, (32, 128), strict=True):
        width = np.ptp(exact.reshape(2, 5, -1, size), axis=-1)
        np.testing.assert_allclose(sums, np.square(width).sum(axis=-1), rtol=1e-5)
