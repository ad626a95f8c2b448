"""`mint-mlx recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    JsonOpt,
    start,
)

if TYPE_CHECKING:
    pass


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Print this recipe with its reasons.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """List the recipes, or print one."""
    output = start(as_json)
    from ..rules.recipes import bundled, find_recipe, read_recipe

    if name is None:
        found = [read_recipe(path) for path in bundled().values()]
        output.table(
            ["recipe", "serves", "about"],
            [[r.name, ", ".join(r.serves) or "every other", r.about] for r in found],
        )
        output.result({"recipes": [r.model_dump() for r in found]})
        return
    recipe = find_recipe(name, {})
    path = bundled().get(name)
    output.line((path or Path(name).expanduser()).read_text(encoding="utf-8").rstrip())
    output.result(recipe.model_dump())
