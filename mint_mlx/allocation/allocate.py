"""From rate-distortion curves and a budget to a plan: floors and overrides, then the knapsack.

Costs are exact bytes on disk, so a budget is met to the byte; the loss is that of a named objective
(objectives.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..base.errors import MintError
from ..base.quant_config import KEEP, QuantConfig
from ..base.units import Budget
from ..base.versions import versions
from ..checkpoint.layers import Inventory, Layer
from ..checkpoint.roles import EXPERTS
from ..checkpoint.source import Source
from ..converters.sources.layouts import is_symmetric
from ..measure.curve import RateDistortion, sqnr_db
from ..measure.moments import takes_feedback
from ..measure.profile import Profile
from ..measure.sensitivity import Sensitivity
from ..measure.sensitivity_file import check_sensitivity
from ..rules.efforts import EFFORTS
from ..rules.objectives import Context, Objective, find_objective
from .counted import counted_errors, describe_veto
from .pace import Pace, predicted, timed_candidates
from .plan import LayerError, Plan
from .search_space import (
    Candidates,
    SearchSpace,
    check_feasible,
    list_candidates,
    size_range,
)
from .solvers import fit_layout, make_solver
from .uniform import uniform_choice


def above_floor(
    space: SearchSpace,
    options: Candidates,
    curves: dict[str, RateDistortion],
    with_sensitivity: bool = False,
) -> Candidates:
    """The candidates whose worst expert is not below the recipe's SQNR floor.

    Experts that do nothing don't count (counted.py). Overrides are exempt. A layer without such a
    candidate stays unquantized.

    Args:
        space: has the recipe and the overrides.
        options: candidates of every layer.
        curves: measured errors of every layer.
        with_sensitivity: routed experts have the lower floor that goes with a sensitivity, which
            says what their errors cost.
    """

    def safe(layer: Layer) -> tuple[QuantConfig, ...]:
        if layer.path in space.forced:
            return options[layer.path]
        lower = with_sensitivity and layer.role in EXPERTS
        floor = space.recipe.expert_floor if lower else space.recipe.sqnr_floor
        curve = curves[layer.path]
        above = tuple(
            config
            for config in options[layer.path]
            if not config.quantized or sqnr_db(float(counted_errors(curve, config).max())) >= floor
        )
        return above or (KEEP,)

    return {layer.path: safe(layer) for layer in space.inventory.layers}


def safe_candidates(
    space: SearchSpace, profile: Profile, budget: Budget, with_sensitivity: bool = False
) -> Candidates:
    """Every layer's candidates above the safety floor (see `above_floor`).

    Raises:
        MintError: the budget can't be met with them.
    """
    inventory = space.inventory
    options = list_candidates(space)
    limit = budget.resolve(inventory.parameters)
    if limit is not None:
        check_feasible(limit, inventory, options)
    safe = above_floor(space, options, profile.curves, with_sensitivity)
    if limit is not None:
        veto = _veto(inventory, options, safe, profile.curves)
        check_feasible(limit, inventory, safe, floor=space.recipe.sqnr_floor, veto=veto)
    return safe


def _veto(
    inventory: Inventory,
    options: Candidates,
    safe: Candidates,
    curves: Mapping[str, RateDistortion],
) -> str:
    """What keeps the layer unquantized that costs most so; '' where the floor forbids none whole.

    Args:
        inventory: the layers.
        options: their candidates before the floor.
        safe: those above it.
        curves: the measured errors.
    """
    forbidden = _forbidden(inventory, options, safe)
    if not forbidden:
        return ""
    layer = max(forbidden, key=lambda layer: layer.bytes(KEEP))
    return describe_veto(curves[layer.path], options[layer.path], layer.kind == "experts")


def _forbidden(inventory: Inventory, options: Candidates, safe: Candidates) -> list[Layer]:
    """The layers of which the floor forbids every quantized candidate."""
    return [
        layer
        for layer in inventory.layers
        if any(config.quantized for config in options[layer.path])
        and not any(config.quantized for config in safe[layer.path])
    ]


def describe_vetoes(space: SearchSpace, profile: Profile, with_sensitivity: bool) -> list[str]:
    """A sentence for each layer that stays unquantized since the floor forbids all else.

    Args:
        space: the candidates.
        profile: measured curves of the layers.
        with_sensitivity: as of `above_floor`.
    """
    options = list_candidates(space)
    safe = above_floor(space, options, profile.curves, with_sensitivity)
    return [
        describe_veto(profile.curves[layer.path], options[layer.path], layer.kind == "experts")
        for layer in _forbidden(space.inventory, options, safe)
    ]


def allocate(
    profile: Profile,
    budget: Budget,
    space: SearchSpace,
    objective: str | None = None,
    sensitivity: Sensitivity | None = None,
    with_sensitivity: bool | None = None,
    pace: Pace | None = None,
) -> Plan:
    """Choose each layer's configuration: the whole checkpoint fits the budget at the least loss.

    Args:
        profile: measured curves of the layers.
        budget: bytes, bits per weight, or `smallest`.
        space: the candidates; its recipe has the floor and the priors.
        objective: a name of objectives.OBJECTIVES; the recipe's by default, else that of
            `--effort fast`.
        sensitivity: what objectives that need one weigh errors with.
        with_sensitivity: whether experts have the lower floor that goes with a sensitivity; by
            default as the objective says.
        pace: how fast choices decode; with a goal, only those that are fast enough are chosen from.

    Raises:
        MintError: the budget or the goal can't be met, or the objective is wrong.
    """
    inventory = space.inventory
    recipe = space.recipe
    name = objective or recipe.objective or EFFORTS["fast"].objective
    entry = find_objective(name)

    # What is too coarse for any budget is not a candidate.
    if with_sensitivity is None:
        with_sensitivity = entry.needs_sensitivity
    options = safe_candidates(space, profile, budget, with_sensitivity)
    if pace is not None and pace.goal is not None:
        options = timed_candidates(pace, inventory, options)
    if entry.needs_sensitivity and sensitivity is None:
        raise MintError(
            f"the objective {name} weighs errors with a sensitivity: measure one with `mint-mlx "
            "sensitivity`"
        )

    # Bytes and loss of each candidate are all that the knapsack knows.
    costs = [
        np.array([layer.bytes(config) for config in options[layer.path]], dtype=np.int64)
        for layer in inventory.layers
    ]
    context = loss_context(profile, space, options, sensitivity)
    losses = [
        candidate_losses(layer, options[layer.path], profile.curves[layer.path], entry, context)
        for layer in inventory.layers
    ]
    limit = budget.resolve(inventory.parameters)
    if limit is None:
        limit = size_range(inventory, options)[0]
    solver = make_solver(inventory, options, costs, losses, pace)
    picks, loss, gap = fit_layout(inventory, options, costs, limit, solver)

    choice = {
        layer.path: options[layer.path][pick]
        for layer, pick in zip(inventory.layers, picks, strict=True)
    }
    return Plan(
        origin=profile.origin,
        choice=choice,
        recipe=recipe.name,
        objective=name,
        budget=budget.text,
        budget_bytes=limit if budget.text != "smallest" else None,
        loss=loss,
        gap=gap,
        errors=measured_errors(choice, profile.curves),
        versions=profile.versions or {},
        speed=predicted(pace, inventory, choice),
        speed_goal=pace.goal.text if pace is not None and pace.goal is not None else None,
    )


def loss_context(
    profile: Profile, space: SearchSpace, options: Candidates, sensitivity: Sensitivity | None
) -> Context:
    """What an objective may know beyond a layer."""
    inventory = space.inventory
    remaining = {
        layer.path: feedback_leaves(
            layer, options[layer.path], sensitivity, profile.curves[layer.path]
        )
        for layer in inventory.layers
    }
    return Context(
        inventory.blocks,
        **space.recipe.priors.model_dump(),
        fisher=_fisher(profile, sensitivity),
        remaining=remaining,
    )


def candidate_losses(
    layer: Layer,
    configs: Sequence[QuantConfig],
    curve: RateDistortion,
    objective: Objective,
    context: Context,
) -> np.ndarray:
    """The loss of each of a layer's candidates, float64 (candidates,)."""
    # One candidate leaves no choice, and an override may name what was never measured.
    if len(configs) == 1:
        return np.zeros(1)
    errors = np.stack([counted_errors(curve, config, objective.weighted) for config in configs])
    return objective.loss(layer, errors, context)


