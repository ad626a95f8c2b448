"""From rate-distortion curves and a budget to a plan: floors and overrides first, then the
knapsack.

Costs are exact bytes on disk, so a budget is met to the byte; the loss is a named objective's
(objectives.py)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..base.errors import MintError, UsageError
from ..base.quant_config import KEEP, QuantConfig, parse_config
from ..base.units import Budget, both
from ..base.versions import versions
from ..checkpoint.layers import Inventory, Layer
from ..checkpoint.layout import SHARD_BYTES
from ..checkpoint.roles import EXPERTS
from ..checkpoint.source import Source
from ..measure.moments import takes_feedback
from ..measure.profile import Profile, RateDistortion, sqnr_db
from ..measure.sensitivity import Sensitivity
from ..rules.objectives import NEEDS_SENSITIVITY, Context, find_objective
from ..rules.recipes import Recipe, candidates
from .knapsack import solve
from .plan import LayerError, Plan, check_config
from .uniform import uniform_choice

Candidates = dict[str, tuple[QuantConfig, ...]]


@dataclass(frozen=True)
class Override:
    """All layers whose path matches get one configuration."""

    pattern: re.Pattern[str]
    config: QuantConfig


def parse_override(text: str) -> Override:
    """Read `REGEX=CONFIG`.

    Raises:
        UsageError: no `=`, a broken regular expression or an unknown configuration.
    """
    pattern, equals, config = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(
            f"the override {text!r} must be written REGEX=CONFIG, for example 'lm_head=8bit-g32'"
        )
    try:
        return Override(re.compile(pattern), parse_config(config))
    except re.error as error:
        raise UsageError(
            f"the override's pattern {pattern!r} is not a regular expression: {error}"
        ) from None


def apply_overrides(
    overrides: Sequence[Override], inventory: Inventory, ignore_guards: bool
) -> dict[str, QuantConfig]:
    """The configuration that overrides give, by layer path; later ones win.

    Raises:
        MintError: an override matches no layer, can't be taken by one that it matches, or breaks a
            guard.
    """
    forced: dict[str, QuantConfig] = {}
    for override in overrides:
        matched = [layer for layer in inventory.layers if override.pattern.search(layer.path)]
        if not matched:
            raise MintError(
                f"the override {override.pattern.pattern!r} matches no layer: `mint-mlx inspect "
                "MODEL` lists them"
            )
        for layer in matched:
            check_config(layer, override.config, ignore_guards)
            forced[layer.path] = override.config
    return forced


def list_candidates(
    inventory: Inventory,
    recipe: Recipe,
    forced: dict[str, QuantConfig] | None = None,
    ignore_guards: bool = False,
) -> Candidates:
    """Every layer's candidates under guards, recipe and overrides, from headers alone."""
    forced = forced or {}
    return {
        layer.path: (forced[layer.path],)
        if layer.path in forced
        else candidates(layer, recipe, ignore_guards)
        for layer in inventory.layers
    }


def above_floor(
    inventory: Inventory,
    curves: dict[str, RateDistortion],
    options: Candidates,
    recipe: Recipe,
    forced: dict[str, QuantConfig],
    weighed: bool = False,
) -> Candidates:
    """Drop the candidates whose worst expert lies under the recipe's SQNR floor; overrides are
    exempt.

    Where a sensitivity weighs the errors, routed experts have a lower floor of their own.

    A layer whose candidates all fall stays unquantized.
    """

    def safe(layer: Layer) -> tuple[QuantConfig, ...]:
        if layer.path in forced:
            return options[layer.path]
        curve = curves[layer.path]
        floor = recipe.expert_floor if weighed and layer.role in EXPERTS else recipe.sqnr_floor
        return tuple(
            c
            for c in options[layer.path]
            if not c.quantized or sqnr_db(float(curve.of(c).max())) >= floor
        ) or (KEEP,)

    return {layer.path: safe(layer) for layer in inventory.layers}


def size_range(inventory: Inventory, options: Candidates) -> tuple[int, int]:
    """The smallest and the largest checkpoint that these candidates allow, in bytes."""
    ends = []
    for pick in (min, max):
        choice = {
            layer.path: pick(options[layer.path], key=layer.bytes) for layer in inventory.layers
        }
        ends.append(inventory.layout(choice).total)
    return ends[0], ends[1]


