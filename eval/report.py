"""Writes a comparison: results.json, Markdown tables and a picture; and tables for the terminal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..base.files import write_text
from ..base.folders import REPORT
from ..base.pictures import write_picture
from ..base.units import UNITS, decimal_unit, human
from ..converters.quantizers.registry import needs_inputs
from .compare import Comparison, Row
from .methods import NAMES, OURS

HEAD = (
    "rank",
    "method",
    "sees",
    "as",
    "bytes",
    "KL",
    "against best peer (95 %)",
    "PPL",
    "top 1",
)


# Tables


def columns(comparison: Comparison) -> list[str]:
    """The table's head."""
    return [*HEAD, "decode"] if _has_speed(comparison) else list(HEAD)


def tables(comparison: Comparison) -> list[tuple[str, list[list[str]]]]:
    """One table a size: its title and its lines."""
    speed = _has_speed(comparison)
    titled = []
    for size in sorted({row["group"] for row in comparison.rows}):
        title = f"at {human(size)} ({size * 8 / comparison.parameters:.2f} bpw)"
        lines = [cells(row, speed) for row in comparison.rows if row["group"] == size]
        titled.append((title, lines))
    return titled


def cells(row: Row, speed: bool) -> list[str]:
    """One line of the table."""
    stored = f"{row['bytes']:,}" if row["bytes"] else "-"
    head = [NAMES.get(row["method"], row["method"]), _sees(row), row["about"], stored]
    if "kl" not in row:
        return ["-", *head, "not run", "", "", "", *([""] if speed else [])]

    error = f" ± {row['kl_se']:.5f}" if row["kl_se"] is not None else ""
    figures = [
        f"{row['kl']:.5f}{error}",
        _against(row),
        f"{row['perplexity']:.3f}",
        f"{row['same_top1']:.1%}",
    ]
    return [str(row["rank"]), *head, *figures, *([_decode(row)] if speed else [])]


def _decode(row: Row) -> str:
    """Decoding beside uniform 4bit-g64, with the spread of its runs where that was measured."""
    text = f"{row['decode_ratio']:.2f}x"
    if "decode_ratio_lowest" in row:
        text += f" ({row['decode_ratio_lowest']:.2f} to {row['decode_ratio_highest']:.2f})"
    return text


def _has_speed(comparison: Comparison) -> bool:
    return any("decode_ratio" in row for row in comparison.rows)


def _sees(row: Row) -> str:
    """What a method sees beside the weights."""
    if row["kind"] == "given":
        return "?"
    if row["sees_text"]:
        return "text"
    return "own text" if needs_inputs(row["about"]) else "weights"


def _against(row: Row) -> str:
    """The difference in KL from the best peer, with its interval."""
    if row.get("best_peer") == row["method"] and row.get("kl_difference") == 0:
        return "is the best peer"
    interval = row.get("kl_difference_ci95")
    if not interval:
        return "-"
    return f"{row['kl_difference']:+.5f} ({interval[0]:+.5f} to {interval[1]:+.5f})"


def reasons(comparison: Comparison) -> list[str]:
    """Why each method that wasn't run wasn't."""
    return [
        f"{row['method']} ({row['about']}): {row['reason']}"
        for row in comparison.rows
        if "reason" in row
    ]


# Files