def _fisher(profile: Profile, sensitivity: Sensitivity | None) -> dict[str, np.ndarray]:
    """KL divergence in nats per token at an NMSE of one, by layer and expert.

    A layer that no gradient reached (an indexer that only selects) is taken to cost what the median
    layer does."""
    if sensitivity is None:
        return {}

    # Both must be of the same weights, and of the same layers.
    layers = profile.inventory.layers
    if not sensitivity.origin.matches(profile.origin):
        raise MintError(
            f"the sensitivity is that of another model ({sensitivity.origin.source}): measure it "
            "anew"
        )
    check_sensitivity(sensitivity, profile.inventory)
    missing = [layer.path for layer in layers if layer.path not in sensitivity.trace]
    if missing:
        raise MintError(
            f"the sensitivity lacks the layer {missing[0]} ({len(missing)} such): measure it anew"
        )

    costs = {}
    for layer in layers:
        energy = profile.curves[layer.path].energy
        mean_square = energy / (layer.size / len(energy))
        costs[layer.path] = mean_square * sensitivity.per_weight(layer.path)
    reached = [cost.sum() for cost in costs.values() if cost.sum() > 0]
    usual = float(np.median(reached)) if reached else 1.0
    return {
        path: cost if cost.sum() > 0 else np.full(len(cost), usual / len(cost))
        for path, cost in costs.items()
    }


