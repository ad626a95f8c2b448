"""Writes a comparison: results.json, Markdown tables and a picture; and tables for the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..base.files import write_text
from ..base.folders import REPORT
from ..base.units import human
from ..converters.quantizers.registry import needs_inputs
from .compare import Comparison, Row
from .methods import NAMES
from .pictures.methods import methods_picture
from .pictures.style import draw_to

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
    if "decode_ratio" not in row:  # a GGUF file's weights, unpacked
        return "-"
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
    draw_to(methods_picture(comparison), paths[2])
    return paths


def markdown(comparison: Comparison, command: str) -> str:
    """The tables as Markdown, with what they were measured on."""
    lines = [f"# {comparison.source}", "", f"`{command}`", "", head_text(comparison)]

    head = columns(comparison)
    for title, table in tables(comparison):
        lines += ["", f"**{title}**", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(line) + " |" for line in table]
    if reasons(comparison):
        lines += ["", "Not run:", "", *(f"- {reason}" for reason in reasons(comparison))]
    return "\n".join(lines) + "\n"


def head_text(comparison: Comparison) -> str:
    """What the tables were measured on, and what their columns mean."""
    first = next((row for row in comparison.rows if "kl" in row), None)
    measured = "nothing"
    if first is not None:
        measured = f"{first['windows']} windows, {first['tokens']:,} tokens, on {first['device']}"
    floor = "not measured" if comparison.noise_floor is None else f"{comparison.noise_floor:.1g}"
    return (
        f"{comparison.text}: {measured}. KL of the source's next-token distribution from each "
        "method's, in nats per token, ± standard error over windows; noise floor "
        f"{floor}. A peer is built at its own sizes near the budgets, mint-mlx to the same bytes. "
        "The difference in KL to the best peer is paired by windows, below zero is better. Decode: "
        "tokens per second of mlx-lm's generation beside uniform 4bit-g64, and the spread of three "
        "runs; none where that one differs from itself by more than 5 %."
    )
