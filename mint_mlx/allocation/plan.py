"""A plan: which configuration each layer gets, and what it was made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ..base.errors import MintError
from ..base.one_line import one_line
from ..base.quant_config import QuantConfig
from ..checkpoint.layers import Inventory, Layer
from ..checkpoint.layout import Layout
from ..checkpoint.origin import Origin
from ..runtime.speed_table import Speed


@dataclass(frozen=True)
class LayerError:
    """Measured error of a layer under its configuration: NMSE over experts."""

    mean: float
    worst: float


@dataclass(frozen=True, repr=False)
class Plan:
    """A choice for every layer, and what it was made from.

    Attributes:
        origin: the weights that it was made from.
        choice: configuration by layer path.
        quantizer: a name of registry.QUANTIZERS.
        effort: a name of efforts.EFFORTS.
        parts: `text`, `mtp` with blocks for multi-token prediction (`mtp-8bit`: in 8 bits), `all`
            with a tower too.
        recipe: the recipe's name.
        objective: a name of objectives.OBJECTIVES, or None where nothing was minimised.
        budget: as the user wrote it, or None.
        budget_bytes: the same in bytes; None for `smallest` too.
        loss, gap: the objective's value and its relative distance to the knapsack's bound, where an
            objective was used.
        errors: measured error by layer path, where a profile was used.
        versions: of the packages that it was made with.
        edited: whether its file was changed by hand: what was said of the choice (budget, loss,
            errors) is left out.
        first_budget: bytes of the budget that an edited one was made for before, if any.
        speed: how fast it is predicted to decode, where a speed table was used.
        speed_goal: the least that was asked for, as the user wrote it, or None.
    """

    origin: Origin
    choice: dict[str, QuantConfig]
    quantizer: str = "rtn"
    effort: str = "fast"
    parts: str = "text"
    recipe: str = "default"
    objective: str | None = None
    budget: str | None = None
    budget_bytes: int | None = None
    loss: float | None = None
    gap: float | None = None
    errors: dict[str, LayerError] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    edited: bool = False
    first_budget: int | None = None
    speed: Speed | None = None
    speed_goal: str | None = None

    def __repr__(self) -> str:
        facts = [self.origin.source or "any source", f"{len(self.choice)} layers"]
        facts += [f"budget={self.budget!r}"] if self.budget else []
        facts += [f"objective={self.objective!r}"] if self.objective else []
        return one_line(self, *facts, f"quantizer={self.quantizer!r}")

    def layout(self, inventory: Inventory) -> Layout:
        """Shards, headers and places of the checkpoint that this plan makes."""
        return inventory.layout(self.choice)

    def quantization(self) -> dict[str, Any]:
        """The `quantization` block of a config.json.

        It has mlx-lm's three global keys, those of the most frequent configuration, and one entry
        per quantized layer.
        """
        entries = {
            path: config.as_mlx() for path, config in self.choice.items() if config.quantized
        }
        if not entries:
            return {}
        used = Counter(config for config in self.choice.values() if config.quantized)
        common = max(used, key=lambda config: (used[config], config))
        return replace(common, global_scale=False).as_mlx() | entries

    def quant_predicate(self) -> Callable[[str, Any], bool | dict[str, int | str]]:
        """The plan as a predicate for `mlx_lm.convert(..., quant_predicate=...)`.

        Raises (when called):
            MintError: the model has a layer that the plan doesn't name.
        """

        def predicate(path: str, module: Any) -> bool | dict[str, int | str]:
            if path not in self.choice:
                raise MintError(
                    f"the plan has no line for the layer {path}: it was made for another model"
                )
            config = self.choice[path]
            return config.as_mlx() if config.quantized else False

        return predicate


def check_plan(plan: Plan, inventory: Inventory, ignore_guards: bool = False) -> None:
    """Refuse a plan that doesn't fit the model or breaks a guard.

    Raises:
        MintError: a layer is unknown or missing, a group doesn't divide, or a guard is broken.
    """
    # A plan must name the model's layers, all of them and no others.
    layers = {layer.path: layer for layer in inventory.layers}
    unknown = [path for path in plan.choice if path not in layers]
    if unknown:
        raise MintError(
            f"the plan names the layer {unknown[0]}, which this model does not have "
            f"({len(unknown)} such)"
        )
    missing = [path for path in layers if path not in plan.choice]
    if missing:
        raise MintError(
            f"the plan has no line for the layer {missing[0]} ({len(missing)} such): add it, `as: "
            "keep` if it stays"
        )

    for path, config in plan.choice.items():
        check_config(layers[path], config, ignore_guards)


def check_config(layer: Layer, config: QuantConfig, ignore_guards: bool) -> None:
    """Refuse a configuration that a layer can't take or that a guard forbids (a MintError each)."""
    if not config.divides(layer.shape[-1]):
        raise MintError(
            f"{layer.path} has rows of {layer.shape[-1]} weights, which groups of "
            f"{config.group_size} don't divide: choose another group size or keep"
        )
    objection = layer.objection(config)
    if objection and config.global_scale:  # nobody could write that
        raise MintError(f"{layer.path} cannot be {config}: {objection}")
    if objection and not ignore_guards:
        raise MintError(
            f"{layer.path} cannot be {config}: {objection} (--ignore-guards overrules this)"
        )
