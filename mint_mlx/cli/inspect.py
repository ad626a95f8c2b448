"""`mint-mlx inspect`."""

from __future__ import annotations

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
    as_json: JsonOpt = False,
) -> None:
    """Show every layer of a model, a profile or a plan: role, bits, bytes and error."""
    output = start(as_json)
    from ..jobs.inspect import inspect as read
    from .inspect_report import show

    show(read(target), output)
