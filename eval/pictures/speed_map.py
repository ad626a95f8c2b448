"""Speed of a model's plans: tokens per second against size, and loss over size and speed."""

from __future__ import annotations

from typing import Any

from ...allocation.sweep import Sweep
from ...base.units import UNITS, decimal_unit
from .style import BLUE, INK, LINE, ORANGE, Picture, new_figure, plain

NAME = "report-speed"


def speed_pictures(curve: Sweep) -> Picture | None:
    """Both in one picture; None for a curve without speeds."""
    speeds = [point.speed for point in curve.points if point.speed is not None]
    if not speeds or not curve.map:
        return None
    first, last = speeds[0], speeds[-1]
    alt = (
        f"predicted tokens per second of {curve.source} on {first.machine}: "
        f"{first.tokens_per_second:.3g} at the smallest size, {last.tokens_per_second:.3g} at the "
        "largest; and the loss of plans over size and speed."
    )
    return Picture(NAME, alt, lambda narrow: _draw(curve, narrow))


def _draw(curve: Sweep, narrow: bool) -> Any:
    figure = new_figure(narrow, 720 if narrow else 400)
    left, right = figure.subplots(2 if narrow else 1, 1 if narrow else 2)
    unit = decimal_unit(curve.points[-1].bytes)
    for axis in (left, right):
        axis.set_xlabel(f"size of all safetensors files ({unit})")
        axis.set_ylabel("predicted tokens per second")
        axis.grid(True, color=LINE)

    # The plans of least loss at each size, without a limit of speed.
    timed = [(p.bytes / UNITS[unit], p.speed) for p in curve.points if p.speed is not None]
    sizes = [size for size, _ in timed]
    left.plot(
        sizes, [s.tokens_per_second for _, s in timed], color=ORANGE, marker="o", markersize=3
    )
    low, high = zip(*(s.band for _, s in timed), strict=True)
    left.fill_between(sizes, low, high, alpha=0.15, color=ORANGE, linewidth=0)
    speed = timed[0][1]
    how = "estimated for" if speed.estimated else "on"
    left.set_title(plain(f"{curve.source}, {how} {speed.machine}"))

    # Darker is better; a ring marks what no other plan beats in all three.
    _draw_map(figure, right, curve, UNITS[unit])
    return figure


def _draw_map(figure: Any, axis: Any, curve: Sweep, unit: int) -> None:
    """Loss over size and speed, with the front of plans that no other one beats."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter

    drawn = axis.scatter(
        [point.bytes / unit for point in curve.map],
        [point.tokens_per_second for point in curve.map],
        c=[max(point.loss, 1e-12) for point in curve.map],
        edgecolors=[INK if point.best else BLUE for point in curve.map],
        linewidths=[1.8 if point.best else 0.0 for point in curve.map],
        norm=LogNorm(),
        cmap="viridis",
        s=60,
    )
    plain_figures = FuncFormatter(lambda value, _: f"{value:.3g}")
    figure.colorbar(drawn, ax=axis, label="loss", format=plain_figures)
    axis.set_title("rings: no plan is as small, as fast and as good")