def check_feasible(
    budget: int,
    inventory: Inventory,
    options: Candidates,
    why: str = "",
    floor: float | None = None,
) -> None:
    """Refuse a budget below the smallest size.

    Args:
        budget: bytes.
        inventory, options: what can be chosen.
        why: what to say of the budget.
        floor: the safety floor in dB that the options are above; None where they haven't been held
            against it.

    Raises:
        MintError: with the range that is possible.
    """
    least, most = size_range(inventory, options)
    if budget >= least:
        return
    bits = f"{least * 8 / inventory.parameters:.2f} bpw"
    if floor is None:
        raise MintError(
            f"a budget of {both(budget)} is too small for this model{why}: before the safety floor "
            f"sizes from {both(least, up=True)} ({bits}, {least}B) to {both(most)} are possible, "
            "and `--budget smallest` takes the least that it allows"
        )
    raise MintError(
        f"a budget of {both(budget)} is too small for this model with the safety floor of "
        f"{floor:g} dB SQNR: from {both(least, up=True)} ({bits}, `--budget {least}B`) to "
        f"{both(most)} is possible"
    )


def safe_candidates(
    profile: Profile,
    budget: Budget,
    recipe: Recipe,
    overrides: Sequence[Override] = (),
    ignore_guards: bool = False,
    weighed: bool = False,
) -> Candidates:
    """Each layer's candidates above the safety floor; `weighed` where a sensitivity says what
    experts cost.

    Raises:
        MintError: the budget can't be met with them, or an override is wrong.
    """
    inventory = profile.inventory
    forced = apply_overrides(overrides, inventory, ignore_guards)
    options = list_candidates(inventory, recipe, forced, ignore_guards)
    limit = budget.resolve(inventory.parameters)
    if limit is not None:
        check_feasible(limit, inventory, options)
    options = above_floor(inventory, profile.curves, options, recipe, forced, weighed)
    if limit is not None:
        check_feasible(limit, inventory, options, floor=recipe.sqnr_floor)
    return options


def allocate(
    profile: Profile,
    budget: Budget,
    recipe: Recipe,
    objective: str | None = None,
    overrides: Sequence[Override] = (),
    ignore_guards: bool = False,
    sensitivity: Sensitivity | None = None,
    weighed: bool | None = None,
) -> Plan:
    """Choose each layer's configuration so that the whole checkpoint fits the budget at the least
    loss.

    Args:
        profile: measured curves, with their inventory.
        budget: bytes, bits per weight, or `smallest`.
        recipe: candidates, rules, floor and priors.
        objective: a name of objectives.OBJECTIVES; the recipe's by default, else `prior`.
        overrides: fixed configurations by pattern.
        ignore_guards: allow what the guards forbid.
        sensitivity: what the objectives `fisher` and `fisher-gptq` weigh errors with.
        weighed: whether experts have the lower floor that goes with a sensitivity; by default as
            the objective says.

    Raises:
        MintError: the budget can't be met, or an override or the objective is wrong.
    """
    inventory = profile.inventory
    name = objective or recipe.objective or "prior"
    function = find_objective(name)
    lower = name in NEEDS_SENSITIVITY if weighed is None else weighed
    options = safe_candidates(profile, budget, recipe, overrides, ignore_guards, lower)
    if name in NEEDS_SENSITIVITY and sensitivity is None:
        raise MintError(
            f"the objective {name} weighs errors with a sensitivity: measure one with `mint-mlx "
            "sensitivity`"
        )
    left = {
        layer.path: feedback_leaves(layer, options[layer.path], sensitivity)
        for layer in inventory.layers
    }
    fisher = _fisher(profile, sensitivity)
    context = Context(inventory.blocks, **recipe.priors.model_dump(), fisher=fisher, left=left)
    costs = [
        np.array([layer.bytes(c) for c in options[layer.path]], dtype=np.int64)
        for layer in inventory.layers
    ]
    losses = [
        np.zeros(1)  # nothing to choose, and an override may name what was never measured
        if len(options[layer.path]) == 1
        else function(
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
        source=profile.source,
        revision=profile.revision,
        structure=profile.structure,
        content=profile.content,
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
    if (sensitivity.structure, sensitivity.content) != (
        profile.structure,
        profile.content,
    ) and sensitivity.content:
        raise MintError(
            f"the sensitivity is that of another model ({sensitivity.source}): measure it anew"
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
    forced: dict[str, QuantConfig],
    ignore_guards: bool = False,
) -> Plan:
    """A plan of the same configuration for every layer that can take it, overrides aside; no
    profile is needed.
    """
    return Plan(
        source=source.name,
        revision=source.revision,
        structure=source.structure,
        content=source.content,
        choice=uniform_choice(inventory, config, ignore_guards) | forced,
        recipe=f"uniform {config}",
        versions=versions(),
    )
