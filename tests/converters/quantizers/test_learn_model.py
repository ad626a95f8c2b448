"""A whole model is learned, block by block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import VOCAB, Maker, Notes, kl, llama, qwen3_moe

from mint_mlx.checkpoint.source import load_source
from mint_mlx.converters.quantizers import learn_block, learn_model
from mint_mlx.jobs import convert
from mint_mlx.measure.self_text import random_windows, write_tokens
from mint_mlx.rules import efforts
from mint_mlx.runtime import runner


def test_best_beats_balanced_on_a_trained_model(
    demo_model: Path, demo_text: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efforts, "TOKENS", 1024)
    monkeypatch.setattr(learn_block, "STEPS", 36)
    monkeypatch.setattr(learn_block, "TOKENS", 512)
    divergence = {}
    for effort in ("balanced", "best"):
        out = tmp_path / effort
        result = convert.convert(str(demo_model), "4bpw", out, effort=effort, smoke=False)
        divergence[effort] = kl(demo_model, out, demo_text)
    assert (result.plan.quantizer, result.plan.effort) == ("learn", "best")
    print(divergence)
    assert divergence["best"] < 0.9 * divergence["balanced"]


def test_best_streamed_is_best(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is read block by block: the same plan, and nearly the same weights."""
    folder = str(make(qwen3_moe(2, experts=8)))
    whole, streamed = (tmp_path / name for name in ("whole", "streamed"))
    convert.convert(folder, "5bpw", whole, effort="best", smoke=False)
    monkeypatch.setattr(runner, "fits_here", lambda size: False)
    notes = Notes()
    result = convert.convert(folder, "5bpw", streamed, effort="best", smoke=False, report=notes)
    assert result.plan.quantizer == "learn"

    # Each block reports each of its steps, and so does the head.
    steps = [f"step {step + 1} of {learn_block.STEPS}" for step in range(learn_block.STEPS)]
    learners = ("block 0", "block 1", "head")
    assert notes.details == [f"{name} learns, {step}" for name in learners for step in steps]
    shares = [share for share in notes.shares if share is not None]
    assert shares == sorted(shares)
    assert (len(shares), shares[-1]) == (len(notes.details), 1.0)
    assert notes.begun == notes.expected == ["convert", "verify", "refine"]

    first, second = (runner.load_runner(path, False).model.layers[1] for path in (whole, streamed))
    for one, two in (
        (first.self_attn.v_proj.weight, second.self_attn.v_proj.weight),
        (first.mlp.switch_mlp.up_proj.weight, second.mlp.switch_mlp.up_proj.weight),
    ):
        np.testing.assert_allclose(np.array(one), np.array(two), atol=0.1 * np.array(one).std())


@pytest.mark.parametrize("stored", [None, pytest.param("8bit-g32", marks=pytest.mark.slow)])
def test_best_takes_the_ways_of_a_gpu(
    like_a_gpu: None,
    make: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: str | None,
) -> None:
    monkeypatch.setattr(efforts, "TOKENS", 256)  # a CPU is slow with 16-bit numbers
    monkeypatch.setattr(learn_block, "STEPS", 6)
    monkeypatch.setattr("mint_mlx.converters.quantizers.distil.STEPS", 6)
    folder = make(llama(2))
    if stored:
        out = tmp_path / "stored"
        folder = convert.convert(str(folder), None, out, uniform=stored, smoke=False).path
    for effort in ("balanced", "best"):
        convert.convert(str(folder), "4bpw", tmp_path / effort, effort=effort, smoke=False)
    tokens = write_tokens(load_source(str(folder)), random_windows(VOCAB, 512, seed=5), seed=5)[0]
    assert kl(folder, tmp_path / "best", tokens) < 0.95 * kl(folder, tmp_path / "balanced", tokens)


def test_best_in_turns_is_near_best(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Steps large enough for so few to move codes, and text enough for every expert to have some.
    monkeypatch.setattr(learn_block, "STEPS", 8)
    monkeypatch.setattr(learn_block, "LATENT", 0.02)
    monkeypatch.setattr(learn_block, "TOKENS", 2048)
    monkeypatch.setattr(efforts, "TOKENS", 2048)
    monkeypatch.setattr("mint_mlx.measure.self_text.LENGTH", 256)

    # All experts at once, in four turns, and not at all.
    folder = str(make(qwen3_moe(1, experts=8)))
    notes = Notes()
    outs = [tmp_path / name for name in ("whole", "turns", "start")]
    convert.convert(folder, "4bpw", outs[0], effort="best", smoke=False)
    monkeypatch.setattr(learn_model, "turns", lambda inventory, tokens: 4)
    convert.convert(folder, "4bpw", outs[1], effort="best", smoke=False, report=notes)
    steps = 4 * learn_block.STEPS
    block_notes = [detail for detail in notes.details if detail.startswith("block 0")]
    assert block_notes[-1] == f"block 0 learns, step {steps} of {steps}"
    monkeypatch.setattr(learn_model, "learn_in_turns", lambda block, *_: block.start)
    convert.convert(folder, "4bpw", outs[2], effort="best", smoke=False)

    # Experts of every turn have learned, to about the same weights as at once.
    paths = [f"model.layers.0.mlp.switch_mlp.{name}_proj" for name in ("gate", "up", "down")]
    dense = [runner.make_dense(runner.load_runner(out, False), paths) for out in outs]
    for path in paths:
        whole, turns, start = (np.array(stacks[path].weight) for stacks in dense)
        # A turn whose held-out windows got no better keeps its start.
        assert (np.abs(turns - start).max(axis=(1, 2)) > 0).sum() >= 6
        assert np.abs(turns - whole).mean() < np.abs(whole).mean() / 4
