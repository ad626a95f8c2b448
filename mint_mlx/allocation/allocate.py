"""From rate-distortion curves and a budget to a plan: floors and overrides first, then the
knapsack.

Costs are exact bytes on disk, so a budget is met to the byte; the loss is a named objective's
(objectives.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..base.errors import MintError
from ..base.quant_config import KEEP, QuantConfig
from ..base.units import Budget
from ..base.versions import versions
from ..checkpoint.layers import Inventory, Layer
from ..checkpoint.layout import SHARD_BYTES
from ..checkpoint.roles import EXPERTS
from ..checkpoint.source import Source
from ..measure.moments import takes_feedback
from ..measure.profile import Profile, RateDistortion, sqnr_db
from ..measure.sensitivity import Sensitivity
from ..rules.efforts import EFFORTS
from ..rules.objectives import Context, find_objective
from .knapsack import solve
from .plan import LayerError, Plan
from .search_space import (
    Candidates,
    SearchSpace,
    check_feasible,
    list_candidates,
    size_range,
)
from .uniform import uniform_choice


def above_floor(
    space: SearchSpace,
    options: Candidates,
    curves: dict[str, RateDistortion],
    weighed: bool = False,
) -> Candidates:
    """Drop the candidates whose worst expert lies under the recipe's SQNR floor; overrides are
    exempt.

    Where a sensitivity weighs the errors, routed experts have a lower floor of their own.

    A layer whose candidates all fall stays unquantized.
    """

    def safe(layer: Layer) -> tuple[QuantConfig, ...]:
        if layer.path in space.forced:
            return options[layer.path]
        curve = curves[layer.path]
        recipe = space.recipe
        floor = recipe.expert_floor if weighed and layer.role in EXPERTS else recipe.sqnr_floor
        return tuple(
            c
            for c in options[layer.path]
            if not c.quantized or sqnr_db(float(curve.of(c).max())) >= floor
        ) or (KEEP,)

    return {layer.path: safe(layer) for layer in space.inventory.layers}


def safe_candidates(
    space: SearchSpace, profile: Profile, budget: Budget, weighed: bool = False
) -> Candidates:
    """Each layer's candidates above the safety floor.

    `weighed`: a sensitivity says what errors in experts cost.

    Raises:
        MintError: the budget can't be met with them.
    """
    inventory = space.inventory
    options = list_candidates(space)
    limit = budget.resolve(inventory.parameters)
    if limit is not None:
        check_feasible(limit, inventory, options)
    options = above_floor(space, options, profile.curves, weighed)
    if limit is not None:
        check_feasible(limit, inventory, options, floor=space.recipe.sqnr_floor)
    return options


def allocate(
    profile: Profile,
    budget: Budget,
    space: SearchSpace,
    objective: str | None = None,
    sensitivity: Sensitivity | None = None,
    weighed: bool | None = None,
) -> Plan:
    """Choose each layer's configuration so that the whole checkpoint fits the budget at the least
    loss.

    Args:
        profile: measured curves of the layers.
        budget: bytes, bits per weight, or `smallest`.
        space: the candidates; its recipe has the floor and the priors.
        objective: a name of objectives.OBJECTIVES; the recipe's by default, else that of
            `--effort fast`.
        sensitivity: what objectives that need one weigh errors with.
        weighed: whether experts have the lower floor that goes with a sensitivity; by default as
            the objective says.

    Raises:
        MintError: the budget can't be met, or the objective is wrong.
    """
    inventory, recipe = space.inventory, space.recipe
    name = objective or recipe.objective or EFFORTS["fast"].objective
    entry = find_objective(name)
    lower = entry.needs_sensitivity if weighed is None else weighed
    options = safe_candidates(space, profile, budget, lower)
    if entry.needs_sensitivity and sensitivity is None:
        raise MintError(
            f"the objective {name} weighs errors with a sensitivity: measure one with `mint-mlx "
            "sensitivity`"
        )
    remaining = {
        layer.path: feedback_leaves(layer, options[layer.path], sensitivity)
        for layer in inventory.layers
    }
    fisher = _fisher(profile, sensitivity)
    context = Context(
        inventory.blocks, **recipe.priors.model_dump(), fisher=fisher, remaining=remaining
    )
    costs = [
        np.array([layer.bytes(c) for c in options[layer.path]], dtype=np.int64)
        for layer in inventory.layers
    ]
    losses = [
        np.zeros(1)  # nothing to choose, and an override may name what was never measured
        if len(options[layer.path]) == 1
        else entry.loss(
            layer,
            np.stack([profile.curves[layer.path].of(c) for c in options[layer.path]]),
            context,
        )
        for layer in inventory.layers
    ]
    limit = budget.resolve(inventory.parameters)
    if limit is None:
        limit = size_range(inventory, options)[0]
    picks, loss, gap = _solve(inventory, options, costs, losses, limit)
    choice = {
        layer.path: options[layer.path][k] for layer, k in zip(inventory.layers, picks, strict=True)
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
    )


def _fisher(profile: Profile, sensitivity: Sensitivity | None) -> dict[str, np.ndarray]:
    """KL divergence in nats per token at an NMSE of one, by layer and expert.

    A layer that no gradient reached (an indexer that only selects) is taken to cost what the median
    layer does."""
    if sensitivity is None:
        return {}
    if not sensitivity.origin.matches(profile.origin):
        raise MintError(
            f"the sensitivity is that of another model ({sensitivity.origin.source}): measure it "
            "anew"
        )
    found = {}
    missing = [
        layer.path for layer in profile.inventory.layers if layer.path not in sensitivity.trace
    ]
    if missing:
        raise MintError(
            f"the sensitivity lacks the layer {missing[0]} ({len(missing)} such): measure it anew"
        )
    for layer in profile.inventory.layers:
        energy = profile.curves[layer.path].energy
        mean_square = energy / (layer.size / len(energy))
        found[layer.path] = mean_square * sensitivity.per_weight(layer.path)
    reached = [cost.sum() for cost in found.values() if cost.sum() > 0]
    usual = float(np.median(reached)) if reached else 1.0
    return {
        path: cost if cost.sum() > 0 else np.full(len(cost), usual / len(cost))
        for path, cost in found.items()
    }


def feedback_leaves(
    layer: Layer, configs: Sequence[QuantConfig], sensitivity: Sensitivity | None
) -> np.ndarray:
    """The share of each candidate's cost that error feedback leaves, float64 (candidates,). It
    knows affine ones.
    """
    share = (
        sensitivity.left.get(layer.path, 1.0)
        if sensitivity is not None and takes_feedback(layer)
        else 1.0
    )
    return np.array([share if config.mode == "affine" else 1.0 for config in configs])


def _solve(
    inventory: Inventory,
    options: Candidates,
    costs: list[np.ndarray],
    losses: list[np.ndarray],
    limit: int,
) -> tuple[list[int], float, float]:
    """The knapsack's choice with its loss and gap. How many shards there are follows from the
    choice, so what they cost is reserved, and more of it until the whole checkpoint fits."""
    reserve = SHARD_BYTES
    while True:
        solution = solve(costs, losses, limit - inventory.other_bytes - reserve)
        if solution is None:  # the smallest size fits (that was checked), but not with this reserve
            picks = [int(np.argmin(c)) for c in costs]
            return picks, sum(float(v[k]) for v, k in zip(losses, picks, strict=True)), 0.0
        choice = {
            p.path: options[p.path][k]
            for p, k in zip(inventory.layers, solution.choice, strict=True)
        }
        over = inventory.layout(choice).total - limit
        if over <= 0:
            return list(solution.choice), solution.loss, solution.gap
        reserve += over


def measured_errors(
    choice: dict[str, QuantConfig], curves: dict[str, RateDistortion]
) -> dict[str, LayerError]:
    """The measured error of each quantized layer, where its curve holds it."""
    return {
        path: LayerError(
            float(curves[path].of(config).mean()), float(curves[path].of(config).max())
        )
        for path, config in choice.items()
        if config.quantized and path in curves and config in curves[path].configs
    }


def uniform(
    source: Source,
    inventory: Inventory,
    config: QuantConfig,
    forced: Mapping[str, QuantConfig],
    ignore_guards: bool = False,
) -> Plan:
    """A plan of the same configuration for every layer that can take it, overrides aside; no
    profile is needed.
    """
    return Plan(
        origin=source.origin,
        choice=uniform_choice(inventory, config, ignore_guards) | dict(forced),
        recipe=f"uniform {config}",
        versions=versions(),
    )
