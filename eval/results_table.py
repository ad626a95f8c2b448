"""Prints the table of docs/results.md from eval/results: `python eval/results_table.py`.

`make docs` writes it there, and six of its lines into the README.

A line is a size that `best` was built at; it takes what the model's other tables have at that size
as well, and our levels as they were built last (eval/results/levels).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mint_mlx.eval.compare import SAME
from mint_mlx.eval.methods import PUBLISHED

RESULTS = Path(__file__).parent / "results"
MODELS = ("demo-moe", "moe-22m", "stories15m", "SmolLM2")
HEAD = (
    "model",
    "size",
    "bpw",
    "uniform",
    "MINT as published",
    "sees text",
    "fast",
    "balanced",
    "best",
)
OLDER = "†"  # follows the figure of an earlier build
Row = dict[str, Any]


def table() -> str:
    """The whole table, as Markdown."""
    lines = [f"| {' | '.join(HEAD)} | best / best peer |", "|---" * (len(HEAD) + 1) + "|"]
    built = {model: levels(model) for model in MODELS}
    for model in MODELS:
        lines += [line(model, rows, built[model]) for rows in sizes(model)]
    return "\n".join(lines)


def levels(model: str) -> list[Row]:
    """The scored checkpoints of our levels as they were built last."""
    files = sorted((RESULTS / "levels").glob(f"{model}*/results.json"))
    rows = [row for file in files for row in json.loads(file.read_text())["rows"]]
    return [row for row in rows if row["kind"] == "ours" and row.get("kl") is not None]


def sizes(model: str) -> Iterator[list[Row]]:
    """The scored checkpoints of each size of a model, smallest size first."""
    files = sorted(RESULTS.glob(f"{model}*/**/results.json"))
    comparisons = [json.loads(file.read_text()) for file in files]
    scored = [[row for row in c["rows"] if row.get("kl") is not None] for c in comparisons]

    # Which comparison has the size; the first of two that have it.
    by_bytes: dict[int, tuple[int, int]] = {}
    for index, rows in enumerate(scored):
        for row in rows:
            if row["method"] == "best":
                by_bytes.setdefault(row["bytes"], (row["group"], index))

    for size, index in sorted(by_bytes.values()):
        of_size = [row for row in scored[index] if row["group"] == size]
        others = [row for i, rows in enumerate(scored) if i != index for row in rows]
        near = [row for row in at_size(others, size, "bytes") if row["kind"] == "peer"]
        present = {(row["method"], row["about"]) for row in of_size}
        yield of_size + [row for row in near if (row["method"], row["about"]) not in present]


def at_size(rows: list[Row], size: int, what: str = "group") -> list[Row]:
    """Those of some checkpoints that are as large, by `bytes` or by the `group` they stand in."""
    return [row for row in rows if abs(row[what] - size) <= SAME * size]


def line(model: str, rows: list[Row], built: list[Row]) -> str:
    """The line of a size.

    Args:
        model: its name.
        rows: of this size.
        built: our levels as they were built last, at any size.
    """
    best = next(row for row in rows if row["method"] == "best")
    cells = [model, f"{best['group'] / 1e6:.2f} MB", f"{best['bits_per_weight']:.2f}"]

    # The best peer of each kind.
    peers = [row for row in rows if row["kind"] == "peer"]
    blind = [row for row in peers if not row["sees_text"] and row["method"] not in PUBLISHED]
    published = [row for row in peers if row["method"] in PUBLISHED]
    seeing = [row for row in peers if row["sees_text"]]
    cells += [_best_of(blind), _best_of(published, name=False), _best_of(seeing)]

    older = {row["method"]: row["kl"] for row in rows if row["kind"] == "ours"}
    latest = {row["method"]: row["kl"] for row in at_size(built, best["group"])}
    known = older | latest
    lowest = min(("fast", "balanced", "best"), key=lambda name: known.get(name, math.inf))
    for name in ("fast", "balanced", "best"):
        text = figure(known[name]) + OLDER * (name not in latest) if name in known else "-"
        cells.append(f"**{text}**" if name == lowest else text)
    cells.append(f"{known['best'] / min(row['kl'] for row in peers):.2f}")
    return f"| {' | '.join(cells)} |"


def _best_of(rows: list[Row], name: bool = True) -> str:
    """The lowest KL of these rows, and whose it is."""
    first = min(rows, key=lambda row: float(row["kl"]), default=None)
    if first is None:
        return "-"
    return figure(first["kl"]) + (f" ({first['method']})" if name else "")


def figure(kl: float) -> str:
    """Three digits, at most four places."""
    return (f"{kl:.3f}" if kl >= 0.1 else f"{kl:.4f}").removeprefix("0")


if __name__ == "__main__":
    print(table())
