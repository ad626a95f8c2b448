"""Plans: within the budget to the byte, guards and overrides obeyed, the same every time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import Maker, llama, mixtral, qwen3_moe

from mint_mlx.allocation.allocate import allocate, feedback_leaves, uniform
from mint_mlx.allocation.plan_file import plan_text
from mint_mlx.allocation.search_space import (
    SearchSpace,
    list_candidates,
    parse_override,
    search_space,
    size_range,
)
from mint_mlx.base.errors import MintError, UsageError
from mint_mlx.base.quant_config import KEEP, QuantConfig, parse_config
from mint_mlx.base.units import parse_budget
from mint_mlx.checkpoint.origin import Origin
from mint_mlx.jobs import measurements
from mint_mlx.jobs.model import Job, prepare
from mint_mlx.measure.profile import Profile
from mint_mlx.measure.sensitivity import Sensitivity
from mint_mlx.rules.objectives import OBJECTIVES, Context, prior
from mint_mlx.rules.recipes import Recipe, find_recipe


@pytest.fixture
def job(make: Maker) -> Job:
    return prepare(str(make(qwen3_moe(2))))


@pytest.fixture
def curves(job: Job) -> Profile:
    return measurements.get_profile(job)


DEFAULT = find_recipe("default", {})


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("budget", ["4bpw", "4.5bpw", "6bpw", "8bpw", "12bpw"])
def test_a_plan_meets_its_budget_to_the_byte(
    job: Job, curves: Profile, budget: str, objective: str
) -> None:
    size = parse_budget(budget)
    trace = {path: np.arange(1.0, 1 + len(curve.energy)) for path, curve in curves.curves.items()}
    sensitivity = Sensitivity(Origin(), np.zeros((1, 100), np.int32), "", trace)
    plan = allocate(
        curves, size, SearchSpace(curves.inventory, DEFAULT), objective, sensitivity=sensitivity
    )
    limit = size.resolve(job.inventory.parameters)
    assert limit is not None
    total = plan.layout(job.inventory).total
    upgrades = [
        layer.bytes(c) - layer.bytes(plan.choice[layer.path])
        for layer in job.inventory.layers
        for c in list_candidates(SearchSpace(job.inventory, DEFAULT))[layer.path]
        if layer.bytes(c) > layer.bytes(plan.choice[layer.path])
    ]
    assert total <= limit
    assert total >= 0.995 * limit or total + min(upgrades) > limit


@pytest.mark.parametrize("max_shard", [30_000, 47_000, 60_000])
def test_many_shards_never_break_the_budget(
    job: Job, curves: Profile, monkeypatch: pytest.MonkeyPatch, max_shard: int
) -> None:
    from mint_mlx.checkpoint import layout

    monkeypatch.setattr(layout, "MAX_SHARD", max_shard)
    least, most = size_range(job.inventory, list_candidates(SearchSpace(job.inventory, DEFAULT)))
    for limit in np.linspace(1.6 * least, most, 40).astype(int):
        plan = allocate(curves, parse_budget(f"{limit}B"), SearchSpace(curves.inventory, DEFAULT))
        made = plan.layout(job.inventory)
        assert len(made.names) > 2 and 0.98 * limit < made.total <= limit


def test_the_same_profile_and_budget_give_the_same_plan(job: Job, curves: Profile) -> None:
    first, second = (
        plan_text(
            allocate(curves, parse_budget("4.5bpw"), SearchSpace(curves.inventory, DEFAULT)),
            job.inventory,
        )
        for _ in range(2)
    )
    assert first == second


def test_a_budget_that_headers_show_to_be_impossible_names_the_range(
    job: Job, curves: Profile
) -> None:
    least, _ = size_range(job.inventory, list_candidates(SearchSpace(job.inventory, DEFAULT)))
    with pytest.raises(MintError, match=rf"{least}B.*--budget smallest"):
        allocate(curves, parse_budget(f"{least - 1}B"), SearchSpace(curves.inventory, DEFAULT))


def test_the_safety_floor_forbids_what_the_headers_allow(job: Job, curves: Profile) -> None:
    with pytest.raises(MintError, match="safety floor of 9 dB"):
        allocate(curves, parse_budget("2.6bpw"), SearchSpace(curves.inventory, DEFAULT))
    smallest = allocate(curves, parse_budget("smallest"), SearchSpace(curves.inventory, DEFAULT))
    worst = max(smallest.errors[path].worst for path in smallest.errors)
    assert -10 * np.log10(worst) >= 9
    exact = smallest.layout(job.inventory).total
    assert (
        allocate(curves, parse_budget(f"{exact}B"), SearchSpace(curves.inventory, DEFAULT)).choice
        == smallest.choice
    )


def test_a_budget_above_the_ceiling_keeps_everything(job: Job, curves: Profile) -> None:
    plan = allocate(curves, parse_budget("1GB"), SearchSpace(curves.inventory, DEFAULT))
    assert set(plan.choice.values()) == {KEEP} and plan.quantization() == {}


def test_overrides_win_and_the_rest_still_fits(job: Job, curves: Profile) -> None:
    overrides = [
        parse_override("lm_head|embed=8bit-g32"),
        parse_override(r"layers\.0\..*q_proj=mxfp4"),
    ]
    plan = allocate(
        curves, parse_budget("5bpw"), search_space(curves.inventory, DEFAULT, overrides)
    )
    assert plan.choice["lm_head"] == plan.choice["model.embed_tokens"] == QuantConfig(8, 32)
    assert str(plan.choice["model.layers.0.self_attn.q_proj"]) == "mxfp4"
    assert plan.layout(job.inventory).total <= 5 * job.inventory.parameters / 8


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("no_such_layer=4bit-g64", "matches no layer"),
        ("down_proj=4bit-g128", "don't divide"),
        ("mlp.gate$=4bit-g64", "--ignore-guards"),
    ],
)
def test_overrides_that_cannot_hold_are_errors(
    curves: Profile, override: str, problem: str
) -> None:
    with pytest.raises(MintError, match=problem):
        allocate(
            curves,
            parse_budget("5bpw"),
            search_space(curves.inventory, DEFAULT, [parse_override(override)]),
        )


@pytest.mark.parametrize(
    "text", ["lm_head", "=4bit-g64", "(=4bit-g64", "x=4bit", "x=7bit-g64", "x=4bit-g48"]
)
def test_malformed_overrides_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError):
        parse_override(text)


def test_guards_hold_in_uniform_plans_and_can_be_overruled(make: Maker) -> None:
    job = prepare(str(make(mixtral(1))))
    gate = "model.layers.0.block_sparse_moe.gate"
    plan = uniform(job.source, job.inventory, QuantConfig(3, 32), {})
    assert plan.choice[gate] == QuantConfig(8, 32)
    assert {c for path, c in plan.choice.items() if path != gate} == {QuantConfig(3, 32)}
    free = uniform(job.source, job.inventory, QuantConfig(3, 32), {}, ignore_guards=True)
    assert free.choice[gate] == QuantConfig(3, 32)


def test_a_uniform_plan_keeps_what_its_group_does_not_divide(job: Job) -> None:
    plan = uniform(job.source, job.inventory, QuantConfig(4, 128), {})
    assert plan.choice["model.layers.0.mlp.switch_mlp.down_proj"] == KEEP
    assert plan.choice["model.layers.0.mlp.switch_mlp.up_proj"] == QuantConfig(4, 128)


def test_mint_protects_what_its_priors_name(make: Maker) -> None:
    folder = make(llama(4))
    curves = measurements.get_profile(prepare(str(folder)))
    plain = allocate(curves, parse_budget("4.5bpw"), SearchSpace(curves.inventory, DEFAULT), "nmse")
    mint = allocate(curves, parse_budget("4.5bpw"), SearchSpace(curves.inventory, DEFAULT), "mint")
    assert mint.choice["lm_head"].bits > plain.choice["lm_head"].bits


def test_the_prior_ranks_the_head_first_and_queries_last(job: Job) -> None:
    def cost(path: str) -> float:
        layer = next(layer for layer in job.inventory.layers if layer.path.endswith(path))
        return prior(layer, np.full((1, layer.experts), 0.5), Context(job.inventory.blocks)).item()

    down = "mlp.switch_mlp.down_proj"
    names = (
        "lm_head",
        f"0.{down}",
        "embed_tokens",
        f"1.{down}",
        "0.self_attn.v_proj",
        "0.self_attn.q_proj",
    )
    costs = [cost(name) for name in names]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == len(costs)
    assert cost("mlp.gate") == cost("embed_tokens")


def test_a_layer_that_feedback_mends_gets_fewer_bits(job: Job, curves: Profile) -> None:
    trace = {path: np.ones(len(curve.energy)) for path, curve in curves.curves.items()}
    path, size = "model.layers.1.mlp.switch_mlp.down_proj", parse_budget("5bpw")
    bits = []
    for left in ({}, {path: 0.01}):
        made = Sensitivity(Origin(), np.zeros((1, 100), np.int32), "", trace, left=left)
        bits.append(
            allocate(
                curves,
                size,
                SearchSpace(curves.inventory, DEFAULT),
                "fisher-gptq",
                sensitivity=made,
            )
            .choice[path]
            .bits
        )
        plain = (
            allocate(
                curves, size, SearchSpace(curves.inventory, DEFAULT), "fisher", sensitivity=made
            )
            .choice[path]
            .bits
        )
        assert plain == bits[0]
    assert bits[1] < bits[0]


def test_feedback_mends_what_it_knows(job: Job) -> None:
    """Only affine codes of layers whose inputs are followed."""
    layer = next(layer for layer in job.inventory.layers if layer.role == "expert_down")
    made = Sensitivity(Origin(), np.zeros((1, 100), np.int32), "", {}, left={layer.path: 0.5})
    configs = (QuantConfig(4, 32), parse_config("mxfp4"), KEEP)
    assert feedback_leaves(layer, configs, made).tolist() == [0.5, 1, 1]
    assert feedback_leaves(layer, configs, None).tolist() == [1, 1, 1]
    assert feedback_leaves(replace(layer, kind="multi-linear"), configs, made).tolist() == [1, 1, 1]


def test_a_recipe_bounds_roles(curves: Profile) -> None:
    rules = [
        {"roles": ["attention"], "floor": 6, "reason": "r"},
        {"roles": ["head"], "keep": True, "reason": "r"},
    ]
    rules.append({"roles": ["expert_up"], "ceiling": 4, "reason": "r"})
    recipe = Recipe.model_validate({"name": "x", "about": "y", "rules": rules, "candidates": "few"})
    plan = allocate(curves, parse_budget("7bpw"), SearchSpace(curves.inventory, recipe))
    assert plan.choice["lm_head"] == KEEP
    assert all(c.bits >= 6 for path, c in plan.choice.items() if "self_attn" in path)
    assert all(c.bits <= 4 for path, c in plan.choice.items() if path.endswith("up_proj"))
    assert all(c.bits in (2, 4, 8, 16) for c in plan.choice.values())


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("name: x\nabout: y\nbits: 4\n", 3, "no such key"),
        (
            "name: x\nabout: y\nrules:\n- roles: [chef]\n  reason: r\n",
            4,
            "no role is called 'chef'",
        ),
        ("name: x\nabout: y\nobjective: best\n", 3, "no objective"),
        ("name: x\nabout: y\nsqnr_floor: .nan\n", 3, "number"),
        (
            "name: x\nabout: y\nrules:\n- {roles: [head], reason: r, floor: 8, ceiling: 4}\n",
            4,
            "lies above",
        ),
        ("name: x\nabout: y\npriors: {first_block: -1}\n", 3, "greater than 0"),
        ("name: [\n", 2, "recipe"),
        ("a: &a [1]\nb: *a\n", 2, "aliases"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int, problem: str
) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(MintError, match=rf"line {line}.*{problem}"):
        find_recipe(str(tmp_path / "r.yaml"), {})
