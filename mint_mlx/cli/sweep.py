"""`mint-mlx sweep`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import JsonOpt, SpeedTableOpt, start


def sweep(
    profile: Annotated[
        str,
        typer.Argument(
            metavar="PROFILE", help="What `mint-mlx profile` wrote, or a checkpoint that holds one."
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
    speed_table: SpeedTableOpt = None,
    context: Annotated[
        int, typer.Option(metavar="TOKENS", help="Context at which speeds are predicted.")
    ] = 8192,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw it.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Show predicted quality against size: where a curve bends, and which Mac each size fits.

    See docs/guides/choose-a-size.md.
    """
    output = start(as_json)
    from ..allocation.speed_map import map_lines
    from ..allocation.sweep import sweep, sweep_lines
    from ..base.targets import check_picture
    from ..eval.pictures.size_curve import size_curve
    from ..eval.pictures.speed_map import speed_pictures
    from ..eval.pictures.style import draw_to

    if plot is not None:
        check_picture(plot)
    curve = sweep(profile, sensitivity, measured or (), speed_table, context)
    output.table(*sweep_lines(curve))
    if curve.map:
        output.table(*map_lines(curve.map), "plans that no other one beats in size, speed and loss")
    if curve.macs:
        output.line(
            "Mac: the GPU's limit by default less 1 GiB, without a cache; `convert --fit` counts "
            "that too."
        )
    speeds = speed_pictures(curve)
    if plot is not None:
        speed_plot = plot.with_stem(f"{plot.stem}-speed")
        if speeds is not None:
            check_picture(speed_plot)
        draw_to(size_curve(curve), plot)
        output.line(f"{plot}: drawn")
        if speeds is not None:
            draw_to(speeds, speed_plot)
            output.line(f"{speed_plot}: drawn")
    output.result(asdict(curve))
