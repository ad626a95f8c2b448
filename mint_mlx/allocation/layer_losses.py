"""What a choice of configurations is expected to cost, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

from ..base.errors import MintError
from ..base.quant_config import QuantConfig
from ..measure.profile import Profile
from ..measure.sensitivity import Sensitivity
from ..rules.objectives import find_objective
from .allocate import loss_context
from .counted import counted_errors
from .search_space import Candidates, SearchSpace


def layer_losses(
    profile: Profile,
    choice: Mapping[str, QuantConfig],
    objective: str,
    sensitivity: Sensitivity | None = None,
) -> dict[str, float]:
    """The objective's loss of each layer under its configuration; zero where it is unquantized.

    Their sum is a plan's loss, where its every layer had a choice.

    Args:
        profile: the measured errors.
        choice: a configuration for each layer of the profile.
        objective: a name of objectives.OBJECTIVES.
        sensitivity: what errors cost, where the objective needs one.

    Raises:
        MintError: a configuration was not measured, or a sensitivity is needed and missing.
    """
    entry = find_objective(objective)
    if entry.needs_sensitivity and sensitivity is None:
        raise MintError(f"the objective {objective} needs a sensitivity: measure one first")
    inventory = profile.inventory
    missing = [layer.path for layer in inventory.layers if layer.path not in choice]
    if missing:
        raise MintError(f"no configuration is chosen for the layer {missing[0]}")

    options: Candidates = {layer.path: (choice[layer.path],) for layer in inventory.layers}
    space = SearchSpace(inventory, profile.recipe)
    context = loss_context(profile, space, options, sensitivity)
    losses = {}
    for layer in inventory.layers:
        errors = counted_errors(profile.curves[layer.path], choice[layer.path])[None]
        losses[layer.path] = float(entry.loss(layer, errors, context)[0])
    return losses
