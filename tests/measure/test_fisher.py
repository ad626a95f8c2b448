"""The sensitivity: Fisher information, measured on the model's own text."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from families import write_family
from helpers import TOKENS, Maker, Weights, edit_weights, kl, llama, qwen3_moe
from mlx.utils import tree_unflatten

from mint_mlx.allocation.allocate import allocate
from mint_mlx.allocation.search_space import SearchSpace
from mint_mlx.base.units import parse_budget
from mint_mlx.jobs import convert, measurements
from mint_mlx.jobs.model import prepare
from mint_mlx.measure.fisher import measure
from mint_mlx.measure.self_text import random_windows, write_tokens
from mint_mlx.measure.text import Text
from mint_mlx.runtime import gradients, runner
from mint_mlx.runtime.device import on_cpu

LABELS = np.random.default_rng(1).integers(0, 96, TOKENS.shape)


def whole_model_trace(folder: Path, tokens: np.ndarray, path: str) -> float:
    """|g|^2 |x|^2 of one linear layer by differentiating the whole model at once."""
    loaded = runner.load_runner(folder)
    layer = dict(loaded.model.named_modules())[path]
    seen: list[mx.array] = []

    def loss(tap: mx.array) -> mx.array:
        class Tapped(nn.Module):
            def __call__(self, x: mx.array) -> mx.array:
                seen.append(mx.stop_gradient(x))
                return layer(x) + tap

        loaded.model.update_modules(tree_unflatten([(path, Tapped())]))
        logits = loaded.model(mx.array(tokens)).astype(mx.float32)
        labels = mx.array(LABELS)
        return mx.sum(nn.losses.cross_entropy(logits, labels))

    shape = (*tokens.shape, layer.weight.shape[0])
    grad = mx.grad(loss)(mx.zeros(shape))
    return float(mx.sum(mx.sum(mx.square(grad), -1) * mx.sum(mx.square(seen[0]), -1)).item())


@pytest.mark.parametrize("streamed", [False, True])
def test_the_walk_gives_the_whole_models_gradient(
    make: Maker, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    folder = make(llama(3))
    job = prepare(str(folder))

    def labels(_: object, uniform: np.ndarray) -> np.ndarray:
        return uniform.astype(np.int32)

    # The labels stand where the numbers that decide them would.
    monkeypatch.setattr("mint_mlx.runtime.gradients.uniform_numbers", lambda *_: LABELS)
    monkeypatch.setattr("mint_mlx.runtime.draws.draw", labels)
    monkeypatch.setattr("mint_mlx.runtime.draws._labels", labels)
    monkeypatch.setattr("mint_mlx.runtime.gradients.LOGITS", 1)  # one position at a time
    more = {"batch": len(TOKENS), "streamed": streamed}
    sensitivity = measure(job.source, job.inventory, Text(TOKENS, "random"), **more)

    rough = 1e-3 if on_cpu() else 0.02  # a GPU runs a model as it is stored, here in bfloat16
    for path in (
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.2.mlp.up_proj",
        "lm_head",
    ):
        expected = whole_model_trace(folder, TOKENS, path)
        assert sensitivity.trace[path].sum() == pytest.approx(expected, rel=rough), path


def test_experts_are_told_apart_and_streaming_changes_nothing(make: Maker) -> None:
    job = prepare(str(make(qwen3_moe(2, experts=8))))
    whole, streamed = (
        measure(job.source, job.inventory, Text(TOKENS, "r"), batch=2, streamed=s)
        for s in (False, True)
    )
    down = "model.layers.1.mlp.switch_mlp.down_proj"
    assert whole.trace[down].shape == (8,)
    assert len(set(whole.trace[down])) == 8
    assert whole.weights[down].weight.shape == (TOKENS.size, 2)
    assert whole.weights[down].expert is not None
    for path in whole.trace:
        np.testing.assert_allclose(whole.trace[path], streamed.trace[path], rtol=1e-4)
        assert whole.trace[path].sum() > 0


def test_the_prediction_is_near_the_divergence(demo_model: Path, tmp_path: Path) -> None:
    """At 5 bits per weight the predicted KL is within a factor of two of the measured one."""
    job = prepare(str(demo_model))
    tokens, how = write_tokens(job.source, random_windows(2048, 2048, length=64))
    profile = measurements.get_profile(job)
    sensitivity = measure(job.source, job.inventory, Text(tokens, how))
    space = SearchSpace(job.inventory, job.recipe)
    plan = allocate(profile, parse_budget("5bpw"), space, "fisher", sensitivity=sensitivity)
    convert.convert(str(demo_model), plan=plan, out=tmp_path / "out", smoke=False)
    fresh, _ = write_tokens(job.source, random_windows(2048, 2048, seed=9, length=64), seed=9)
    divergence = kl(demo_model, tmp_path / "out", fresh)
    assert plan.loss is not None
    assert plan.loss / 2 < divergence < plan.loss * 2


def test_heads_of_latent_attention_leave_no_row_for_every_token(tmp_path: Path) -> None:
    """They are rounded to nearest: what an error costs them is all that is asked."""
    job = prepare(str(write_family(tmp_path / "model", "deepseek_v3")))
    tokens = np.random.default_rng(0).integers(0, 96, (2, 16))
    sensitivity = measure(job.source, job.inventory, Text(tokens, "random"))
    heads = {layer.path for layer in job.inventory.layers if layer.kind == "multi-linear"}
    assert heads
    assert all(sensitivity.trace[path].sum() > 0 for path in heads)
    assert not heads & (sensitivity.weights.keys() | sensitivity.remaining.keys())


def test_one_direction_that_holds_nearly_everything(make: Maker, tmp_path: Path) -> None:
    """Rounding to 16 bits leaves such an embedding's moment without a factor."""

    def change(weights: Weights) -> Weights:
        table = np.array(weights["model.embed_tokens.weight"].astype(mx.float32))
        table[:, :8] = 1 + 1e-3 * np.random.default_rng(0).standard_normal((len(table), 8))
        weights["model.embed_tokens.weight"] = mx.array(table).astype(mx.bfloat16)
        for name in weights:
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weights[name] = weights[name] * 0.05
        return weights

    folder = make(llama(1, tied=True))
    edit_weights(folder, change)
    result = convert.convert(str(folder), "6bpw", tmp_path / "out", effort="balanced", smoke=False)
    assert result.plan.objective == "fisher-gptq"


