"""What people read: tables on narrow terminals, and progress in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from mint_mlx.cli import output
from mint_mlx.cli.output import Output, Pace

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
    out.close()
    assert "sensitivity: done in" in capsys.readouterr().err
    assert any("of 48, about" in line and "left" in line for line in lines)


def test_a_short_job_leaves_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output()
    out.stage("profile")
    out.step("layer", 1, 2)
    assert capsys.readouterr().err == ""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test sets."""
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    return now


def test_stages_tell_their_number_and_keep_their_time(clock: list[float]) -> None:
    out = Output()
    stream = io.StringIO()
    out._err = Console(file=stream, force_terminal=True, width=100, highlight=False)
    out.stages(["profile", "convert"])
    for name, seconds in (("profile", 12.0), ("fetch a shard", 3.0), ("convert", 80.0)):
        out.stage(name)
        out.step("layer", 1, 2)
        clock[0] += seconds
    out.close()
    out.close()  # nothing is told twice
    lines = [line for line in Text.from_ansi(stream.getvalue()).plain.splitlines() if line.strip()]
    assert [line for line in lines if line[0] in "✓sf" and " left" not in line] == [
        "step 1 of 2: profile ...",
        "✓ profile: 12 s (12 s so far)",
        "fetch a shard ...",
        "✓ fetch a shard: 3.0 s (15 s so far)",
        "step 2 of 2: convert ...",
        "✓ convert: 1 min 20 s (1 min 35 s so far)",
    ]


def test_the_time_left_is_what_passed_times_what_is_left_over_what_is_done(
    clock: list[float],
) -> None:
    pace = Pace()
    assert pace.seconds_left() is None
    pace.tell(0.0)
    clock[0] = 30.0
    assert pace.seconds_left() is None
    pace.tell(0.25)
    assert pace.seconds_left() == 90.0
    clock[0] = 40.0  # nothing came since: it is slower than it looked
    assert pace.seconds_left() == 120.0
    pace.tell(1.0)
    assert pace.seconds_left() == 0.0


def test_what_an_interrupted_run_has_done_cost_no_time(clock: list[float]) -> None:
    pace = Pace()
    pace.tell(0.5)
    clock[0] = 10.0
    pace.tell(0.75)
    assert pace.seconds_left() == 10.0


def test_learning_steps_are_what_counts_where_parts_differ(clock: list[float]) -> None:
    """A block's layers come in a burst, once the first of them was learned for minutes."""
    pace = Pace()
    pace.tell(0.0)
    for second in range(1, 101):
        clock[0] = float(second)
        pace.tell(second / 200, parts_differ=True)
    pace.tell(0.9)  # layers that are written: no work
    assert pace.seconds_left() == pytest.approx(100.0, rel=0.03)
