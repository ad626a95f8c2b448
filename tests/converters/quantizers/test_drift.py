"""Codes make up for what the quantized layers before did to a layer's inputs."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import VOCAB, Maker, kl, llama, qwen3_moe

from mint_mlx.base.quant_config import QuantConfig
from mint_mlx.checkpoint.source import load_source
from mint_mlx.converters.quantizers import drift, gptq
from mint_mlx.converters.quantizers.drift import Drift
from mint_mlx.converters.quantizers.inputs import Batch, Inputs
from mint_mlx.jobs import convert
from mint_mlx.measure.self_text import random_windows, write_tokens
from mint_mlx.rules import efforts
from mint_mlx.runtime import runner
from mint_mlx.runtime.taps import Activations

ROWS, COLUMNS = 24, 320
RNG = np.random.default_rng


def activations(x: np.ndarray, expert: np.ndarray | None = None, first: int = 0) -> Activations:
    token = np.arange(first, first + len(x))
    return Activations("layer", mx.array(x), None, expert, token)


def inputs_of(read: Activations, weight: np.ndarray, experts: int = 1) -> Inputs:
    return Inputs("layer", (Batch(read.x, weight, read.expert),), experts)


def test_a_layer_keeps_its_outputs_on_other_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = RNG(0)
    mix = rng.normal(size=(COLUMNS, COLUMNS)) * np.geomspace(1, 0.1, COLUMNS)
    x = (rng.normal(size=(3000, COLUMNS)) @ mix).astype(np.float32)
    drifted = (0.9 * x + 0.1 * x[:, ::-1]).astype(np.float32)
    weight = mx.array(rng.normal(size=(ROWS, COLUMNS)).astype(np.float32))
    read = activations(drifted)
    inputs = inputs_of(read, np.ones(len(x), dtype=np.float32))

    def error(share: float) -> float:
        monkeypatch.setattr(drift, "SHARE", share)
        source = [activations(x[:1000]), activations(x[1000:], first=1000)]
        missing = Drift(source, read, inputs)
        config = QuantConfig(4, 64)
        packed = gptq.quantize(weight, config, inputs, True, missing)
        sizes = {"group_size": 64, "bits": 4}
        restored = mx.dequantize(packed["weight"], packed["scales"], packed["biases"], **sizes)
        return float(np.square(drifted @ np.array(restored).T - x @ np.array(weight).T).sum())

    assert error(1) < 0.2 * error(0)
    assert error(1) < error(0.5) < error(0)


def test_columns_aim_at_the_weights_that_lose_least() -> None:
    """W L + S L^-T D^-1 is (W + S H^-1) L, with H damped, also over several blocks of columns."""
    rng = RNG(1)
    x = rng.normal(size=(2, 900, COLUMNS)).astype(np.float32)
    moments = x.swapaxes(1, 2) @ x
    seen = rng.normal(size=(2, ROWS, COLUMNS)).astype(np.float32)
    factors = gptq._factors(moments)
    shift = gptq._shift(seen, factors)

    for expert, order in enumerate(factors.order):
        damped = moments[expert].astype(np.float64)
        damped += 0.01 * np.trace(damped) / COLUMNS * np.eye(COLUMNS)
        target = np.linalg.solve(damped, seen[expert].T).T
        expected = target[:, order] @ factors.passed[expert]
        np.testing.assert_allclose(shift[:, expert].T, expected, rtol=1e-3, atol=1e-6)


def test_experts_see_what_their_own_tokens_lack() -> None:
    """A token that goes to another expert than in the source says nothing."""
    rng = RNG(2)
    x, drifted = rng.normal(size=(2, 40, 8)).astype(np.float32)
    taken, taken_drifted = rng.integers(0, 3, (2, 40))
    weight = rng.random(40).astype(np.float32)
    shuffled = rng.permutation(40)  # rows of experts come in any order
    read = Activations(
        "layer", mx.array(drifted[shuffled]), None, taken_drifted[shuffled], shuffled
    )
    source = [activations(x[:16], taken[:16]), activations(x[16:], taken[16:], first=16)]
    missing = Drift(source, read, inputs_of(read, weight[shuffled], experts=3))

    matrices = rng.normal(size=(2, 5, 8)).astype(np.float32)
    seen = missing(slice(1, 3), matrices)
    for index, expert in enumerate((1, 2)):
        same = (taken == expert) & (taken_drifted == expert)
        assert same.any()
        lacking = (x - drifted)[same] * weight[same, None]
        expected = drift.SHARE * matrices[index] @ (lacking.T @ drifted[same])
        np.testing.assert_allclose(seen[index], expected, rtol=1e-4, atol=1e-5)


def test_a_trained_model_loses_less(
    demo_model: Path, demo_text: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efforts, "TOKENS", 4096)
    divergence = {}
    for quantizer in ("search-gptq", "search-gptaq"):
        out = tmp_path / quantizer
        convert.convert(
            str(demo_model), "4bpw", out, effort="balanced", quantizer=quantizer, smoke=False
        )
        divergence[quantizer] = kl(demo_model, out, demo_text)
    assert divergence["search-gptaq"] < 0.96 * divergence["search-gptq"]


def test_a_streamed_model_gets_nearly_the_same_weights(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(qwen3_moe(2, experts=8)))
    outs = [tmp_path / name for name in ("whole", "streamed")]
    convert.convert(folder, "5bpw", outs[0], effort="balanced", smoke=False)
    monkeypatch.setattr(runner, "fits_here", lambda size: False)
    convert.convert(folder, "5bpw", outs[1], effort="balanced", smoke=False)
    blocks = [runner.load_runner(out, False).model.layers[1] for out in outs]
    for one, two in (
        [block.self_attn.o_proj.weight for block in blocks],
        [block.mlp.switch_mlp.down_proj.weight for block in blocks],
    ):
        np.testing.assert_allclose(np.array(one), np.array(two), atol=0.1 * np.array(one).std())


def test_it_takes_the_ways_of_a_gpu(
    like_a_gpu: None, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efforts, "TOKENS", 1024)  # a CPU is slow with 16-bit numbers
    folder = make(llama(2))
    outs = {quantizer: tmp_path / quantizer for quantizer in ("search-gptq", "search-gptaq")}
    for quantizer, out in outs.items():
        convert.convert(
            str(folder), "4bpw", out, effort="balanced", quantizer=quantizer, smoke=False
        )
    tokens = write_tokens(load_source(str(folder)), random_windows(VOCAB, 512, seed=5), seed=5)[0]
    divergence = {quantizer: kl(folder, out, tokens) for quantizer, out in outs.items()}
    assert divergence["search-gptaq"] < 1.05 * divergence["search-gptq"]
