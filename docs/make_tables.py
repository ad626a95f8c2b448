"""Writes the tables of results, of model families and of rooms into the pages that show them.

`python docs/make_tables.py`. The tables of results come from the committed files in eval/results,
that of the families from the tiny checkpoints in tests/fixtures, that of the rooms from the
folders. With `--check` nothing is written; the exit code is 1 where a page differs.
"""

from __future__ import annotations

import ast
import runpy
import sys
from functools import partial
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
PAGES = (
    README,
    ROOT / "CONTRIBUTING.md",
    DOCS / "results.md",
    DOCS / "models.md",
    DOCS / "architecture.md",
)


def results_table() -> str:
    """Every size that `best` was built at, with the best of each kind of peer."""
    module = runpy.run_path(str(ROOT / "eval" / "results_table.py"))
    return str(module["table"]())


def targets_table() -> str:
    """The levels beside their best peers and beside an earlier build."""
    module = runpy.run_path(str(ROOT / "eval" / "targets_table.py"))
    return str(module["table"]())


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
    module = runpy.run_path(str(ROOT / "tests" / "fixtures" / "table.py"))
    return str(module["table"]())


def saved_table() -> str:
    """The families that were tried as transformers 5 saves them."""
    module = runpy.run_path(str(ROOT / "tests" / "fixtures" / "table.py"))
    return str(module["saved_table"]())


def known_table() -> str:
    """How each class of mlx-lm was tried: as released, and saved by transformers 4 and 5."""
    module = runpy.run_path(str(ROOT / "tests" / "fixtures" / "known_table.py"))
    return str(module["table"]())


def formats_table() -> str:
    """The quantized formats that were tried from files of the tools themselves."""
    made = runpy.run_path(str(ROOT / "tests" / "fixtures" / "formats_table.py"))
    return str(made["table"]())


def rooms_table(with_modules: bool = True) -> str:
    """The rooms in their order, with what their package says of itself and their modules."""
    rooms = runpy.run_path(str(ROOT / "tests" / "test_architecture.py"))["ROOMS"]
    names = ["room", "what it is", *(["modules"] if with_modules else [])]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for room in rooms:
        name = room.replace(".", "/")
        folder = (
            ROOT / name if name.startswith(("converters", "eval")) else ROOT / "mint_mlx" / name
        )
        package = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        about = " ".join((ast.get_docstring(package) or "").split("\n\n")[0].split())
        modules = sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")
        cells = [f"`{folder.relative_to(ROOT)}/`", about]
        cells += [", ".join(modules)] if with_modules else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {
    "six rows": readme_table,
    "all rows": results_table,
    "targets": targets_table,
    "families": families_table,
    "saved by transformers 5": saved_table,
    "known to be right": known_table,
    "formats": formats_table,
    "rooms": rooms_table,
    "rooms in short": partial(rooms_table, with_modules=False),
}


def page(path: Path) -> str:
    """A page with its tables module anew."""
    text = path.read_text(encoding="utf-8")
    return fill(text, "table", lambda name, _: TABLES[name]())


if __name__ == "__main__":
    checking = "--check" in sys.argv
    different = [write_or_check(path, page(path), checking) for path in PAGES]
    sys.exit(1 if checking and any(different) else 0)
