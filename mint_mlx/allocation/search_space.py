"""Which configurations each layer may get, and the sizes that they allow.

Candidates follow from the recipe, guards and overrides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..base.errors import MintError, UsageError
from ..base.quant_config import QuantConfig, parse_config
from ..base.units import both
from ..checkpoint.layers import Inventory
from ..rules.recipes import Recipe, candidates
from .plan import check_config

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


@dataclass(frozen=True)
class SearchSpace:
    """What a plan may choose from.

    Attributes:
        inventory: the model's layers.
        recipe: its candidates, rules and floors.
        forced: by layer path, the configuration that an override gives.
        ignore_guards: allow what the guards forbid.
    """

    inventory: Inventory
    recipe: Recipe
    forced: Mapping[str, QuantConfig] = field(default_factory=dict)
    ignore_guards: bool = False


def search_space(
    inventory: Inventory,
    recipe: Recipe,
    overrides: Sequence[Override] = (),
    ignore_guards: bool = False,
) -> SearchSpace:
    """A search space under overrides; later ones win.

    Raises:
        MintError: an override is wrong (see `apply_overrides`).
    """
    forced = apply_overrides(overrides, inventory, ignore_guards)
    return SearchSpace(inventory, recipe, forced, ignore_guards)


def list_candidates(space: SearchSpace) -> Candidates:
    """Every layer's candidates under guards, recipe and overrides, from headers alone."""
    return {
        layer.path: (space.forced[layer.path],)
        if layer.path in space.forced
        else candidates(layer, space.recipe, space.ignore_guards)
        for layer in space.inventory.layers
    }


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
    veto: str = "",
) -> None:
    """Refuse a budget below the smallest size.

    Args:
        budget: bytes.
        inventory, options: what can be chosen.
        why: what to say of the budget.
        floor: the safety floor in dB that the options are above; None where they haven't been held
            against it.
        veto: which layer the floor keeps unquantized, and what to do about it, if any.

    Raises:
        MintError: with the range that is possible.
    """
    least, most = size_range(inventory, options)
    if budget >= least:
        return
    bits = f"{least * 8 / inventory.parameters:.2f} bpw"
    if least == most:
        raise MintError(
            f"a budget of {both(budget)} is too small for this model{why}: no layer has a choice, "
            f"and all take {both(least, up=True)} ({bits}, `--budget {least}B`)"
        )
    if floor is None:
        raise MintError(
            f"a budget of {both(budget)} is too small for this model{why}: before the safety floor "
            f"sizes from {both(least, up=True)} ({bits}, {least}B) to {both(most)} are possible, "
            "and `--budget smallest` takes the least that it allows"
        )
    raise MintError(
        f"a budget of {both(budget)} is too small for this model with the safety floor of "
        f"{floor:g} dB SQNR: from {both(least, up=True)} ({bits}, `--budget {least}B`) to "
        f"{both(most)} is possible{f'. {veto}' if veto else ''}"
    )
