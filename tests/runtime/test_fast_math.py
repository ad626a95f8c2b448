"""Attention and activations that are faster on a CPU give MLX's numbers."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from helpers import Maker, gradients, llama
from helpers import qwen3_moe as moe

from mint_mlx.runtime import fast_math, runner

pytestmark = pytest.mark.usefixtures("on_the_cpu")


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
    expected = np.array(stock(q, k, v, scale=0.3, mask="causal"))
    with fast_math.fast_math(runner.load_runner(make(llama(1))).model):
        assert mx.fast.scaled_dot_product_attention is not stock
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask="causal")
    assert mx.fast.scaled_dot_product_attention is stock
    np.testing.assert_allclose(np.array(out), expected, atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_attention_of_one_token_equals_mlx(
    heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_math, "DECODED", 100)  # a window in each piece
    stock = mx.fast.scaled_dot_product_attention
    q, k, v = (
        mx.random.normal((5, h, n, 8), key=mx.random.key(n))
        for h, n in ((heads[0], 1), (heads[1], 40), (heads[1], 41))
    )
    k, v = k[..., :33, :], v[..., :33, :]  # as a cache hands out its part
    with fast_math.decoding_attention():
        ours = mx.fast.scaled_dot_product_attention
        assert ours is not stock
        np.testing.assert_allclose(
            np.array(ours(q, k, v, scale=0.3)), np.array(stock(q, k, v, scale=0.3)), atol=1e-6
        )

        # What is anything else is MLX's own: a mask, several queries, other types.
        mask = mx.arange(33) > 20
        for arrays, more in (
            ((q, k, v), {"mask": mask}),
            ((mx.concatenate([q, q], axis=2), k, v), {}),
            (tuple(a.astype(mx.bfloat16) for a in (q, k, v)), {}),
        ):
            out, expected = (f(*arrays, scale=0.3, **more) for f in (ours, stock))
            assert mx.array_equal(out, expected)
    assert mx.fast.scaled_dot_product_attention is stock


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
    for actual, expected in zip(gradients(ours, *arrays), gradients(stock, *arrays), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_swiglu_and_logsumexp_equal_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models import activations

    monkeypatch.setattr(fast_math, "CHUNK", 100)  # several chunks, the last one shorter
    x, gate = (mx.random.normal((3, 5, 40), key=mx.random.key(i)) * 5 for i in range(2))
    near = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    ours, stock = (gradients(f, gate, x) for f in (fast_math.swiglu, activations.swiglu))
    for actual, expected in zip(ours, stock, strict=True):
        near(actual, expected)
    logsumexp = partial(mx.logsumexp, axis=-1, keepdims=True)
    near(np.array(fast_math.logsumexp(x)), np.array(logsumexp(x)))
    near(gradients(fast_math.logsumexp, x)[0], gradients(logsumexp, x)[0])


def test_swiglu_equals_mlx_lm() -> None:
    from mlx_lm.models import activations

    usual = mx.random.normal((50,), key=mx.random.key(0)) * 5
    gate = mx.concatenate([usual, mx.array([-300.0, 300.0, 0.0])])
    x = mx.random.normal(gate.shape, key=mx.random.key(1))
    expected = np.array(activations.swiglu(gate, x))
    np.testing.assert_allclose(np.array(fast_math.swiglu(gate, x)), expected, atol=1e-5)


def test_mlx_lm_is_as_it_was_afterwards(make: Maker) -> None:
    from mlx_lm.models import activations, qwen3_moe, switch_layers

    stock = activations.swiglu
    model = runner.load_runner(make(moe(1))).model  # its experts are cpu_ops' class by now
    with fast_math.fast_math(model):
        assert switch_layers.swiglu is fast_math.swiglu
        fast_math.swiglu(mx.ones(3, dtype=mx.bfloat16), mx.ones(3, dtype=mx.bfloat16))
    assert switch_layers.swiglu is stock
    assert qwen3_moe.swiglu is stock
