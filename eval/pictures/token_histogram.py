"""How the KL divergence is spread over tokens: how many have it, and how much of it they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .style import BLUE, INK, LINE, ORANGE, PAPER, Picture, new_figure, percent

NAME = "report-tokens"


def token_histogram(spread: Mapping[str, Any], figures: Mapping[str, Any]) -> Picture:
    """The picture of a spread.

    Args:
        spread: `edges` (log10 of nats), and by bin `tokens` and `kl`, shares of all tokens and of
            their KL.
        figures: of `evaluate`.
    """
    alt = (
        f"Distribution of the KL divergence over {figures['tokens']:,} tokens: median "
        f"{figures['kl_median']:.2g}, mean {figures['kl']:.2g}, 99 % below {figures['kl_p99']:.2g},"
        f" largest {figures['kl_max']:.2g} nats."
    )
    return Picture(NAME, alt, lambda narrow: _draw(spread, figures, narrow))


def _draw(spread: Mapping[str, Any], figures: Mapping[str, Any], narrow: bool) -> Any:
    from matplotlib.ticker import FuncFormatter

    figure = new_figure(narrow, 320 if narrow else 360)
    axis = figure.subplots()
    first, last = _used(spread)
    edges = [10.0**edge for edge in spread["edges"][first : last + 1]]
    tokens, kl = (spread[key][first:last] for key in ("tokens", "kl"))
    axis.stairs(tokens, edges, fill=True, color=BLUE, alpha=0.55, label="share of tokens")
    axis.stairs(kl, edges, color=ORANGE, linewidth=2, label="share of the whole KL")
    axis.set_xscale("log")

    # Marks stand at different heights, since some lie close together.
    top = max(*tokens, *kl)
    axis.set_ylim(0, top * 1.3)
    marks = (("median", "kl_median"), ("mean", "kl"), ("99 %", "kl_p99"))
    for i, (name, key) in enumerate(marks):
        if figures[key] < edges[0]:
            continue
        axis.axvline(figures[key], color=INK, linewidth=1, linestyle=":")
        axis.annotate(
            f"{name} {figures[key]:.2g}",
            (figures[key], top * (1.28 - 0.085 * i)),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=9,
            va="top",
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
        )

    axis.set_xlabel("KL of a token's prediction (nats)")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.yaxis.set_major_formatter(FuncFormatter(percent))
    axis.grid(True, axis="y", color=LINE)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def _used(spread: Mapping[str, Any]) -> tuple[int, int]:
    """The first bin that holds something, and the one after the last, with a bin of air."""
    shares = list(zip(spread["tokens"], spread["kl"], strict=True))
    used = [i for i, pair in enumerate(shares) if max(pair) > 0] or [0]
    return max(0, used[0] - 1), min(len(shares), used[-1] + 2)
