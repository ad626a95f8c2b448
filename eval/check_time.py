"""How long `check` takes on this machine, roughly, before it has asked a model anything."""

from __future__ import annotations

from ..checkpoint.generate import groups, work
from ..checkpoint.layers import Inventory
from ..converters.quantizers.time_estimate import active_weights
from ..runtime.product_rate import product_rate
from .kinds import REPLY
from .tasks import all_tasks

CHARACTERS = 3  # of a task to a token: much of it is digits
TEMPLATE = 20  # tokens that a chat template adds
LOADING = 5.0  # seconds, of programs, tokenizers and small models


def check_seconds(inventory: Inventory) -> float:
    """Seconds of `check` for a model and its source: twice the replies, twice their scoring.

    A token that is read costs two operations for each weight that it is multiplied with.

    Args:
        inventory: of either, which have the same weights.
    """
    characters = [sum(len(m["content"]) for m in task.messages) for task in all_tasks()]
    lengths = [count // CHARACTERS + TEMPLATE for count in characters]
    replies = sum(work([lengths[i] for i in group], REPLY) for group in groups(lengths))
    scored = sum(lengths) + REPLY * len(lengths)
    operations = 2 * (replies + scored) * 2 * active_weights(inventory)
    return LOADING + operations / product_rate()
