"""Rounding, scales and biases of a block are learned together."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mint_mlx.base.quant_config import QuantConfig, affine
from mint_mlx.converters.quantizers import gptq, learn_block
from mint_mlx.converters.quantizers.learn_block import Block


def small_block(config: QuantConfig, seed: int = 0) -> Block:
    """One linear layer with correlated inputs, as a block."""
    rng = np.random.default_rng(seed)
    layer = nn.Linear(64, 32, bias=False)
    weight = mx.array(rng.normal(size=(32, 64)).astype(np.float32) * 0.1).astype(mx.bfloat16)
    exact = weight.astype(mx.float32)

    # Error feedback's codes on inputs of which some directions are ten times as large as others.
    draws = rng.normal(size=(16, 128, 64))
    mix = rng.normal(size=(64, 64)) * np.geomspace(1, 0.1, 64)
    x = (draws @ mix).astype(np.float32)
    rows = x.reshape(-1, 64)
    codes = gptq.find_codes(weight, config, (rows.T @ rows / len(rows))[None])

    # The cost of an error at the output depends on its direction as well.
    g = rng.normal(size=(500, 32)) * np.geomspace(1, 0.1, 32)
    metric = (g.T @ g / len(g)).astype(np.float32)
    return Block(
        call=layer,
        modules={"layer": layer},
        exact={"layer": exact},
        start={"layer": codes},
        inputs=mx.array(x),
        targets=mx.array(x) @ exact.T,
        cost=partial(learn_block.metric_cost, learn_block.metric_root(metric)),
    )


def cost(block: Block, codes: learn_block.Codes) -> float:
    """The loss of a layer's written codes on the windows that are held out."""
    packed = codes.packed()
    config = codes.config
    weight = mx.dequantize(
        packed["weight"], packed["scales"], packed["biases"], config.group_size, config.bits
    )
    return float(block.cost(block.inputs[-2:] @ weight.astype(mx.float32).T, block.targets[-2:]))


@pytest.mark.parametrize("config", affine((2, 3, 4, 6), (32, 64)), ids=str)
def test_learning_never_raises_the_loss_on_held_out_text(config: QuantConfig) -> None:
    block = small_block(config)
    start = block.start["layer"]
    learned = learn_block.learn(block, steps=40)["layer"]
    assert cost(block, learned) <= cost(block, start) * 1.01
    assert learned.codes.dtype == np.uint8
    assert learned.codes.max() < 2**config.bits
    assert learned.scales.dtype == start.scales.dtype
    assert learned.scales.shape == start.scales.shape


def test_scales_and_biases_are_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn_block, "LATENT", 0.0)
    block = small_block(QuantConfig(2, 32))
    start = block.start["layer"]
    learned = learn_block.learn(block, steps=80)["layer"]
    np.testing.assert_array_equal(learned.codes, start.codes)
    assert cost(block, learned) < 0.95 * cost(block, start)


def test_learning_that_gains_nothing_gives_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn_block, "LATENT", 50.0)  # throws codes from one end to the other
    total = learn_block._total
    losses = []

    def recorded(*args: Any) -> float:
        losses.append(total(*args))
        return losses[-1]

    monkeypatch.setattr(learn_block, "_total", recorded)
    block = small_block(QuantConfig(4, 32))
    start = block.start["layer"]
    learned = learn_block.learn(block, steps=4)["layer"]

    # Each of the four looks at the held-out windows sees that what was learned is worse.
    assert len(losses) == 5
    assert min(losses[1:]) > 2 * losses[0]
    np.testing.assert_array_equal(learned.codes, start.codes)
    assert mx.array_equal(learned.scales, start.scales)
    assert mx.array_equal(learned.biases, start.biases)


def test_a_diagonal_metric_is_a_metric() -> None:
    metric = np.diag(np.arange(1.0, 9.0)).astype(np.float32)
    whole = learn_block.metric_root(metric)
    diagonal = learn_block.metric_root(np.diagonal(metric).copy())
    np.testing.assert_allclose(np.diagonal(np.array(whole)), np.array(diagonal), rtol=1e-5)
