"""Products that replace slow ones of MLX's CPU backend give the same numbers."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import gradients

from mint_mlx.runtime import cpu_ops

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_grouped_experts_equal_mlx_lm(is_sorted: bool, bias: bool) -> None:
    from mlx_lm.models.switch_layers import SwitchLinear

    stock = SwitchLinear(16, 8, 4, bias=bias)
    grouped = cpu_ops.GroupedSwitchLinear(16, 8, 4, bias=bias)
    grouped.update(stock.parameters())

    # Expert 3 gets no token.
    indices = np.random.default_rng(0).integers(0, 3, (10,) if is_sorted else (5, 2))
    indices = np.sort(indices) if is_sorted else indices
    x = mx.random.normal((10, 1, 16) if is_sorted else (5, 1, 1, 16), key=mx.random.key(0))
    expected, actual = (
        np.array(layer(x, mx.array(indices), sorted_indices=is_sorted))
        for layer in (stock, grouped)
    )
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("piece", [1, 1 << 30])  # in threads, and in none
def test_grouped_experts_have_mlx_lms_gradients(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.models.switch_layers import SwitchLinear

    monkeypatch.setattr(cpu_ops, "PIECE", piece)
    stock = SwitchLinear(16, 8, 4, bias=False)
    grouped = cpu_ops.GroupedSwitchLinear(16, 8, 4, bias=False)
    indices = mx.array(np.random.default_rng(0).integers(0, 3, (5, 2)))  # expert 3 gets no token
    x = mx.random.normal((5, 1, 1, 16), key=mx.random.key(0))

    def output(layer: nn.Module, x: mx.array, weight: mx.array) -> mx.array:
        layer.weight = weight
        return mx.square(layer(x, indices))

    both = [
        gradients(lambda x, w, layer=layer: output(layer, x, w), x, stock.weight)
        for layer in (stock, grouped)
    ]
    for expected, actual in zip(*both, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("tokens", [3, 40])  # mlx-lm sorts the rows of many
def test_experts_that_run_whole_equal_mlx_lm(tokens: int) -> None:
    from mlx_lm.models.switch_layers import SwitchGLU

    stock = SwitchGLU(16, 8, 4)
    group = SwitchGLU(16, 8, 4)
    for name, layer in stock.items():
        if name.endswith("proj"):
            _, rows, columns = layer.weight.shape
            group[name] = cpu_ops.GroupedSwitchLinear(columns, rows, 4, bias=False)
            group[name].weight = layer.weight
    x = mx.random.normal((2, tokens, 16), key=mx.random.key(0))
    indices = mx.array(np.random.default_rng(0).integers(0, 3, (2, tokens, 2)))
    with cpu_ops.whole_experts():
        actual = group(x, indices)
        other = stock(x, indices)
    expected = np.array(stock(x, indices))
    np.testing.assert_allclose(np.array(actual), expected, atol=1e-5)
    np.testing.assert_array_equal(np.array(other), expected)  # its layers are not ours


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_dense_products_equal_quantized_ones(mode: str) -> None:
    """Of linear layers, experts, embeddings as heads and latent attention; gradients as well."""
    from mlx_lm.models.mla import MultiLinear
    from mlx_lm.models.switch_layers import SwitchLinear

    plain = (nn.Linear(32, 8), SwitchLinear(32, 8, 4), nn.Embedding(8, 32), MultiLinear(32, 8, 5))
    layers = [m.to_quantized(32, 4, mode=mode) for m in plain]
    x = mx.random.normal((5, 1, 32), key=mx.random.key(0))

    def outputs(scale: mx.array) -> mx.array:
        linear, experts, embedding, heads = layers
        y = (
            linear(x * scale),
            experts(x * scale, mx.array([[0], [3], [1], [0], [2]])),
            embedding.as_linear(x * scale),
            heads(x * scale),
        )
        return mx.concatenate([a.flatten() for a in y])

    stock = mx.quantized_matmul
    before = [np.array(outputs(mx.array(1.0))), *gradients(outputs, mx.array(1.0))]
    with cpu_ops.dense_products():
        assert mx.quantized_matmul is not stock
        after = [np.array(outputs(mx.array(1.0))), *gradients(outputs, mx.array(1.0))]
    assert mx.quantized_matmul is stock
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
