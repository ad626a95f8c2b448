"""Prints the table of docs/results.md from the files here: `python eval/results_table.py`.

`make docs` writes it there, and six of its rows into the README.

A row is a size that `best` was built at; it takes what the model's other tables hold at that size
as well."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mint_mlx.eval.compare import PUBLISHED, SAME

HERE = Path(__file__).parent / "results"
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
Row = dict[str, Any]


def sizes(model: str) -> Iterator[list[Row]]:
    """The scored checkpoints of each size of a model, smallest size first."""
    files = [
        json.loads(file.read_text()) for file in sorted(HERE.glob(f"{model}*/**/results.json"))
    ]
    tables = [[row for row in file["rows"] if row.get("kl") is not None] for file in files]
    found: dict[int, tuple[int, int]] = {}  # of a size that two tables have, the first's
    for index, table in enumerate(tables):
        for row in table:
            if row["method"] == "best":
                found.setdefault(row["bytes"], (row["group"], index))
    for size, index in sorted(found.values()):
        here = [row for row in tables[index] if row["group"] == size]
        named = {(row["method"], row["about"]) for row in here}
        peers = [
            row
            for i, table in enumerate(tables)
            if i != index
            for row in table
            if row["kind"] == "peer"
        ]
        near = [row for row in peers if abs(row["bytes"] - size) <= SAME * size]
        yield here + [row for row in near if (row["method"], row["about"]) not in named]


def line(model: str, rows: list[Row]) -> str:
    """A size's line."""
    level = next(row for row in rows if row["method"] == "best")
    peers = [row for row in rows if row["kind"] == "peer"]
    kinds = (
        [row for row in peers if not row["sees_text"] and row["method"] not in PUBLISHED],
        [row for row in peers if row["method"] in PUBLISHED],
        [row for row in peers if row["sees_text"]],
    )
    columns = [model, f"{level['group'] / 1e6:.2f} MB", f"{level['bits_per_weight']:.2f}"]
    for some, named in zip(kinds, (True, False, True), strict=True):
        first = min(some, key=lambda row: float(row["kl"]), default=None)
        columns.append(
            "-" if first is None else figure(first["kl"]) + f" ({first['method']})" * named
        )
    ours = {row["method"]: row["kl"] for row in rows if row["kind"] == "ours"}
    columns += [figure(ours[name]) if name in ours else "-" for name in ("fast", "balanced")]
    columns += [
        f"**{figure(ours['best'])}**",
        f"{ours['best'] / min(row['kl'] for row in peers):.2f}",
    ]
    return f"| {' | '.join(columns)} |"


def figure(kl: float) -> str:
    """Three digits, at most four places."""
    return (f"{kl:.3f}" if kl >= 0.1 else f"{kl:.4f}").removeprefix("0")


def table() -> str:
    """All of it."""
    lines = [f"| {' | '.join(HEAD)} | best / best peer |", "|---" * (len(HEAD) + 1) + "|"]
    return "\n".join(lines + [line(model, rows) for model in MODELS for rows in sizes(model)])


if __name__ == "__main__":
    print(table())
