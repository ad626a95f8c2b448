"""What layers read, a row for each token and expert, and gradients at their outputs."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchGLU

from mint_mlx.runtime.blocks import tapped_gradient
from mint_mlx.runtime.taps import watched

WINDOWS, TOKENS, INPUTS = 2, 3, 4
X = mx.random.normal((WINDOWS, TOKENS, INPUTS), key=mx.random.key(0))


def test_a_linear_layers_rows_are_the_tokens_in_order() -> None:
    layer, calls = nn.Linear(INPUTS, 5), []
    with watched(calls, {id(layer): "layer"}):
        layer(X.astype(mx.bfloat16))
        nn.Linear(INPUTS, 5)(X)  # not watched
    (call,) = calls
    rows = call.activations(window=4, shape=(WINDOWS, TOKENS), grad=None)
    assert (rows.path, rows.expert, rows.grad) == ("layer", None, None)
    assert rows.x.dtype == mx.float32
    assert mx.array_equal(rows.x, X.astype(mx.bfloat16).astype(mx.float32).reshape(-1, INPUTS))
    assert rows.token.tolist() == [12, 13, 14, 15, 16, 17]  # after four windows of three


@pytest.mark.parametrize("tokens", [3, 40])  # mlx-lm sorts the rows of many tokens by expert
def test_an_experts_rows_are_those_of_its_tokens(tokens: int) -> None:
    experts, calls = SwitchGLU(INPUTS, 6, 5), []
    x = mx.random.normal((1, tokens, INPUTS), key=mx.random.key(1))
    chosen = np.random.default_rng(0).permuted(np.tile(np.arange(5), (tokens, 1)), axis=1)[:, :2]
    with watched(calls, {id(experts.up_proj): "up"}):
        mx.eval(experts(x, mx.array(chosen)[None]))
    (call,) = calls
    rows = call.activations(window=0, shape=(1, tokens), grad=None)
    assert sorted(zip(rows.token, rows.expert, strict=True)) == sorted(
        (token, expert) for token in range(tokens) for expert in chosen[token]
    )
    np.testing.assert_array_equal(np.array(rows.x), np.array(x[0])[rows.token])


def test_heads_that_share_an_input_have_a_row_each() -> None:
    layer, calls = MultiLinear(INPUTS, 2, 3), []
    x = X[:, None]  # (windows, one for all heads, tokens, inputs)
    with watched(calls, {id(layer): "heads"}):
        layer(x)
    rows = calls[0].activations(window=0, shape=(WINDOWS, TOKENS), grad=None)
    assert rows.x.shape == (3 * WINDOWS * TOKENS, INPUTS)
    assert rows.expert is not None
    assert rows.expert.tolist() == [head for head in range(3) for _ in range(WINDOWS * TOKENS)]
    assert rows.token.tolist() == list(range(WINDOWS * TOKENS)) * 3


def test_a_taps_gradient_is_that_at_the_output() -> None:
    first, second = nn.Linear(INPUTS, 5, bias=False), nn.Linear(5, 2, bias=False)
    names = {id(first): "first", id(second): "second"}

    def loss(x: mx.array) -> mx.array:
        return mx.sum(mx.square(second(first(x))), keepdims=True)

    _, calls = tapped_gradient(loss, X, mx.ones((1, 1, 1)), names)
    (_, to_first), (_, to_second) = calls
    out = second(first(X))
    assert mx.allclose(to_second, 2 * out, rtol=1e-4, atol=1e-6)
    assert mx.allclose(to_first, 2 * out @ second.weight, rtol=1e-4, atol=1e-6)


def test_an_output_that_nothing_depends_on_has_a_gradient_of_zeros() -> None:
    unused, used = nn.Linear(INPUTS, 5), nn.Linear(INPUTS, 2)
    names = {id(unused): "unused", id(used): "used"}

    def run(x: mx.array) -> mx.array:
        unused(x)
        return used(x)

    _, ((_, to_unused), _) = tapped_gradient(run, X, mx.ones((WINDOWS, TOKENS, 2)), names)
    assert to_unused.shape == (WINDOWS, TOKENS, 5)
    assert not to_unused.any()
