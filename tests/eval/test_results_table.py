"""What the documentation says of quality is what the committed results say."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_of_results_holds_the_table_of_the_results() -> None:
    table = runpy.run_path(str(ROOT / "eval" / "results_table.py"))["table"]()
    assert f"\n{table}\n" in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_the_readme_holds_six_rows_of_it() -> None:
    """Without the columns of size and of the share of the best peer's."""
    table = runpy.run_path(str(ROOT / "eval" / "results_table.py"))["table"]()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    held = []
    for line in table.splitlines()[2:]:
        model, _, *cells, _ = line.strip("| ").split(" | ")
        held.append(f"\n| {' | '.join([model, *cells])} |\n" in readme)
    assert sum(held) == 6
