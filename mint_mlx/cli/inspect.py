"""`mint-mlx inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import JsonOpt, start


def inspect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|PROFILE|PLAN", help="A model, a profile (.json) or a plan (.yaml)."
        ),
    ],
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw a model or a plan: bits of every layer."),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Show every layer of a model, a profile or a plan: role, bits, bytes and error."""
    output = start(as_json)
    from ..base.targets import check_picture
    from ..jobs.inspect import inspect as read
    from .inspect_report import draw, show

    if plot is not None:
        check_picture(plot)
    inspected = read(target)
    if plot is not None:
        draw(inspected, plot)
    show(inspected, output)
    if plot is not None:
        output.line(f"{plot}: drawn")
