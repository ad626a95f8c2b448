"""`mint-mlx sweep`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    JsonOpt,
    start,
)


def sweep(
    profile: Annotated[
        str,
        typer.Argument(
            metavar="PROFILE", help="What `mint-mlx profile` wrote, or a checkpoint that keeps one."
        ),
    ],
    sensitivity: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|ORG/NAME",
            help="What `mint-mlx sensitivity` wrote: losses become predicted KLs.",
        ),
    ] = None,
    measured: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE:PPL", help="A perplexity that was measured; repeatable."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw it.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Show predicted quality against size, with the knee and the Macs that each size fits."""
    output = start(as_json)
    from ..allocation.sweep import draw, sweep, sweep_rows
    from ..base.targets import check_picture

    if plot is not None:
        check_picture(plot)
    found = sweep(profile, sensitivity, tuple(measured or ()))
    output.table(*sweep_rows(found))
    if found.macs:
        output.line(
            "Mac: the GPU's limit by default less 1 GiB, without a cache; `convert --fit` counts "
            "that too."
        )
    if plot is not None:
        draw(found, plot)
        output.line(f"{plot}: drawn")
    output.result(asdict(found))
