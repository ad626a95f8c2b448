"""Quality against size: the curve of plans, uniform quantization, and one checkpoint on it.

`sweep --plot`, `convert --plot` and the report draw the same picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...allocation.sweep import Sweep
from ...base.units import UNITS, decimal_unit, human
from ...rules.efforts import SPREAD
from ...rules.objectives import needs_sensitivity
from .style import BLUE, GREEN, INK, LINE, MUTED, ORANGE, PINK, Picture, new_figure, plain

NAME = "report-size"
STEPS = [1, 2, 2.5, 5, 10]  # of ticks


@dataclass(frozen=True)
class Marked:
    """A checkpoint's place.

    Attributes:
        bytes: of all safetensors files.
        expected: as the curve's loss, or None.
        measured: KL in nats per token, or None.
        half: of its 95 % interval, or None.
    """

    bytes: int
    expected: float | None = None
    measured: float | None = None
    half: float | None = None


@dataclass(frozen=True)
class UniformPoint:
    """Uniform quantization.

    Attributes:
        config: such as `4bit-g64`.
        bytes: of all safetensors files.
        loss: as the curve's.
    """

    config: str
    bytes: int
    loss: float


def size_curve(
    curve: Sweep, marked: Marked | None = None, uniform: Sequence[UniformPoint] = ()
) -> Picture:
    """The picture of a curve."""
    first, last = curve.points[0], curve.points[-1]
    what = "expected KL" if needs_sensitivity(curve.objective) else "expected loss"
    alt = (
        f"{what} against size of {curve.source}: from {first.loss:.2g} at {human(first.bytes)} to "
        f"{last.loss:.2g} at {human(last.bytes)}"
    )
    if marked is not None:
        alt += f"; this checkpoint at {human(marked.bytes)}"
        alt += f", expected {marked.expected:.2g}" if marked.expected else ""
        alt += f", measured {marked.measured:.2g}" if marked.measured else ""
    return Picture(NAME, f"{alt}.", lambda narrow: _draw(curve, marked, tuple(uniform), narrow))


def _draw(
    curve: Sweep, marked: Marked | None, uniform: Sequence[UniformPoint], narrow: bool
) -> Any:
    figure = new_figure(narrow, 380 if narrow else 440)
    axis = figure.subplots()
    predicted = needs_sensitivity(curve.objective)

    # The curve with what a prediction may be off by, and its knee.
    sizes = [point.bytes for point in curve.points]
    losses = [point.loss for point in curve.points]
    bands = [point.band for point in curve.points if point.band is not None]
    if len(bands) == len(sizes):
        low, high = zip(*bands, strict=True)
        label = f"where true KLs were, {SPREAD[0]} to {SPREAD[1]} times the expected (more near 0)"
        axis.fill_between(sizes, low, high, alpha=0.15, color=BLUE, linewidth=0, label=label)
    name = "mint-mlx, expected" if predicted else "mint-mlx"
    axis.plot(sizes, losses, marker="o", markersize=3.5, color=BLUE, label=name)
    bend = curve.points[curve.knee]
    label = f"knee: {bend.bits_per_weight:.2f} bpw"
    axis.plot([bend.bytes], [bend.loss], "D", color=PINK, markersize=7, label=label)

    if uniform:
        points = sorted(uniform, key=lambda point: point.bytes)
        places = [point.bytes for point in points], [point.loss for point in points]
        label = "uniform, expected" if predicted else "uniform"
        axis.plot(*places, "s--", color=ORANGE, markersize=5, linewidth=1, label=label)
        for point in () if narrow else points:
            axis.annotate(
                point.config,
                (point.bytes, point.loss),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=9,
                color=ORANGE,
            )
    if marked is not None:
        _mark(axis, marked)

    _draw_macs(axis, curve.macs, narrow)
    _draw_axes(axis, curve, sizes[-1], narrow)
    axis.set_ylabel("KL (nats per token)" if predicted else f"loss ({curve.objective})")
    axis.set_title(plain(curve.source))
    handles, names = axis.get_legend_handles_labels()
    if curve.measured:
        handles, names = _draw_perplexities(axis, curve, handles, names)
    figure.legend(handles, names, loc="outside lower left", ncols=1 if narrow else 3)
    return figure


def _mark(axis: Any, marked: Marked) -> None:
    """This checkpoint, as expected and as measured."""
    if marked.expected:
        axis.plot(
            [marked.bytes],
            [marked.expected],
            "o",
            markersize=11,
            markerfacecolor="none",
            markeredgecolor=INK,
            markeredgewidth=1.8,
            label="this checkpoint, expected",
        )
    if marked.measured:
        axis.errorbar(
            [marked.bytes],
            [marked.measured],
            yerr=[marked.half or 0],
            fmt="*",
            markersize=13,
            color=GREEN,
            capsize=3,
            label="this checkpoint, measured",
        )


def _draw_macs(axis: Any, macs: Sequence[tuple[int, int]], narrow: bool) -> None:
    """Where each Mac's memory ends; marks that would stand in each other are left out."""
    import math

    low, high = axis.get_xlim()
    last = -math.inf
    for gib, size in macs:
        axis.axvline(size, color=MUTED, linestyle=":", linewidth=1)
        place = math.log(size / low) / math.log(high / low) if low > 0 else size / high
        if place - last < (0.05 if narrow else 0.02):
            continue
        last = place
        axis.annotate(
            f"{gib} GiB Mac",
            (size, 0.985),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=8.5,
            color=MUTED,
            ha="right",
            va="top",
        )


def _draw_axes(axis: Any, curve: Sweep, largest: int, narrow: bool) -> None:
    """Both axes are logarithmic; bytes stand below in one unit, bits per weight above."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    axis.set_xscale("log")
    axis.set_yscale("log")
    ticks = 5 if narrow else 9
    unit = decimal_unit(largest)
    axis.set_xlabel(f"size of all safetensors files ({unit})")
    axis.xaxis.set_major_locator(MaxNLocator(ticks, steps=STEPS))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / UNITS[unit]:.4g}"))

    # The same sizes over the number of weights.
    point = curve.points[0]
    per_bit = point.bytes / point.bits_per_weight
    bits = axis.secondary_xaxis("top", functions=(lambda x: x / per_bit, lambda x: x * per_bit))
    bits.set_xlabel("bits per weight")
    bits.xaxis.set_major_locator(MaxNLocator(ticks, steps=STEPS))
    bits.xaxis.set_minor_locator(NullLocator())
    bits.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))

    # Within a decade or two its parts need labels too.
    low, high = axis.get_ylim()
    short = high < 300 * low
    if short:
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    else:
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.grid(True, which="both" if short else "major", color=LINE)


def _draw_perplexities(
    axis: Any, curve: Sweep, handles: list[Any], names: list[str]
) -> tuple[list[Any], list[str]]:
    """Perplexities that the user measured, which have another scale; returns the whole legend."""
    other = axis.twinx()
    other.set_ylabel("measured perplexity")
    other.spines["right"].set_visible(True)
    sizes = [known.bytes for known in curve.measured]
    perplexities = [known.perplexity for known in curve.measured]
    (drawn,) = other.plot(sizes, perplexities, "^", color=GREEN)
    return [*handles, drawn], [*names, "measured perplexity"]
