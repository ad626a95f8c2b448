"""`mint-mlx inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    JsonOpt,
    start,
)

if TYPE_CHECKING:
    pass


def inspect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|PROFILE|PLAN", help="A model, a profile (.json) or a plan (.yaml)."
        ),
    ],
    as_json: JsonOpt = False,
) -> None:
    """Show every layer with its role, configuration, bytes and error."""
    output = start(as_json)
    from . import inspect_report

    inspect_report.show(target, output)
