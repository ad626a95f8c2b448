"""What stands in for slow parts of MLX's CPU backend gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import Maker, llama
from helpers import qwen3_moe as moe

from mint_mlx.runtime import cpu_ops, fast_math, runner


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    """On a Mac as well."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_grouped_experts_equal_mlx_lm(is_sorted: bool, bias: bool) -> None:
    from mlx_lm.models.switch_layers import SwitchLinear

    stock = SwitchLinear(16, 8, 4, bias=bias)
    grouped = cpu_ops.GroupedSwitchLinear(16, 8, 4, bias=bias)
    grouped.update(stock.parameters())
    indices = np.random.default_rng(0).integers(
        0, 3, (10,) if is_sorted else (5, 2)
    )  # expert 3 gets no token
    indices = np.sort(indices) if is_sorted else indices
    x = mx.random.normal((10, 1, 16) if is_sorted else (5, 1, 1, 16), key=mx.random.key(0))
    expected = stock(x, mx.array(indices), sorted_indices=is_sorted)
    found = grouped(x, mx.array(indices), sorted_indices=is_sorted)
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_blockwise_attention_equals_mlx(
    make: Maker, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_math, "QUERIES", 16)
    q, k, v = (
        mx.random.normal((2, h, 50, 8), key=mx.random.key(i))
        for i, h in enumerate((*heads, heads[1]))
    )
    stock = mx.fast.scaled_dot_product_attention
    with fast_math.fast_math(runner.load_runner(make(llama(1))).model):
        assert mx.fast.scaled_dot_product_attention is not stock
        found = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask="causal")
    assert mx.fast.scaled_dot_product_attention is stock
    np.testing.assert_allclose(
        np.array(found), np.array(stock(q, k, v, scale=0.3, mask="causal")), atol=1e-5
    )


def gradients(function: Callable[..., mx.array], *arrays: mx.array) -> list[np.ndarray]:
    """Of a sum of the outputs, each weighted in its own way."""
    weights = mx.random.normal(function(*arrays).shape, key=mx.random.key(9))
    return [np.array(a) for a in mx.vjp(function, list(arrays), [weights])[1]]


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_gradients_of_attention_equal_mlx(
    heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_math, "QUERIES", 16)
    arrays = [
        mx.random.normal((2, h, 50, 8), key=mx.random.key(i))
        for i, h in enumerate((*heads, heads[1]))
    ]
    stock = partial(mx.fast.scaled_dot_product_attention, scale=0.3, mask="causal")
    ours = partial(fast_math.causal_attention, scale=0.3)
    for found, expected in zip(gradients(ours, *arrays), gradients(stock, *arrays), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_swiglu_and_logsumexp_equal_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models import activations

    monkeypatch.setattr(fast_math, "PART", 100)  # several parts, the last one shorter
    x, gate = (mx.random.normal((3, 5, 40), key=mx.random.key(i)) * 5 for i in range(2))
    for found, expected in zip(
        gradients(fast_math.swiglu, gate, x), gradients(activations.swiglu, gate, x), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    stock = partial(mx.logsumexp, axis=-1, keepdims=True)
    np.testing.assert_allclose(
        np.array(fast_math.logsumexp(x)), np.array(stock(x)), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        gradients(fast_math.logsumexp, x)[0], gradients(stock, x)[0], rtol=1e-5, atol=1e-5
    )


def test_swiglu_equals_mlx_lm() -> None:
    from mlx_lm.models import activations

    gate = mx.concatenate(
        [mx.random.normal((50,), key=mx.random.key(0)) * 5, mx.array([-300.0, 300.0, 0.0])]
    )
    x = mx.random.normal(gate.shape, key=mx.random.key(1))
    np.testing.assert_allclose(
        np.array(fast_math.swiglu(gate, x)), np.array(activations.swiglu(gate, x)), atol=1e-5
    )


def test_mlx_lm_is_as_it_was_afterwards(make: Maker) -> None:
    from mlx_lm.models import activations, qwen3_moe, switch_layers

    stock = activations.swiglu
    model = runner.load_runner(make(moe(1))).model  # its experts are of cpu.py's own class by now
    with fast_math.fast_math(model):
        assert switch_layers.swiglu is fast_math.swiglu
        fast_math.swiglu(mx.ones(3, dtype=mx.bfloat16), mx.ones(3, dtype=mx.bfloat16))
    assert switch_layers.swiglu is stock and qwen3_moe.swiglu is stock


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_dense_products_equal_quantized_ones(mode: str) -> None:
    """Those of linear layers, experts, embeddings as heads and latent attention, and their
    gradients.
    """
    from mlx_lm.models.mla import MultiLinear
    from mlx_lm.models.switch_layers import SwitchLinear

    plain = (nn.Linear(32, 8), SwitchLinear(32, 8, 4), nn.Embedding(8, 32), MultiLinear(32, 8, 5))
    layers = [m.to_quantized(32, 4, mode=mode) for m in plain]
    x = mx.random.normal((5, 1, 32), key=mx.random.key(0))

    def outputs(scale: mx.array) -> mx.array:
        linear, experts, embedding, heads = layers
        y = [
            linear(x * scale),
            experts(x * scale, mx.array([[0], [3], [1], [0], [2]])),
            embedding.as_linear(x * scale),
        ]
        y.append(heads(x * scale))
        return mx.concatenate([a.flatten() for a in y])

    stock = mx.quantized_matmul
    before = [np.array(outputs(mx.array(1.0))), *gradients(outputs, mx.array(1.0))]
    with cpu_ops.dense_products():
        assert mx.quantized_matmul is not stock
        after = [np.array(outputs(mx.array(1.0))), *gradients(outputs, mx.array(1.0))]
    assert mx.quantized_matmul is stock
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
