"""The levels of effort: what each sees, and that more of it is better."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import DEFAULT, Maker, kl, llama
from released import known, released

from mint_mlx.base.errors import UsageError
from mint_mlx.checkpoint.source import load_source
from mint_mlx.converters.quantizers.inputs import Moments
from mint_mlx.jobs import convert, measurements, steps
from mint_mlx.jobs.model import prepare
from mint_mlx.rules import efforts


def test_balanced_is_what_people_get(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efforts, "DEFAULT", DEFAULT)
    plan = convert.convert(str(make(llama(1))), "5bpw", tmp_path / "out", smoke=False).plan
    assert (plan.effort, plan.objective, plan.quantizer) == (
        "balanced",
        "fisher-gptq",
        "search-gptaq",
    )


def test_balanced_beats_fast_on_a_trained_model(
    demo_model: Path, demo_text: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efforts, "TOKENS", 4096)
    divergence = {}
    for effort in ("fast", "balanced"):
        convert.convert(str(demo_model), "4bpw", tmp_path / effort, effort=effort, smoke=False)
        divergence[effort] = kl(demo_model, tmp_path / effort, demo_text)
    assert divergence["balanced"] < 0.75 * divergence["fast"]


@pytest.mark.parametrize("tokens", [-5, 256, 1023])
def test_too_little_text_is_refused(make: Maker, tmp_path: Path, tokens: int) -> None:
    folder = str(make(llama(1)))
    with pytest.raises(UsageError, match="too few"):
        convert.convert(folder, "5bpw", tmp_path / "out", effort="balanced", tokens=tokens)
    with pytest.raises(UsageError, match="too few"):
        steps.write_sensitivity(folder, tmp_path / "s.npz", tokens=tokens)


@pytest.mark.parametrize(
    "family", ["gpt_oss", "deepseek_v3", "qwen3_next", "llama4", "gemma3_text", "kimi_k2"]
)
def test_released_families_are_balanced(tmp_path: Path, family: str) -> None:
    """Windows, latents, linear attention, chunks, tied heads and quantized sources: all of it."""
    if not known(family):
        pytest.skip("this mlx-lm has no such family")
    folder = released(family, tmp_path / family)
    result = convert.convert(str(folder), "5bpw", tmp_path / "out", effort="balanced", smoke=False)
    assert result.plan.objective == "fisher-gptq"
    assert result.plan.quantizer == "search-gptaq"
    assert result.plan.effort == "balanced"

    # Every linear layer's inputs are followed.
    measured = measurements.get_sensitivity(prepare(str(folder)))
    assert measured is not None
    moments = Moments(load_source(str(folder)), result.inventory, measured)
    layers = [layer for layer in result.inventory.layers if layer.kind in ("linear", "experts")]
    assert [layer.path for layer in layers if moments.of(layer.path) is None] == []
