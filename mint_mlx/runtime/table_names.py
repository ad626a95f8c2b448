"""Speed tables by what a user calls them: a file, a machine or a chip (no MLX is imported here)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..base.errors import MintError, UsageError
from ..checkpoint.layers import Inventory
from .speed_estimate import CHIPS, estimate, find_chip
from .speed_table import SpeedTable, covers
from .speed_table_file import bundled_tables, load_table


def check_table_name(text: str | None) -> None:
    """Refuse what names neither a file nor a table nor a chip (a UsageError)."""
    if text is None or Path(text).is_file() or text in bundled_tables() or find_chip(text):
        return
    names = [*bundled_tables(), *(chip.name.replace(" ", "-") for chip in CHIPS)]
    raise UsageError(
        f"--speed-table must be a file of `mint-mlx speed --save`, or one of {', '.join(names)} "
        f"(got {text})"
    )


def named_table(
    text: str, inventory: Inventory, name: str, caches: Mapping[int, float]
) -> SpeedTable:
    """The table of a file, one that comes with mint-mlx, or the estimate of a chip.

    Args:
        text: what the user wrote.
        inventory: the model's layers.
        name: of the model.
        caches: bytes of its cache by the context, for an estimate.

    Raises:
        MintError: the file is no table, or is one of another model.
    """
    chip = find_chip(text)
    if chip is not None and not Path(text).is_file():
        return estimate(chip, inventory, name, caches)
    table = load_table(bundled_tables().get(text, Path(text)))
    if not covers(table, inventory):
        names = ", ".join(sorted({rest.name for rest in table.rests.values()}))
        raise MintError(
            f"the speed table {text} is of other models ({names}): `mint-mlx speed MODEL --save "
            "FILE` on that machine makes one of this model"
        )
    return table
