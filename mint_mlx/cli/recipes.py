"""`mint-mlx recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import JsonOpt, start


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Print this recipe with its reasons.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """List the rules for model families, or print those of one."""
    output = start(as_json)
    from ..rules.recipes import bundled, find_recipe, read_recipe

    if name is None:
        known = [read_recipe(path) for path in bundled().values()]
        output.table(
            ["recipe", "serves", "about"],
            [[r.name, ", ".join(r.serves) or "every other", r.about] for r in known],
        )
        output.result({"recipes": [r.model_dump() for r in known]})
        return

    # The file itself is printed: its comments are the reasons.
    recipe = find_recipe(name, {})
    path = bundled().get(name) or Path(name).expanduser()
    for line in path.read_text(encoding="utf-8").rstrip().splitlines():
        output.line(line)
    output.result(recipe.model_dump())
