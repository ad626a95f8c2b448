"""Error feedback: less error at the output than rounding to nearest has."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mint_mlx.base.quant_config import QuantConfig, affine
from mint_mlx.converters.quantizers import gptq, rtn


def restore(packed: dict[str, mx.array], config: QuantConfig) -> np.ndarray:
    size = {"group_size": config.group_size, "bits": config.bits, "mode": config.mode}
    weight = mx.dequantize(packed["weight"], packed["scales"], packed.get("biases"), **size)
    return np.array(weight.astype(mx.float32))


@pytest.mark.parametrize("config", affine(groups=(32, 64)), ids=str)
def test_feedback_lowers_the_error_at_the_output(config: QuantConfig) -> None:
    rng = np.random.default_rng(0)
    weight = mx.array(rng.normal(size=(48, 128)).astype(np.float32) * 0.05).astype(mx.bfloat16)

    # Correlated inputs, as activations are.
    mix = rng.normal(size=(128, 128)) * np.geomspace(1, 0.05, 128)
    x = (rng.normal(size=(2000, 128)) @ mix).astype(np.float32)
    moment = x.T @ x / len(x)
    exact = np.array(weight.astype(mx.float32))

    def cost(packed: dict[str, mx.array]) -> float:
        error = restore(packed, config) - exact
        return float(np.einsum("ij,jk,ik->", error, moment, error))

    plain = rtn.quantize(weight, config)
    fed = gptq.quantize(weight, config, moment[None])
    forms = [{n: (a.shape, a.dtype) for n, a in packed.items()} for packed in (plain, fed)]
    assert forms[0] == forms[1]
    assert cost(fed) < 0.7 * cost(plain)


def test_without_correlation_feedback_is_rounding_to_nearest() -> None:
    config = QuantConfig(4, 32)
    weight = mx.array(np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32))
    fed = restore(gptq.quantize(weight, config, np.eye(64, dtype=np.float32)[None]), config)
    plain = restore(rtn.quantize(weight, config), config)
    np.testing.assert_allclose(fed, plain, atol=1e-6)


def test_what_has_no_inputs_or_no_grid_is_rounded_to_nearest() -> None:
    weight = mx.random.normal((8, 64), key=mx.random.key(0)).astype(mx.bfloat16)
    moments = np.eye(64, dtype=np.float32)[None]
    for config, known in (
        (QuantConfig(4, 32), None),
        (QuantConfig(4, 32, "mxfp4"), moments),
    ):
        fed = gptq.quantize(weight, config, known)
        plain = rtn.quantize(weight, config)
        assert all(mx.array_equal(fed[name], plain[name]) for name in plain)


def test_experts_are_shared_among_threads_and_each_gets_the_same_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    weight = mx.array(rng.normal(size=(8, 16, 64)).astype(np.float32))
    x = rng.normal(size=(8, 200, 64)).astype(np.float32)
    moments = x.swapaxes(1, 2) @ x
    assert len(gptq._places(8, 16)) == gptq.WORKERS
    assert len(gptq._places(3, 16)) == 3
    shared = gptq.find_codes(weight, QuantConfig(3, 32), moments, searched=True)
    monkeypatch.setattr(gptq, "WORKERS", 1)
    assert len(gptq._places(8, 16)) == 1
    together = gptq.find_codes(weight, QuantConfig(3, 32), moments, searched=True)
    np.testing.assert_array_equal(shared.codes, together.codes)
    assert mx.array_equal(shared.scales, together.scales)


def test_a_group_without_a_range_is_its_bias() -> None:
    """As a GPU may make it of numbers below the smallest that 16 bits hold."""
    weight = np.full((64, 1, 2), 1e-9, dtype=np.float32)
    scales = np.zeros((1, 2, 1), dtype=np.float32)
    biases = np.full((1, 2, 1), 1e-9, dtype=np.float32)
    factors = gptq._factors(np.eye(64, dtype=np.float32)[None])
    with np.errstate(all="raise"):
        codes, _ = gptq._feed_back(weight, scales, biases, factors, QuantConfig(4, 64))
    assert not codes.any()


def test_rows_are_measured_by_what_feedback_has_computed() -> None:
    """(w H w) / (w' H w) from the factors of H, as from H itself; tiny weights too."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 900, 320)).astype(np.float32) * np.linspace(0.2, 2, 320)
    moments = (x.swapaxes(1, 2) @ x).astype(np.float32)
    exact = rng.normal(size=(2, 16, 320)).astype(np.float32)
    exact[:, ::2] *= np.float32(1e-25)

    config = QuantConfig(2, 64)
    factors = gptq._factors(moments)
    ordered = gptq._ordered(exact, factors.order)
    scales, biases = gptq._grids(exact, mx.float32, config, moments)
    rounded, residuals = gptq._feed_back(ordered, scales, biases, factors, config)
    codes = gptq._as_rows(rounded, factors.order)
    stretch = gptq._row_factors(ordered, residuals, factors)[..., 0]

    restored = (
        codes.reshape(2, 16, 5, 64) * scales[..., None].astype(np.float64) + biases[..., None]
    )
    damped = moments + 0.01 * np.eye(320) * np.trace(moments, axis1=1, axis2=2)[:, None, None] / 320
    weighted = exact.astype(np.float64) @ damped
    energy = np.einsum("erc,erc->er", weighted, exact)
    product = np.einsum("erc,erc->er", weighted, restored.reshape(exact.shape))
    np.testing.assert_allclose(stretch, energy / product, rtol=2e-4)
    assert (stretch > 1.005).all()
