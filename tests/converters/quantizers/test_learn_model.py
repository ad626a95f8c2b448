"""A whole model is learned, block by block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import VOCAB, Maker, Notes, kl, llama, qwen3_moe

from mint_mlx.checkpoint.source import load_source
from mint_mlx.converters.quantizers import learn_block, learn_model
from mint_mlx.jobs import convert
from mint_mlx.measure.self_text import write_tokens
from mint_mlx.rules import efforts
from mint_mlx.runtime import runner


def test_best_beats_balanced_on_a_trained_model(
    demo_model: Path, demo_text: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efforts, "TOKENS", 1024)
    monkeypatch.setattr(learn_block, "STEPS", 12)
    monkeypatch.setattr(learn_block, "TOKENS", 512)
    found = {}
    for effort in ("balanced", "best"):
        result = convert.convert(
            str(demo_model), "4bpw", tmp_path / effort, effort=effort, smoke=False
        )
        found[effort] = kl(demo_model, tmp_path / effort, demo_text)
    assert (result.plan.quantizer, result.plan.effort) == ("learn", "best")
    assert found["best"] < 0.9 * found["balanced"]


def test_best_streamed_is_best(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is read block by block: the same plan, and nearly the same weights."""
    folder = make(qwen3_moe(2, experts=8))
    convert.convert(str(folder), "5bpw", tmp_path / "whole", effort="best", smoke=False)
    monkeypatch.setattr(runner, "fits_here", lambda size: False)
    notes = Notes()
    result = convert.convert(
        str(folder), "5bpw", tmp_path / "streamed", effort="best", smoke=False, report=notes
    )
    assert result.plan.quantizer == "learn"
    told = [
        f"{part} learns, step {step + 1} of {learn_block.STEPS}"
        for part in ("block 0", "block 1", "head")
        for step in range(learn_block.STEPS)
    ]
    assert notes.details == told
    blocks = [
        runner.load_runner(tmp_path / n, False).model.layers[1] for n in ("whole", "streamed")
    ]
    for weights in zip(
        *((b.self_attn.v_proj.weight, b.mlp.switch_mlp.up_proj.weight) for b in blocks), strict=True
    ):
        one, two = map(np.array, weights)
        np.testing.assert_allclose(one, two, atol=0.1 * one.std())


@pytest.mark.parametrize("stored", [None, "8bit-g32"])
def test_best_takes_the_ways_of_a_gpu(
    like_a_gpu: None,
    make: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: str | None,
) -> None:
    monkeypatch.setattr(learn_block, "STEPS", 6)
    monkeypatch.setattr("mint_mlx.converters.quantizers.distil.STEPS", 6)
    folder = make(llama(2))
    if stored:
        folder = convert.convert(
            str(folder), None, tmp_path / "stored", uniform=stored, smoke=False
        ).path
    for effort in ("balanced", "best"):
        convert.convert(str(folder), "4bpw", tmp_path / effort, effort=effort, smoke=False)
    tokens = write_tokens(load_source(str(folder)), VOCAB, 512, seed=5)[0]
    assert kl(folder, tmp_path / "best", tokens) < 0.95 * kl(folder, tmp_path / "balanced", tokens)


def test_best_in_turns_is_near_best(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn_block, "STEPS", 8)
    monkeypatch.setattr(learn_block, "LATENT", 0.02)  # so few steps of the usual size move no code
    monkeypatch.setattr(learn_block, "TOKENS", 2048)  # so that every expert has some
    monkeypatch.setattr(efforts, "TOKENS", 2048)
    monkeypatch.setattr("mint_mlx.measure.self_text.LENGTH", 256)
    folder = make(qwen3_moe(1, experts=8))
    notes = Notes()
    convert.convert(str(folder), "4bpw", tmp_path / "whole", effort="best", smoke=False)
    monkeypatch.setattr(learn_model, "turns", lambda inventory, tokens: 4)
    convert.convert(
        str(folder), "4bpw", tmp_path / "turns", effort="best", smoke=False, report=notes
    )
    steps = 4 * learn_block.STEPS
    assert [d for d in notes.details if d.startswith("block 0")][
        -1
    ] == f"block 0 learns, step {steps} of {steps}"
    monkeypatch.setattr(learn_model, "learn_in_turns", lambda block, *_: block.start)
    convert.convert(str(folder), "4bpw", tmp_path / "start", effort="best", smoke=False)
    paths = [f"model.layers.0.mlp.switch_mlp.{name}_proj" for name in ("gate", "up", "down")]
    dense = [
        runner.make_dense(runner.load_runner(tmp_path / n, False), paths)
        for n in ("whole", "turns", "start")
    ]
    for path in paths:
        whole, turns, start = (np.array(stacks[path].weight) for stacks in dense)
        assert (np.abs(turns - start).max(axis=(1, 2)) > 0).all()  # experts of every turn
        assert np.abs(turns - whole).mean() < np.abs(whole).mean() / 4