def test_what_a_prompt_is_followed_by_counts_and_the_prompt_itself_does_not(make: Maker) -> None:
    """As if the labels within prompts had no loss, from the definition."""
    job = prepare(str(make(llama(2))))
    tokens = np.random.default_rng(1).integers(0, 96, (4, 16)).astype(np.int32)
    text = Text(tokens, given=np.array([1, 9, 1, 5], dtype=np.int32))
    measured = measure(job.source, job.inventory, text)
    plain = measure(job.source, job.inventory, Text(tokens))

    # The head reads each token by itself: those of prompts weigh nothing there, others as before.
    head = measured.weights["lm_head"].weight.reshape(4, 16)
    np.testing.assert_array_equal(head > 0, text.counted)
    expected = plain.weights["lm_head"].weight.reshape(4, 16)
    np.testing.assert_allclose(head[text.counted], expected[text.counted], rtol=2e-3)

    # A layer below weighs a prompt's tokens by what follows from them; plain windows are as before.
    below = measured.weights["model.layers.0.self_attn.v_proj"].weight.reshape(4, 16)
    before = plain.weights["model.layers.0.self_attn.v_proj"].weight.reshape(4, 16)
    np.testing.assert_allclose(below[[0, 2]], before[[0, 2]], rtol=2e-3)
    assert (below[1, :8] > 0).all()
    assert below[1, :8].sum() < before[1, :8].sum()

    # Costs are those of a token that counts.
    counted = text.counted.sum()
    cost = measured.trace["lm_head"] / (2 * counted)
    np.testing.assert_allclose(measured.per_weight("lm_head"), cost)


def test_the_columns_of_the_head_are_cut_anywhere(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(str(make(llama(1))))
    tokens = np.random.default_rng(1).integers(0, 96, (2, 16)).astype(np.int32)
    text = Text(tokens, given=np.array([7, 1], dtype=np.int32))
    whole = measure(job.source, job.inventory, text)
    monkeypatch.setattr(gradients, "LOGITS", 2 * 96 * 3)  # three positions at a time
    pieces = measure(job.source, job.inventory, text)
    for path, weights in whole.weights.items():
        np.testing.assert_allclose(pieces.weights[path].weight, weights.weight, rtol=2e-3)
