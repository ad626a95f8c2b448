"""Experts of groups that are ruled out are never chosen: biases are shifted, no order changes."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from families import write_family
from helpers import edit_config, edit_weights
from mlx_lm.models.deepseek_v3 import group_expert_select

from mint_mlx.converters.sources.group_limits import shift_biases
from mint_mlx.jobs.convert import convert

EXPERTS, GROUPS, KEPT, CHOSEN = 16, 4, 2, 4
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def chosen(gates: np.ndarray, bias: np.ndarray) -> list[set[int]]:
    """The experts of each token as transformers 5 chooses them: among the best groups alone."""
    scores = 1 / (1 + np.exp(-gates)) + bias
    by_group = scores.reshape(-1, GROUPS, EXPERTS // GROUPS)
    of_group = np.sort(by_group, axis=-1)[..., -2:].sum(axis=-1)
    ruled_out = np.argsort(of_group, axis=-1)[:, : GROUPS - KEPT]
    for token, groups in enumerate(ruled_out):
        by_group[token, groups] = -np.inf
    return [set(np.argsort(row)[-CHOSEN:].tolist()) for row in by_group.reshape(len(gates), -1)]


def stock(gates: np.ndarray, bias: mx.array) -> tuple[list[set[int]], np.ndarray]:
    indices, weights = group_expert_select(mx.array(gates), bias, CHOSEN, GROUPS, KEPT, 1.0, True)
    order = np.argsort(np.array(indices), axis=-1)
    sorted_weights = np.take_along_axis(np.array(weights), order, axis=-1)
    return [set(row) for row in indices.tolist()], sorted_weights


@pytest.mark.parametrize("middle", [-0.8, -0.3, 0.0, 2.0])
def test_the_choice_is_that_among_the_best_groups(middle: float) -> None:
    drawn = np.random.default_rng(0)
    gates = drawn.normal(size=(64, EXPERTS)).astype(np.float32)
    bias = (middle + 0.2 * drawn.normal(size=EXPERTS)).astype(np.float32)
    (shifted,) = shift_biases({BIAS: mx.array(bias)}).values()
    assert shifted.dtype == mx.float32
    assert float(shifted.min()) >= 0
    np.testing.assert_allclose(np.ptp(np.array(shifted)), np.ptp(bias), rtol=1e-5)
    expected = chosen(gates, bias)
    experts, weights = stock(gates, shifted)
    assert experts == expected
    if middle < -0.5:
        assert stock(gates, mx.array(bias))[0] != expected
    if middle > 1:
        assert mx.array_equal(shifted, mx.array(bias))
        np.testing.assert_array_equal(weights, stock(gates, mx.array(bias))[1])


@pytest.mark.parametrize("off", [-1e3, -1e9, -3e38, -np.inf])
def test_experts_that_are_switched_off_leave_the_others_as_they_are(off: float) -> None:
    drawn = np.random.default_rng(0)
    gates = drawn.normal(size=(64, EXPERTS)).astype(np.float32)
    bias = (0.3 * drawn.normal(size=EXPERTS)).astype(np.float32)
    bias[[0, 5, 6, 7]] = off
    (shifted,) = shift_biases({BIAS: mx.array(bias)}).values()
    assert float(shifted.min()) == 0
    assert float(shifted.max()) < 10
    assert stock(gates, shifted)[0] == chosen(gates, np.maximum(bias, -1e3))


def test_it_is_done_as_a_source_is_converted_and_never_again(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", "deepseek_v3", n_group=4, topk_group=2)
    bias = mx.array([-0.75, -0.5, 0, 0.25, -1, 0, 0.5, 0], dtype=mx.bfloat16)
    edit_weights(folder, lambda weights: weights | {BIAS: bias})
    first = convert(str(folder), uniform="8bit-g32", out=tmp_path / "first", smoke=False)
    written = mx.load(str(first.path / "model.safetensors"))[BIAS]
    assert mx.array_equal(written, bias.astype(mx.float32) + 1)

    # What others have converted is read as mlx-lm runs it.
    edit_weights(first.path, lambda weights: weights | {BIAS: bias})
    again = convert(str(first.path), uniform="keep", out=tmp_path / "again", smoke=False)
    assert mx.array_equal(mx.load(str(again.path / "model.safetensors"))[BIAS], bias)

    edit_config(folder, topk_group=4)
    whole = convert(str(folder), uniform="8bit-g32", out=tmp_path / "whole", smoke=False)
    assert mx.array_equal(mx.load(str(whole.path / "model.safetensors"))[BIAS], bias)
