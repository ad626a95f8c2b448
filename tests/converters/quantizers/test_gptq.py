"""Error feedback: codes that MLX reads, less error at the output, and its inputs."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers import TOKENS, Maker, qwen3_moe
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_mlx.base.quant_config import QuantConfig, affine
from mint_mlx.converters.quantizers import gptq, rtn
from mint_mlx.converters.quantizers.codes import pack
from mint_mlx.converters.quantizers.inputs import Moments, block_inputs
from mint_mlx.jobs.model import prepare
from mint_mlx.measure.sensitivity import measure


def restore(packed: dict[str, mx.array], config: QuantConfig) -> np.ndarray:
    size = {"group_size": config.group_size, "bits": config.bits, "mode": config.mode}
    weight = mx.dequantize(packed["weight"], packed["scales"], packed.get("biases"), **size)
    return np.array(weight.astype(mx.float32))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_packed_codes_are_what_mlx_reads(bits: int, rows: int, groups: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, 32 * groups)).astype(np.uint8)
    ones, zeros = mx.ones((rows, groups)), mx.zeros((rows, groups))
    read = mx.dequantize(mx.array(pack(codes, bits)), ones, zeros, 32, bits)
    np.testing.assert_array_equal(np.array(read), codes)


@pytest.mark.parametrize("config", affine(groups=(32, 64)), ids=str)
def test_feedback_lowers_the_error_at_the_output(config: QuantConfig) -> None:
    rng = np.random.default_rng(0)
    weight = mx.array(rng.normal(size=(48, 128)).astype(np.float32) * 0.05).astype(mx.bfloat16)
    mix = rng.normal(size=(128, 128)) * np.geomspace(1, 0.05, 128)
    x = (rng.normal(size=(2000, 128)) @ mix).astype(
        np.float32
    )  # correlated inputs, as activations are
    moment = x.T @ x / len(x)
    exact = np.array(weight.astype(mx.float32))

    def cost(packed: dict[str, mx.array]) -> float:
        error = restore(packed, config) - exact
        return float(np.einsum("ij,jk,ik->", error, moment, error))

    plain, fed = rtn.quantize(weight, config), gptq.quantize(weight, config, moment[None])
    assert {k: (a.shape, a.dtype) for k, a in plain.items()} == {
        k: (a.shape, a.dtype) for k, a in fed.items()
    }
    assert cost(fed) < 0.7 * cost(plain)


def test_without_correlation_feedback_is_rounding_to_nearest() -> None:
    config = QuantConfig(4, 32)
    weight = mx.array(np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32))
    fed = gptq.quantize(weight, config, np.eye(64, dtype=np.float32)[None])
    np.testing.assert_allclose(
        restore(fed, config), restore(rtn.quantize(weight, config), config), atol=1e-6
    )


def test_what_has_no_inputs_or_no_grid_is_rounded_to_nearest() -> None:
    weight = mx.random.normal((8, 64), key=mx.random.key(0)).astype(mx.bfloat16)
    moments = np.eye(64, dtype=np.float32)[None]
    for config, given_moments in (
        (QuantConfig(4, 32), None),
        (QuantConfig(4, 32, "mxfp4"), moments),
    ):
        fed, plain = gptq.quantize(weight, config, given_moments), rtn.quantize(weight, config)
        assert all(mx.array_equal(fed[name], plain[name]) for name in plain)


def test_moments_are_those_of_the_layers_inputs(make: Maker) -> None:
    job = prepare(str(make(qwen3_moe(2, experts=8))))
    made = measure(job.source, job.inventory, TOKENS, "random", batch=2)
    blocks = dict(block_inputs(job.source, job.inventory, made, batch=4))
    assert list(blocks) == [0, 1, None] and list(blocks[None]) == ["lm_head"]
    found = blocks[1]["model.layers.1.mlp.switch_mlp.up_proj"]
    assert sum(len(batch.weight) for batch in found.batches) == TOKENS.size * 2 and found.parts == 8
    down = blocks[0]["model.layers.0.mlp.switch_mlp.down_proj"]
    trace = sum(
        np.bincount(batch.part, batch.weight * (np.array(batch.x) ** 2).sum(1), minlength=8)
        for batch in down.batches
    )
    np.testing.assert_allclose(
        trace, made.trace["model.layers.0.mlp.switch_mlp.down_proj"], rtol=1e-3
    )
    moments = Moments(job.source, job.inventory, made)
    of_rows = moments.of("model.embed_tokens")
    assert of_rows is not None and of_rows.shape == (1, 128, 128)
    assert np.trace(of_rows[0]) == pytest.approx(made.trace["model.embed_tokens"].sum(), rel=2e-3)
    q = moments.of("model.layers.1.self_attn.q_proj")
    assert q is not None and q[:].shape == (1, 128, 128)
    assert np.trace(q[:][0]) == pytest.approx(
        made.trace["model.layers.1.self_attn.q_proj"].sum(), rel=1e-3
    )
    np.testing.assert_array_equal(np.concatenate([found[:3], found[3:]]), found[:])
    rows = np.concatenate([np.array(batch.x)[batch.part == 5] for batch in found.batches])
    weight = np.concatenate([batch.weight[batch.part == 5] for batch in found.batches])
    every = np.concatenate(
        [np.array(batch.x) * np.sqrt(batch.weight)[:, None] for batch in found.batches]
    )
    pooled = (
        every.T @ every * (128 / len(every))
    )  # a row a column: few rows, so all of them are looked at
    np.testing.assert_allclose(
        found[5:6][0], (rows * weight[:, None]).T @ rows + pooled, rtol=1e-3, atol=1e-6
    )


def test_a_group_without_a_range_is_its_bias() -> None:
    """As a GPU may make it of numbers below the smallest that 16 bits hold."""
    weight = np.full((1, 2, 64), 1e-9, dtype=np.float32)
    scales, biases = (
        np.zeros((1, 2, 1), dtype=np.float32),
        np.full((1, 2, 1), 1e-9, dtype=np.float32),
    )
    orders, passed = np.arange(64)[None], np.eye(64, dtype=np.float32)[None]
    with np.errstate(all="raise"):
        codes = gptq._feed_back(weight, scales, biases, orders, passed, QuantConfig(4, 64))
    assert not codes.any()
