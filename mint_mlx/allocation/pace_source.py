"""What is known of how fast a model decodes, from its layers alone."""

from __future__ import annotations

from ..base.errors import MintError
from ..base.versions import versions
from ..checkpoint.layers import Inventory
from ..measure import cache
from ..runtime.speed_table import SpeedTable, covers, model_key
from ..runtime.table_names import named_table
from .pace import Goal, Pace


def runtime_versions() -> dict[str, str]:
    """What decides about times."""
    return {name: number for name, number in versions().items() if name != "mint-mlx"}


def known_table(inventory: Inventory) -> SpeedTable | None:
    """This machine's table of a model from the cache."""
    from ..runtime.machine_name import machine_name  # (it imports MLX)

    table = cache.cached_speeds(model_key(inventory), machine_name(), runtime_versions())
    return table if table is not None and covers(table, inventory) else None


def pace_from(
    inventory: Inventory, name: str, words: str | None, context: int, goal: Goal | None = None
) -> Pace | None:
    """A named table, or this machine's from the cache; an estimate lacks the cache's time.

    Raises:
        MintError: the named table is wrong, or there is a goal and no table.
    """
    if words is not None:
        return Pace(named_table(words, inventory, name, {1: 0}), context, goal)
    known = known_table(inventory)
    if known is None and goal is not None:
        raise MintError(
            f"nothing is known of how fast {name} decodes on this machine: `mint-mlx speed MODEL` "
            "measures it in two minutes, or give --speed-table"
        )
    return None if known is None else Pace(known, context, goal)