def feedback_leaves(
    layer: Layer,
    configs: Sequence[QuantConfig],
    sensitivity: Sensitivity | None,
    curve: RateDistortion | None = None,
) -> np.ndarray:
    """The share of each candidate's cost that error feedback leaves, float64 (candidates,).

    It is 1 for candidates that aren't affine, which error feedback doesn't know, and for those
    that store the grid that the weights lie on, whose codes are taken as they are.
    """
    on_grid = curve.grid_nmse if curve is not None else {}
    share = 1.0
    if sensitivity is not None and takes_feedback(layer):
        share = sensitivity.remaining.get(layer.path, 1.0)
    takes = [config.mode == "affine" and config not in on_grid for config in configs]
    return np.array([share if taken else 1.0 for taken in takes])


def measured_errors(
    choice: dict[str, QuantConfig], curves: dict[str, RateDistortion]
) -> dict[str, LayerError]:
    """The measured error of each quantized layer, where its curve holds it."""
    errors = {}
    for path, config in choice.items():
        if config.quantized and path in curves and config in curves[path].configs:
            nmse = curves[path].of(config)
            errors[path] = LayerError(float(nmse.mean()), float(nmse.max()))
    return errors


def uniform(
    source: Source,
    inventory: Inventory,
    config: QuantConfig,
    forced: Mapping[str, QuantConfig],
    ignore_guards: bool = False,
) -> Plan:
    """A plan of the same configuration for every layer that can take it, overrides aside.

    No profile is needed. `keep` unpacks affine codes of a foreign format with zero points of any
    value: as biases of 16 bits these would lose digits."""
    choice = uniform_choice(inventory, config, ignore_guards)
    if not config.quantized and not is_symmetric(source.config, source.path, source.headers):
        choice = {path: KEEP if c.mode == "affine" else c for path, c in choice.items()}
    return Plan(
        origin=source.origin,
        choice=choice | dict(forced),
        recipe=f"uniform {config}",
        versions=versions(),
    )


def dequantized(source: Source, inventory: Inventory, forced: Mapping[str, QuantConfig]) -> Plan:
    """A plan of 16 bits for every layer, however the source stores it, overrides aside."""
    choice = {layer.path: KEEP for layer in inventory.layers}
    return Plan(
        origin=source.origin,
        choice=choice | dict(forced),
        recipe="dequantized",
        versions=versions(),
    )
