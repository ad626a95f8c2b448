"""`mint-mlx doctor`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    JsonOpt,
    start,
)

if TYPE_CHECKING:
    pass


def doctor(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="An MLX checkpoint: a folder or org/name.")
    ],
    as_json: JsonOpt = False,
) -> None:
    """Say what is wrong with an MLX checkpoint, ours or anyone's, from its headers."""
    output = start(as_json)
    from ..base.units import both
    from ..jobs.doctor import examine
    from . import tables

    found = examine(model)
    if found.bits_per_weight is not None:
        output.line(
            f"{found.name}: {both(found.bytes)}, {found.bits_per_weight:.2f} bits per weight"
        )
    for where, problem in tables.finding_rows(found.findings):
        output.line(f"- {where}: {problem}")
    count = len(found.findings)
    output.line(
        "nothing is wrong"
        if not count
        else "1 thing is wrong"
        if count == 1
        else f"{count} things are wrong"
    )
    output.result(asdict(found))
    if found.findings:
        raise typer.Exit(1)
