"""Objectives' entries: facts, losses, which layers they protect, what the levels make of them."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Maker, llama

from mint_mlx.allocation.allocate import allocate
from mint_mlx.allocation.plan_file import read_plan
from mint_mlx.allocation.search_space import SearchSpace
from mint_mlx.base.errors import UsageError
from mint_mlx.base.files import PLAN_FILE
from mint_mlx.base.units import parse_budget
from mint_mlx.checkpoint.layers import Layer
from mint_mlx.converters.quantizers.registry import QUANTIZERS
from mint_mlx.jobs import convert, measurements
from mint_mlx.jobs.model import Job, prepare
from mint_mlx.rules import efforts
from mint_mlx.rules.objectives import (
    OBJECTIVES,
    SATURATION,
    Context,
    Objective,
    find_objective,
    needs_sensitivity,
    prior,
)
from mint_mlx.rules.recipes import find_recipe

PATH = "model.layers.1.mlp.down_proj"


def a_layer(path: str = PATH, role: str = "mlp", experts: int = 1) -> Layer:
    shape = (8, 32) if experts == 1 else (experts, 8, 32)
    return Layer(path, shape, "BF16", "linear" if experts == 1 else "experts", role)


def test_every_entry_is_found_by_its_name() -> None:
    for name, entry in OBJECTIVES.items():
        assert find_objective(name) is entry
        assert entry.name == name
        assert entry.help
        assert needs_sensitivity(name) == entry.needs_sensitivity
        assert entry.without_feedback in ("", *OBJECTIVES)
        assert entry.expectation.keys() <= QUANTIZERS.keys()
    assert not needs_sensitivity(None)
    assert not needs_sensitivity("other")
    with pytest.raises(UsageError, match=r"no objective is called 'other': there are prior, "):
        find_objective("other")


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_loss_has_a_value_for_each_candidate_and_grows_with_the_error(name: str) -> None:
    layer = a_layer(experts=4)
    context = Context(2, fisher={PATH: np.full(4, 0.5)}, remaining={PATH: np.array([0.5, 0.5])})
    errors = np.array([[0.01] * 4, [0.1] * 4])
    losses = OBJECTIVES[name].loss(layer, errors, context)
    assert losses.shape == (2,)
    assert losses.dtype == np.float64
    assert 0 < losses[0] < losses[1]


def test_fisher_sums_the_cost_of_every_expert() -> None:
    context = Context(2, fisher={PATH: np.array([1.0, 3.0])}, remaining={PATH: np.array([0.25])})
    layer, errors = a_layer(experts=2), np.array([[0.1, 0.2]])
    expected = 0.1 * (1 + SATURATION * 0.1) + 3 * 0.2 * (1 + SATURATION * 0.2)
    assert OBJECTIVES["fisher"].loss(layer, errors, context).item() == pytest.approx(expected)
    after = OBJECTIVES["fisher-gptq"].loss(layer, errors, context).item()
    assert after == pytest.approx(expected / 4)


def test_the_levels_name_entries_and_fall_back_without_feedback() -> None:
    for level in efforts.EFFORTS.values():
        assert level.objective in OBJECTIVES
        assert level.quantizer in QUANTIZERS
        assert level.objective_for(feedback=True) == level.objective
    assert efforts.EFFORTS["balanced"].objective_for(feedback=False) == "fisher"
    assert efforts.EFFORTS["fast"].objective_for(feedback=False) == "prior"


def test_a_kl_is_expected_where_the_entry_knows_the_quantizer() -> None:
    assert efforts.expected_kl("fisher", "rtn", 0.5) == 0.5
    assert efforts.expected_kl("fisher-gptq", "gptq", 0.5) == pytest.approx(0.6)
    for unknown in (("fisher-gptq", "rtn", 0.5), ("prior", "gptq", 0.5), (None, "gptq", 0.5)):
        assert efforts.expected_kl(*unknown) is None
    assert efforts.expected_kl("fisher", "rtn", None) is None


def test_an_expected_kl_is_told_as_a_band() -> None:
    assert efforts.band_text(0.5) == "0.1 to 2.8"
    assert efforts.band(0.5) == pytest.approx((0.1, 2.75))
    assert efforts.band(None) is None

    # A ternary demo model at 4.44 bits, of which all but the embedding is exact: expected and true.
    low, high = efforts.band(0.000122) or (0.0, 0.0)
    assert low < 0.0010 < high
    assert efforts.expectation("fisher", "rtn", 0.5).endswith("0.1 to 2.8 nats a token")


def test_a_new_objective_is_one_entry(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is accepted, allocated by, and named in the plan."""
    entry = Objective("toy", "the worst expert", lambda layer, nmse, context: nmse.max(axis=1))
    monkeypatch.setitem(OBJECTIVES, "toy", entry)
    model = make(llama(1))
    result = convert.convert(str(model), "5bpw", model.parent / "out", objective="toy", smoke=False)
    assert result.plan.objective == "toy"
    assert result.plan.loss is not None
    assert read_plan(result.path / PLAN_FILE).objective == "toy"


def test_mint_protects_what_its_priors_name(make: Maker) -> None:
    folder = make(llama(4))
    curves = measurements.get_profile(prepare(str(folder)))
    budget = parse_budget("4.5bpw")
    space = SearchSpace(curves.inventory, find_recipe("default", {}))
    plain = allocate(curves, budget, space, "nmse")
    mint = allocate(curves, budget, space, "mint")
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
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == len(costs)
    assert cost("mlp.gate") == cost("embed_tokens")
