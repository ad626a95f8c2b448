"""What the README says of quality is what the committed results say."""

from __future__ import annotations

import runpy
from pathlib import Path

HERE = Path(__file__).parents[2]


def test_the_readme_holds_the_table_of_the_results() -> None:
    table = runpy.run_path(str(HERE / "eval" / "results_table.py"))["table"]()
    assert f"\n{table}\n" in (HERE / "README.md").read_text(encoding="utf-8")
