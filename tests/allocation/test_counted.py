"""An expert that does nothing forbids nothing; where the floor decides, the refusal says so."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import TOKENS, Maker, Notes, Weights, edit_weights, kl, llama, qwen3_moe

from mint_mlx.allocation.counted import BROKEN, counted_errors
from mint_mlx.base.errors import MintError
from mint_mlx.base.quant_config import KEEP, QuantConfig
from mint_mlx.jobs.convert import Result, convert
from mint_mlx.measure.curve import RateDistortion

FOUR = QuantConfig(4, 64)
UP = "model.layers.0.mlp.switch_mlp.up_proj"


def curve(errors: list[float], energy: list[float]) -> RateDistortion:
    return RateDistortion("layer", (FOUR,), np.array([errors]), np.array(energy))


@pytest.mark.parametrize(
    ("errors", "energy", "expected"),
    [
        ([0.01, 1.0, 0.02, 0.01], [1.0, 1e-16, 2.0, 1.0], [0.01, 0.0, 0.02, 0.01]),
        ([0.01, 1.0, 0.02, 0.01], [1.0, 1e-3, 2.0, 1.0], [0.01, 1.0, 0.02, 0.01]),
        # Infinite weights count, whatever they stand for.
        ([0.01, BROKEN, 0.02, 0.01], [1.0, 0.0, 2.0, 1.0], [0.01, BROKEN, 0.02, 0.01]),
        ([0.01, 1e20, 0.02, 0.01], [1.0, 1e-16, 2.0, 1.0], [0.01, 1e20, 0.02, 0.01]),
        # Neither one huge expert nor many idle ones make the others negligible.
        ([0.01, 0.2, 0.2, 0.2], [1e9, 1.0, 1.0, 1.0], [0.01, 0.2, 0.2, 0.2]),
        ([1.0, 1.0, 0.2, 0.2], [1e-16, 1e-16, 1.0, 1.0], [0.0, 0.0, 0.2, 0.2]),
        ([1.0], [1e-16], [1.0]),
    ],
)
def test_which_errors_count(
    errors: list[float], energy: list[float], expected: list[float]
) -> None:
    assert counted_errors(curve(errors, energy), FOUR).tolist() == expected
    assert counted_errors(curve(errors, energy), KEEP).tolist() == [0.0] * len(errors)


def scaled(folder: Path, name: str, factor: float) -> Path:
    """Multiply the tensors that have this in their name."""

    def change(weights: Weights) -> Weights:
        small = {n: a * factor for n, a in weights.items() if name in n}
        return weights | {n: a.astype(mx.bfloat16) for n, a in small.items()}

    edit_weights(folder, change)
    return folder


@pytest.mark.parametrize("factor", [1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("budget", ["4.5bpw", "5.6bpw"])
def test_an_idle_expert_costs_no_more_than_one_of_zeros(
    factor: float, budget: str, make: Maker, tmp_path: Path
) -> None:
    results: list[Result] = []
    for name, by in (("idle", factor), ("zero", 0.0)):
        folder = scaled(make(qwen3_moe(2, experts=8), name=name), "layers.0.mlp.experts.3.", by)
        results.append(convert(str(folder), budget, tmp_path / f"{name}-out", smoke=False))
    assert results[0].plan.choice == results[1].plan.choice
    assert results[0].plan.choice[UP] != KEEP
    sources = (tmp_path / "idle", tmp_path / "zero")
    costs = [kl(s, r.path, TOKENS) for s, r in zip(sources, results, strict=True)]
    assert costs[0] < costs[1] * 1.1 + 1e-4


def test_a_refusal_names_the_layer_that_the_floor_keeps(make: Maker, tmp_path: Path) -> None:
    folder = scaled(make(llama(2)), "mlp.down_proj", 1e-8)
    pattern = r"floor of 9 dB.*mlp.down_proj reaches .* dB at most, at .*--override 'model"
    with pytest.raises(MintError, match=pattern):
        convert(str(folder), "4.5bpw", tmp_path / "out", smoke=False)


def test_a_layer_that_the_floor_keeps_is_told(make: Maker, tmp_path: Path) -> None:
    folder = scaled(make(llama(2)), "layers.1.mlp.down_proj", 1e-8)
    notes = Notes()
    result = convert(str(folder), "10bpw", tmp_path / "out", smoke=False, report=notes)
    path = "model.layers.1.mlp.down_proj"
    assert result.plan.choice[path] == KEEP
    (note,) = [note for note in notes.said if "dB at most" in note]
    assert note.startswith(f"{path} reaches ")
    assert f"stays unquantized: --override '{path}=" in note


def test_a_refusal_names_the_expert(make: Maker, tmp_path: Path) -> None:
    folder = scaled(make(qwen3_moe(2)), "mlp.experts.", 1e-8)
    with pytest.raises(MintError, match=r"switch_mlp.\w+ \(expert \d\) reaches 0.0 dB at most"):
        convert(str(folder), "4.5bpw", tmp_path / "out", smoke=False)