def save(comparison: Comparison, folder: Path, command: str) -> list[Path]:
    """Write results.json, table.md and plot.png; returns their paths.

    Args:
        comparison: what to write.
        folder: created if it isn't there.
        command: the command line that was run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {
        "source": comparison.source,
        "command": command,
        "text": comparison.text,
        "noise_floor": comparison.noise_floor,
        "rows": comparison.rows,
    }
    paths = [folder / name for name in REPORT]
    write_text(paths[0], json.dumps(data, indent=1) + "\n")
    write_text(paths[1], markdown(comparison, command))
    plot(comparison, paths[2])
    return paths


def markdown(comparison: Comparison, command: str) -> str:
    """The tables as Markdown, with what they were measured on."""
    first = next((row for row in comparison.rows if "kl" in row), None)
    measured = "nothing"
    if first is not None:
        measured = f"{first['windows']} windows, {first['tokens']:,} tokens, on {first['device']}"
    floor = "not measured" if comparison.noise_floor is None else f"{comparison.noise_floor:.1g}"
    lines = [
        f"# {comparison.source}",
        "",
        f"`{command}`",
        "",
        f"{comparison.text}: {measured}. KL of the source's next-token distribution from each "
        "method's, in nats per token, ± standard error over windows; noise floor "
        f"{floor}. A peer is built at its own sizes near the budgets, mint-mlx to the same bytes. "
        "The difference in KL to the best peer is paired by windows, below zero is better. Decode: "
        "tokens per second of mlx-lm's generation beside uniform 4bit-g64, and the spread of three "
        "runs; none where that one differs from itself by more than 5 %.",
    ]

    head = columns(comparison)
    for title, table in tables(comparison):
        lines += ["", f"**{title}**", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(line) + " |" for line in table]
    if reasons(comparison):
        lines += ["", "Not run:", "", *(f"- {reason}" for reason in reasons(comparison))]
    return "\n".join(lines) + "\n"


# The picture


def plot(comparison: Comparison, path: Path) -> None:
    """KL and perplexity against bytes, logarithmic, with error bars.

    Ours are lines, peers are points.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in comparison.rows if "kl" in row]
    unit = decimal_unit(max((row["bytes"] for row in rows), default=0))
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for axis, key, label in (
        (axes[0], "kl", "KL from the source (nats per token)"),
        (axes[1], "perplexity", "perplexity (intervals paired with the source)"),
    ):
        _draw_methods(axis, rows, key, pyplot.get_cmap("tab20").colors)
        axis.set_ylabel(label)
        axis.set_xlabel(f"all safetensors files ({unit})")
        _format_axes(axis, UNITS[unit])

    # The source's own perplexity, from any row's difference from it.
    if rows:
        source = rows[0]["perplexity"] / math.exp(rows[0]["ln_ppl_difference"])
        axes[1].axhline(source, color="black", linestyle=":", label=f"source, {source:.3f}")
        axes[1].legend(fontsize=8, handles=[axes[1].get_lines()[-1]])

    figure.legend(
        *axes[0].get_legend_handles_labels(), fontsize=8, ncols=8, loc="outside lower center"
    )
    figure.suptitle(
        f"{comparison.source} on {comparison.text}: methods at the same bytes, 95 % intervals"
    )
    write_picture(figure, path)
    pyplot.close(figure)


def _draw_methods(axis: Any, rows: list[Row], key: str, colours: list[Any]) -> None:
    """Draw one figure of every method; ours come first."""
    is_peer = {row["method"]: row["kind"] != "ours" for row in rows}
    methods = sorted(is_peer, key=lambda method: (is_peer[method], method))
    for i, method in enumerate(methods):
        points = sorted((r for r in rows if r["method"] == method), key=lambda r: r["bytes"])
        axis.errorbar(
            [row["bytes"] for row in points],
            [row[key] for row in points],
            yerr=[_half_interval(row, key) for row in points],
            label=NAMES.get(method, method),
            color=colours[i % len(colours)],
            marker="o" if method in OURS else "sD^vP*X<>"[i % 9],
            linestyle="-" if method in OURS else "none",
            markersize=4 if method in OURS else 7,
            capsize=2,
        )


def _format_axes(axis: Any, unit: int) -> None:
    """Logarithmic axes with readable labels; `unit` is the bytes of one on the horizontal axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(MaxNLocator(7))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:.4g}"))

    # Over several decades the labels of all nine steps of each would run into each other.
    low, high = axis.get_ylim()
    if high > 30 * low:
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for set_formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))

    axis.tick_params(axis="both", which="both", labelsize=8)
    axis.tick_params(axis="x", which="both", rotation=40)
    axis.grid(True, which="both", alpha=0.25)


def _half_interval(row: Row, key: str) -> float:
    """Half of a figure's 95 % interval, for its error bar."""
    if key == "kl":
        return float(1.96 * (row["kl_se"] or 0))
    interval = row["ln_ppl_difference_ci95"]
    return float(row["perplexity"] * (interval[1] - interval[0]) / 2) if interval else 0.0
