"""Writes a comparison: `results.json`, a Markdown table and a picture; and the same table for the
terminal.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..base.files import atomic_write, write_text
from ..base.units import UNITS, decimal_unit, human
from ..converters.quantizers.registry import needs_inputs
from .compare import NAMES, OURS, Comparison, Row


def columns(comparison: Comparison) -> list[str]:
    """The table's head."""
    head = [
        "rank",
        "method",
        "sees",
        "as",
        "bytes",
        "KL",
        "against best peer (95 %)",
        "PPL",
        "top 1",
    ]
    return [*head, "decode"] if _has_speed(comparison) else head


def _has_speed(comparison: Comparison) -> bool:
    return any("decode_ratio" in row for row in comparison.rows)


def cells(row: Row, speed: bool) -> list[str]:
    """One row of the table."""
    stored = f"{row['bytes']:,}" if row["bytes"] else "-"
    head = [NAMES.get(row["method"], row["method"]), _sees(row), row["about"], stored]
    if "kl" not in row:
        return ["-", *head, "not run", "", "", "", *([""] if speed else [])]
    interval = row.get("kl_difference_ci95")
    against = "-"
    if row.get("best_peer") == row["method"] and row.get("kl_difference") == 0:
        against = "is the best peer"
    elif interval:
        against = f"{row['kl_difference']:+.5f} ({interval[0]:+.5f} to {interval[1]:+.5f})"
    error = f" ± {row['kl_se']:.5f}" if row["kl_se"] is not None else ""
    figures = [
        f"{row['kl']:.5f}{error}",
        against,
        f"{row['perplexity']:.3f}",
        f"{row['same_top1']:.1%}",
    ]
    return [str(row["rank"]), *head, *figures, *([f"{row['decode_ratio']:.2f}x"] if speed else [])]


def _sees(row: Row) -> str:
    if row["kind"] == "given":
        return "?"
    if row["sees_text"]:
        return "text"
    return "own text" if needs_inputs(row["about"]) else "weights"


def tables(comparison: Comparison) -> list[tuple[str, list[list[str]]]]:
    """One table a size: title and rows."""
    speed = _has_speed(comparison)
    found = []
    for size in sorted({row["group"] for row in comparison.rows}):
        title = f"at {human(size)} ({size * 8 / comparison.parameters:.2f} bpw)"
        found.append(
            (title, [cells(row, speed) for row in comparison.rows if row["group"] == size])
        )
    return found


def reasons(comparison: Comparison) -> list[str]:
    """Why each method that wasn't run wasn't."""
    return [
        f"{row['method']} ({row['about']}): {row['reason']}"
        for row in comparison.rows
        if "reason" in row
    ]


def markdown(comparison: Comparison, command: str) -> str:
    """The tables as Markdown, with what they were measured on."""
    first = next((row for row in comparison.rows if "kl" in row), None)
    measured = (
        f"{first['windows']} windows, {first['tokens']:,} tokens, on {first['device']}"
        if first
        else "nothing"
    )
    lines = [
        f"# {comparison.source}",
        "",
        f"`{command}`",
        "",
        f"{comparison.text}: {measured}. KL of the source's next-token distribution from each "
        "method's, in nats per token, ± standard error over windows; noise floor "
        f"{_floor(comparison)}. A peer is built at its own sizes near the budgets, mint-mlx to "
        "the same bytes. The difference in KL to the best peer is paired by windows, below zero "
        "is better. Decode: tokens per second of mlx-lm's generation beside uniform 4bit-g64.",
    ]
    head = columns(comparison)
    for title, rows in tables(comparison):
        lines += ["", f"**{title}**", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    if reasons(comparison):
        lines += ["", "Not run:", "", *(f"- {reason}" for reason in reasons(comparison))]
    return "\n".join(lines) + "\n"


def _floor(comparison: Comparison) -> str:
    return "not measured" if comparison.noise_floor is None else f"{comparison.noise_floor:.1g}"


def save(comparison: Comparison, folder: Path, command: str) -> list[Path]:
    """Write results.json, table.md and plot.png; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {
        "source": comparison.source,
        "command": command,
        "text": comparison.text,
        "noise_floor": comparison.noise_floor,
        "rows": comparison.rows,
    }
    write_text(folder / "results.json", json.dumps(data, indent=1) + "\n")
    write_text(folder / "table.md", markdown(comparison, command))
    plot(comparison, folder / "plot.png")
    return [folder / name for name in ("results.json", "table.md", "plot.png")]


def plot(comparison: Comparison, path: Path) -> None:
    """KL and perplexity against bytes, logarithmic, with error bars: ours as lines, peers as
    points.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    rows = [row for row in comparison.rows if "kl" in row]
    is_peer = {row["method"]: row["kind"] != "ours" for row in rows}
    methods = sorted(is_peer, key=lambda method: (is_peer[method], method))
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    colours = pyplot.get_cmap("tab20").colors
    unit = decimal_unit(max((row["bytes"] for row in rows), default=0))
    for axis, key, label in (
        (axes[0], "kl", "KL from the source (nats per token)"),
        (axes[1], "perplexity", "perplexity (intervals paired with the source)"),
    ):
        for i, method in enumerate(methods):
            mine = sorted((r for r in rows if r["method"] == method), key=lambda r: r["bytes"])
            axis.errorbar(
                [r["bytes"] for r in mine],
                [r[key] for r in mine],
                yerr=[_half_interval(r, key) for r in mine],
                label=NAMES.get(method, method),
                color=colours[i % len(colours)],
                marker="o" if method in OURS else "sD^vP*X<>"[i % 9],
                linestyle="-" if method in OURS else "none",
                markersize=4 if method in OURS else 7,
                capsize=2,
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel(f"all safetensors files ({unit})")
        axis.set_ylabel(label)
        axis.xaxis.set_major_locator(MaxNLocator(7))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / UNITS[unit]:.4g}"))
        low, high = axis.get_ylim()
        if high > 30 * low:  # else the labels of all nine steps of a decade run into each other
            axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axis.tick_params(axis="both", which="both", labelsize=8)
        axis.tick_params(axis="x", which="both", rotation=40)
        axis.grid(True, which="both", alpha=0.25)
    if rows:
        bare = rows[0]["perplexity"] / math.exp(rows[0]["ln_ppl_difference"])
        axes[1].axhline(bare, color="black", linestyle=":", label=f"source, {bare:.3f}")
        axes[1].legend(fontsize=8, handles=[axes[1].get_lines()[-1]])
    figure.legend(
        *axes[0].get_legend_handles_labels(), fontsize=8, ncols=8, loc="outside lower center"
    )
    figure.suptitle(
        f"{comparison.source} on {comparison.text}: methods at the same bytes, 95 % intervals"
    )
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=130, format=path.suffix[1:])
    pyplot.close(figure)


def _half_interval(row: Row, key: str) -> float:
    """Half of a figure's 95 % interval, for its error bar."""
    if key == "kl":
        return float(1.96 * (row["kl_se"] or 0))
    interval = row["ln_ppl_difference_ci95"]
    return float(row["perplexity"] * (interval[1] - interval[0]) / 2) if interval else 0.0
