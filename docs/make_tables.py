"""Writes the tables of results.md, models.md and the README: `python docs/make_tables.py`.

The tables of results come from the committed files in eval/results, that of the families from the
tiny checkpoints in tests/fixtures. With `--check` nothing is written; the exit code is 1 where a
page differs.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from pages import DOCS, README, ROOT, fill, write_or_check

# The README's rows, by model and bits per weight as the whole table prints them
README_ROWS = (
    ("demo-moe", "3.56"),
    ("demo-moe", "4.57"),
    ("moe-22m", "3.52"),
    ("moe-22m", "4.51"),
    ("stories15m", "5.00"),
    ("SmolLM2", "4.50"),
)
README_COLUMNS = (
    "model",
    "bpw",
    "uniform",
    "MINT as published",
    "sees text",
    *("fast", "balanced", "best"),
)
PAGES = {
    README: ("six rows",),
    DOCS / "results.md": ("all rows",),
    DOCS / "models.md": ("families",),
}


def results_table() -> str:
    """Every size that `best` was built at, with the best of each kind of peer."""
    made = runpy.run_path(str(ROOT / "eval" / "results_table.py"))
    return str(made["table"]())


def readme_table() -> str:
    """The README's rows and columns of the same table."""
    lines = [line.strip("| ").split(" | ") for line in results_table().splitlines()]
    names, rows = lines[0], lines[2:]
    chosen = [names.index(name) for name in README_COLUMNS]

    known = {(row[names.index("model")], row[names.index("bpw")]): row for row in rows}
    picked = [known[key] for key in README_ROWS]
    head = [f"| {' | '.join(README_COLUMNS)} |", "|---" * len(README_COLUMNS) + "|"]
    return "\n".join(head + [f"| {' | '.join(row[i] for i in chosen)} |" for row in picked])


def families_table() -> str:
    """The families that were tried from a checkpoint in their released layout."""
    made = runpy.run_path(str(ROOT / "tests" / "fixtures" / "table.py"))
    return str(made["table"]())


TABLES = {"six rows": readme_table, "all rows": results_table, "families": families_table}


def page(path: Path) -> str:
    """A page with its tables made anew."""
    text = path.read_text(encoding="utf-8")
    return fill(text, "table", lambda name, _: TABLES[name]())


if __name__ == "__main__":
    checking = "--check" in sys.argv
    different = [write_or_check(path, page(path), checking) for path in PAGES]
    sys.exit(1 if checking and any(different) else 0)
