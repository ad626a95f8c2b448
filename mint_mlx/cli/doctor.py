"""`mint-mlx doctor`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from .options import JsonOpt, start


def doctor(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="An MLX checkpoint: a folder or org/name.")
    ],
    as_json: JsonOpt = False,
) -> None:
    """Find what is wrong with an MLX checkpoint, whoever made it; no weights are read."""
    output = start(as_json)
    from ..base.units import both
    from ..jobs.doctor import doctor as examine
    from . import tables

    examination = examine(model)
    if examination.bits_per_weight is not None:
        output.line(
            f"{examination.name}: {both(examination.bytes)}, "
            f"{examination.bits_per_weight:.2f} bits per weight"
        )
    for where, problem in tables.finding_lines(examination.findings):
        output.line(f"- {where}: {problem}")
    for difference in examination.known_differences:
        output.line(f"known difference: {difference}")
    count = len(examination.findings)
    verdict = {0: "nothing is wrong", 1: "1 thing is wrong"}
    output.line(verdict.get(count, f"{count} things are wrong"))
    output.result(asdict(examination))
    if count:
        raise typer.Exit(1)
