"""A plan: which configuration each layer gets, as a file that a person can read, edit and feed
back.

One line a layer; `layer` and `as` decide, the rest is for the reader (sizes are computed anew,
never trusted)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..base.errors import MintError
from ..base.quant_config import QuantConfig
from ..checkpoint.layers import Inventory
from ..checkpoint.layout import Layout
from ..checkpoint.origin import Origin


@dataclass(frozen=True)
class LayerError:
    """Measured error of a layer under its configuration: NMSE over experts."""

    mean: float
    worst: float


@dataclass(frozen=True)
class Plan:
    """A choice for every layer, and what it was made from.

    Attributes:
        origin: the weights that it was made from.
        choice: configuration by layer path.
        quantizer: the named function that makes the codes (converters/).
        parts: `text`, or `all` where a tower's tensors are carried along.
        budget: as the user wrote it, or None.
        loss, gap: the objective's value and its distance to the knapsack's bound, where an
            objective was used.
        errors: measured error by layer path, where a profile was used.
        edited: whether its file was changed by hand: what was said of the choice (budget, loss,
            errors) is left out.
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

    def layout(self, inventory: Inventory) -> Layout:
        """Shards, headers and places of the checkpoint that this plan makes."""
        return inventory.layout(self.choice)

    def quantization(self) -> dict[str, Any]:
        """The `quantization` block of a config.json: mlx-lm's three global keys, then one entry per
        quantized layer.
        """
        used = Counter(config for config in self.choice.values() if config.quantized)
        if not used:
            return {}
        common = max(used, key=lambda config: (used[config], config))
        return common.as_mlx() | {
            path: c.as_mlx() for path, c in self.choice.items() if c.quantized
        }

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


def check_config(layer: Any, config: QuantConfig, ignore_guards: bool) -> None:
    """Refuse a configuration that a layer can't take or that a guard forbids (a MintError each)."""
    if not config.divides(layer.shape[-1]):
        raise MintError(
            f"{layer.path} has rows of {layer.shape[-1]} weights, which groups of "
            f"{config.group_size} don't divide: choose another group size or keep"
        )
    objection = layer.objection(config)
    if objection and not ignore_guards:
        raise MintError(
            f"{layer.path} cannot be {config}: {objection} (--ignore-guards overrules this)"
        )
