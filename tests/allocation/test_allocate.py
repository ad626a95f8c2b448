"""Plans: within the budget to the byte, guards and overrides obeyed, the same every time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import TOKENS, Maker, llama

from mint_mlx.allocation.allocate import allocate, feedback_leaves
from mint_mlx.allocation.plan_file import plan_text
from mint_mlx.allocation.search_space import (
    SearchSpace,
    list_candidates,
    parse_override,
    search_space,
    size_range,
)
from mint_mlx.base.errors import MintError
from mint_mlx.base.quant_config import KEEP, QuantConfig, parse_config
from mint_mlx.base.units import parse_budget
from mint_mlx.checkpoint.origin import Origin
from mint_mlx.jobs import measurements
from mint_mlx.jobs.model import Job, prepare
from mint_mlx.measure.fisher import measure
from mint_mlx.measure.profile import Profile
from mint_mlx.measure.sensitivity import Sensitivity
from mint_mlx.measure.text import Text
from mint_mlx.rules.objectives import OBJECTIVES
from mint_mlx.rules.recipes import find_recipe


@pytest.fixture
def space(job: Job) -> SearchSpace:
    """What the default recipe allows for `job`."""
    return SearchSpace(job.inventory, find_recipe("default", {}))


def without_text(trace: dict[str, np.ndarray], **more: Any) -> Sensitivity:
    """A sensitivity that says no more than this."""
    return Sensitivity(Origin(), Text(np.zeros((1, 100), np.int32)), trace, **more)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("budget", ["4bpw", "4.5bpw", "6bpw", "8bpw", "12bpw"])
def test_a_plan_meets_its_budget_to_the_byte(
    job: Job, curves: Profile, space: SearchSpace, budget: str, objective: str
) -> None:
    size = parse_budget(budget)
    trace = {path: np.arange(1.0, 1 + len(curve.energy)) for path, curve in curves.curves.items()}
    plan = allocate(curves, size, space, objective, sensitivity=without_text(trace))
    limit = size.resolve(job.inventory.parameters)
    assert limit is not None
    total = plan.layout(job.inventory).total
    assert total <= limit

    # What is left is too little for the cheapest step up of any layer, or next to nothing.
    candidates = list_candidates(space)
    upgrades = [
        layer.bytes(config) - layer.bytes(plan.choice[layer.path])
        for layer in job.inventory.layers
        for config in candidates[layer.path]
        if layer.bytes(config) > layer.bytes(plan.choice[layer.path])
    ]
    assert total >= 0.995 * limit or total + min(upgrades) > limit


@pytest.mark.parametrize("max_shard", [30_000, 47_000, 60_000])
def test_many_shards_never_break_the_budget(
    job: Job, curves: Profile, space: SearchSpace, monkeypatch: pytest.MonkeyPatch, max_shard: int
) -> None:
    monkeypatch.setattr("mint_mlx.checkpoint.layout.MAX_SHARD", max_shard)
    least, most = size_range(job.inventory, list_candidates(space))
    for limit in np.linspace(1.6 * least, most, 40).astype(int):
        layout = allocate(curves, parse_budget(f"{limit}B"), space).layout(job.inventory)
        assert len(layout.names) > 2
        assert 0.98 * limit < layout.total <= limit


def test_the_same_profile_and_budget_give_the_same_plan(
    job: Job, curves: Profile, space: SearchSpace
) -> None:
    plans = [allocate(curves, parse_budget("4.5bpw"), space) for _ in range(2)]
    first, second = (plan_text(plan, job.inventory) for plan in plans)
    assert first == second


def test_a_budget_that_headers_show_to_be_impossible_names_the_range(
    curves: Profile, space: SearchSpace
) -> None:
    least, _ = size_range(curves.inventory, list_candidates(space))
    with pytest.raises(MintError, match=rf"{least}B.*--budget smallest"):
        allocate(curves, parse_budget(f"{least - 1}B"), space)


def test_the_safety_floor_forbids_what_the_headers_allow(
    job: Job, curves: Profile, space: SearchSpace
) -> None:
    with pytest.raises(MintError, match="safety floor of 9 dB"):
        allocate(curves, parse_budget("2.6bpw"), space)
    smallest = allocate(curves, parse_budget("smallest"), space)
    worst = max(smallest.errors[path].worst for path in smallest.errors)
    assert -10 * np.log10(worst) >= 9
    exact = smallest.layout(job.inventory).total
    assert allocate(curves, parse_budget(f"{exact}B"), space).choice == smallest.choice


def test_a_budget_above_the_ceiling_keeps_everything(curves: Profile, space: SearchSpace) -> None:
    plan = allocate(curves, parse_budget("1GB"), space)
    assert set(plan.choice.values()) == {KEEP}
    assert plan.quantization() == {}


def test_overrides_win_and_the_rest_still_fits(
    job: Job, curves: Profile, space: SearchSpace
) -> None:
    overrides = [
        parse_override("lm_head|embed=8bit-g32"),
        parse_override(r"layers\.0\..*q_proj=mxfp4"),
    ]
    space = search_space(job.inventory, space.recipe, overrides)
    plan = allocate(curves, parse_budget("5bpw"), space)
    assert plan.choice["lm_head"] == plan.choice["model.embed_tokens"] == QuantConfig(8, 32)
    assert str(plan.choice["model.layers.0.self_attn.q_proj"]) == "mxfp4"
    assert plan.layout(job.inventory).total <= 5 * job.inventory.parameters / 8


def test_a_layer_that_feedback_mends_gets_fewer_bits(curves: Profile, space: SearchSpace) -> None:
    trace = {path: np.ones(len(curve.energy)) for path, curve in curves.curves.items()}
    path = "model.layers.1.mlp.switch_mlp.down_proj"
    size = parse_budget("5bpw")
    bits = []
    for remaining in ({}, {path: 0.01}):
        sensitivity = without_text(trace, remaining=remaining)
        fed = allocate(curves, size, space, "fisher-gptq", sensitivity=sensitivity)
        plain = allocate(curves, size, space, "fisher", sensitivity=sensitivity)
        bits.append(fed.choice[path].bits)
        assert plain.choice[path].bits == bits[0]
    assert bits[1] < bits[0]


def test_feedback_mends_what_it_knows(job: Job) -> None:
    """Only affine codes of layers whose inputs are followed."""
    layer = next(layer for layer in job.inventory.layers if layer.role == "expert_down")
    sensitivity = without_text({}, remaining={layer.path: 0.5})
    configs = (QuantConfig(4, 32), parse_config("mxfp4"), KEEP)
    assert feedback_leaves(layer, configs, sensitivity).tolist() == [0.5, 1, 1]
    assert feedback_leaves(layer, configs, None).tolist() == [1, 1, 1]
    heads = replace(layer, kind="multi-linear")
    assert feedback_leaves(heads, configs, sensitivity).tolist() == [1, 1, 1]


def test_a_sensitivity_of_another_model_is_refused(make: Maker) -> None:
    one, two = (prepare(str(make(llama(1), f"m{seed}", seed=seed))) for seed in (0, 1))
    sensitivity = measure(one.source, one.inventory, Text(TOKENS, "random"))
    profile = measurements.get_profile(two)
    space = SearchSpace(two.inventory, two.recipe)
    with pytest.raises(MintError, match="another model"):
        allocate(profile, parse_budget("5bpw"), space, "fisher", sensitivity=sensitivity)
