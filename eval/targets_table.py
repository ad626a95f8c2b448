"""Prints the table of targets of docs/results.md from eval/results: `python eval/targets_table.py`.

A figure is the mean KL of a level over that of its best peer, or over its own of an earlier build,
on the same windows. Where a level was also made from a second text (eval/results/second-text), its
KL is the mean of both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mint_mlx.eval.methods import PUBLISHED
from mint_mlx.eval.results_table import MODELS, RESULTS, Row, at_size, levels, sizes
from mint_mlx.eval.stats import student

MOES = ("demo-moe", "moe-22m")
SIZES = {  # bits per weight that the targets speak of, as the tables print them
    "demo-moe": ("3.50", "3.56", "4.50", "4.57", "5.05", "5.10", "6.16"),
    "moe-22m": ("3.52", "4.51", "5.00", "6.00"),
    "stories15m": ("4.50", "5.00"),
}
EARLIER = {  # at most so much of the KL of 2026-11-28, by model and whole bits: fast, balanced
    ("demo-moe", 3): (0.78, 0.70),
    ("demo-moe", 4): (0.86, 0.87),
    ("moe-22m", 3): (0.84, 0.78),
    ("moe-22m", 4): (0.92, 0.88),
    ("stories15m", 4): (0.75, 0.75),
}
HEAD = (
    "model",
    "bpw",
    "`fast` / best that sees weights only",
    "`balanced` / best peer",
    "`best` / best peer",
    "`fast` / 2026-11-28",
    "`balanced` / 2026-11-28",
)


@dataclass(frozen=True)
class Size:
    """A model at one size.

    Attributes:
        model: its name.
        bits: a weight.
        ours: the KL of each window by level, of the present build.
        older: the same of the build of 2026-11-28.
        peers: their rows.
    """

    model: str
    bits: float
    ours: dict[str, np.ndarray]
    older: dict[str, np.ndarray]
    peers: list[Row]


def table() -> str:
    """The whole table, as Markdown; bold is above its limit."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    return "\n".join(lines + [line(size) for size in (*usual_sizes(), *dense_sizes())])


def usual_sizes() -> Iterator[Size]:
    """The sizes of the models in the table of all results."""
    for model in MODELS:
        built = levels(model)
        for rows in sizes(model):
            best = next(row for row in rows if row["method"] == "best")
            if f"{best['bits_per_weight']:.2f}" not in SIZES.get(model, ()):
                continue
            older = {row["method"]: np.array(row["window_kl"]) for row in rows if _ours(row)}
            peers = [row for row in rows if row["kind"] == "peer"]
            ours = _by_level(model, at_size(built, best["group"]))
            yield Size(model, best["bits_per_weight"], ours, older, peers)


def dense_sizes() -> Iterator[Size]:
    """The sizes of the dense models that have tables of their own (eval/results/dense)."""
    for file in sorted((RESULTS / "dense").glob("*/results.json")):
        result: dict[str, Any] = json.loads(file.read_text())
        scored = [row for row in result["rows"] if row.get("kl") is not None]
        for group in sorted({row["group"] for row in scored}):
            rows = [row for row in scored if row["group"] == group]
            peers = [row for row in rows if row["kind"] == "peer"]
            ours = [row for row in rows if _ours(row)]
            if peers and ours:
                bits = ours[0]["bits_per_weight"]
                yield Size(result["source"], bits, _by_level(result["source"], ours), {}, peers)


def line(size: Size) -> str:
    """The line of a size."""
    moe = size.model in MOES
    low = size.bits < 4.75
    blind = _best([row for row in size.peers if not row["sees_text"]])
    best = _best(size.peers)
    limits = EARLIER.get((size.model, int(size.bits + 0.25)), (math.inf, math.inf))

    # What a level is held against, and its limit there.
    balanced = (0.30 if moe else 0.50) if low or not moe else math.inf
    learned = (0.12 if low else 0.22) if moe else (0.30 if low else math.inf)
    cells = [
        size.model,
        f"{size.bits:.2f}",
        cell(size.ours.get("fast"), blind, 1.0),
        cell(size.ours.get("balanced"), best, balanced),
        cell(size.ours.get("best"), best, learned),
        cell(size.ours.get("fast"), size.older.get("fast"), limits[0]),
        cell(size.ours.get("balanced"), size.older.get("balanced"), limits[1]),
    ]
    return f"| {' | '.join(cells)} |"


def cell(ours: np.ndarray | None, theirs: np.ndarray | None, limit: float) -> str:
    """A ratio of two KLs with its 95 % interval; `-` where one of them was not measured."""
    if ours is None or theirs is None:
        return "-"
    value, half = ratio(ours, theirs)
    text = f"{_short(value)} ({_short(value - half)} to {_short(value + half)})"
    return f"**{text}**" if value > limit else text


def ratio(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """The ratio of two means over the same windows, and half of its 95 % interval.

    The error is that of a ratio estimator, as the windows are paired.
    """
    value = float(ours.mean() / theirs.mean())
    residuals = ours - value * theirs
    count = len(residuals)
    error = math.sqrt(float((residuals**2).sum()) / (count - 1) / count) / float(theirs.mean())
    return value, student(count - 1) * error


def _by_level(model: str, rows: list[Row]) -> dict[str, np.ndarray]:
    """The KL of each window by level: the mean over both texts where there are two."""
    file = RESULTS / "second-text" / model / "results.json"
    others = json.loads(file.read_text())["rows"] if file.is_file() else []
    by_level = {}
    for row in rows:
        level = row["method"]
        again = [
            other["window_kl"]
            for other in at_size(others, row["bytes"], "bytes")
            if other["method"].startswith(f"{level}-")
        ]
        by_level[level] = np.mean([row["window_kl"], *again], axis=0)
    return by_level


def _ours(row: Row) -> bool:
    return row["kind"] == "ours" and row["method"] not in PUBLISHED


def _best(rows: list[Row]) -> np.ndarray | None:
    """The KL of each window of the best of these rows, if there are any."""
    first = min(rows, key=lambda row: float(row["kl"]), default=None)
    return None if first is None else np.array(first["window_kl"])


def _short(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


if __name__ == "__main__":
    print(table())
