"""What people read: tables on narrow terminals, and progress in a log."""

from __future__ import annotations

import pytest
from rich.console import Console

from mint_mlx.cli import output
from mint_mlx.cli.output import Output

COLUMNS = ["rank", "method", "bytes", "KL", "against best peer (95 %)", "top 1"]
ROW = [
    1,
    "mint-mlx (nmse)",
    "1,310,560",
    "0.00592 ± 0.00059",
    "-0.01000 (-0.02000 to -0.00500)",
    "94.3%",
]


@pytest.mark.parametrize("width", [200, 100, 80, 40])
def test_no_figure_is_cut_off(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    out = Output()
    out._out = Console(width=width, highlight=False)
    out.table(COLUMNS, [ROW, [""] * len(ROW)], "at 4.5 bits")
    printed = capsys.readouterr().out
    words = " ".join(printed.replace("│", " ").split())
    assert all(str(cell) in words for cell in ROW)
    assert "at 4.5 bits" in printed
    assert max(map(len, printed.splitlines())) <= width


def test_a_log_has_a_line_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter(range(0, 10_000, 10))
    monkeypatch.setattr(output.time, "monotonic", lambda: float(next(seconds)))
    out = Output()
    out.stage("sensitivity")
    for block in range(1, 41):
        out.step(f"block {block}", block, 48)
        out.detail("back")
    lines = capsys.readouterr().err.splitlines()
    assert 5 <= len(lines) <= 40
    assert all(line.startswith("sensitivity: block ") for line in lines)
    assert any("of 48, about" in line and "left" in line for line in lines)


def test_a_short_job_leaves_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output()
    out.stage("profile")
    out.step("layer", 1, 2)
    assert capsys.readouterr().err == ""
