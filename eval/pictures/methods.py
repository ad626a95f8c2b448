"""Methods of a comparison: KL and perplexity against bytes, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...base.units import UNITS, decimal_unit
from .. import stats
from ..compare import Comparison, Row
from ..methods import NAMES, OURS
from .style import BLUE, GREEN, INK, LINE, ORANGE, PINK, Picture, new_figure, plain

NAME = "plot"
HUES = (BLUE, ORANGE, GREEN, PINK)
MARKERS = "sD^vP*X<>ph8d"  # of peers


def methods_picture(comparison: Comparison) -> Picture:
    """The picture of a comparison: ours are lines, peers are points."""
    rows = [row for row in comparison.rows if "kl" in row]
    best = {row["group"]: row["method"] for row in rows if row.get("rank") == 1}
    listed = ", ".join(f"{NAMES.get(m, m)}" for m in dict.fromkeys(best.values()))
    alt = (
        f"KL and perplexity against bytes of {len({row['method'] for row in rows})} methods on "
        f"{comparison.source}. Lowest KL: {listed or 'none'}."
    )
    return Picture(NAME, alt, lambda narrow: _draw(comparison, rows, narrow))


def _draw(comparison: Comparison, rows: Sequence[Row], narrow: bool) -> Any:
    """Two plots, beside each other or, on a phone, below."""
    unit = decimal_unit(max((row["bytes"] for row in rows), default=0))
    count = len({row["method"] for row in rows})
    lines = -(-count // (2 if narrow else 6))
    figure = new_figure(narrow, (560 if narrow else 400) + 16 * lines)
    axes = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    for axis, key, label in (
        (axes[0], "kl", "KL from the source (nats per token)"),
        (axes[1], "perplexity", "perplexity"),
    ):
        _draw_methods(axis, rows, key)
        axis.set_ylabel(label)
        axis.set_xlabel(f"all safetensors files ({unit})")
        _format_axes(axis, UNITS[unit], 5 if narrow else 7)

    # The source's own perplexity, from any row's difference from it.
    if rows:
        source = rows[0]["perplexity"] / math.exp(rows[0]["ln_ppl_difference"])
        drawn = axes[1].axhline(source, color=INK, linestyle=":", label=f"source, {source:.3f}")
        axes[1].legend(handles=[drawn])
    handles, names = axes[0].get_legend_handles_labels()
    if handles:
        columns = 2 if narrow else 6
        figure.legend(handles, names, ncols=columns, loc="outside lower left", fontsize=9)
    axes[0].set_title(plain(f"{comparison.source} on {comparison.text}"))
    return figure


def _draw_methods(axis: Any, rows: Sequence[Row], key: str) -> None:
    """Draw one figure of every method; ours come first."""
    is_peer = {row["method"]: row["kind"] != "ours" for row in rows}
    methods = sorted(is_peer, key=lambda method: (is_peer[method], method))
    for i, method in enumerate(methods):
        points = sorted((r for r in rows if r["method"] == method), key=lambda r: r["bytes"])
        axis.errorbar(
            [row["bytes"] for row in points],
            [row[key] for row in points],
            yerr=[half_interval(row, key) for row in points],
            label=plain(NAMES.get(method, method)),
            color=HUES[i % len(HUES)],
            marker="o" if method in OURS else MARKERS[i % len(MARKERS)],
            linestyle=("-", "--", "-.", ":")[i // len(HUES) % 4] if method in OURS else "none",
            markersize=4 if method in OURS else 7,
            capsize=2,
        )


def _format_axes(axis: Any, unit: int, ticks: int) -> None:
    """Logarithmic axes with readable labels; `unit` is the bytes of one on the horizontal axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(MaxNLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:.4g}"))

    # Over several decades the labels of all nine steps of each would run into each other.
    low, high = axis.get_ylim()
    if high > 30 * low:
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for set_formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axis.tick_params(axis="both", which="both", labelsize=9)
    axis.grid(True, which="both", color=LINE)


def half_interval(row: Row, key: str) -> float:
    """Half of a figure's 95 % interval, for its error bar."""
    if key == "kl":
        error = row["kl_se"]
        return stats.half_interval(error, len(row["window_kl"])) if error else 0.0
    interval = row["ln_ppl_difference_ci95"]
    return float(row["perplexity"] * (interval[1] - interval[0]) / 2) if interval else 0.0
