"""What the commands print: tables and sentences on stdout, or one JSON object; progress on stderr.

An `Output` is made once by the command line. Progress is a bar on a terminal, and in a log a line a
minute."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.table import Column, Table
from rich.text import Text

from ..base.printable import printable, unguarded
from ..base.units import duration

EVERY = 60.0  # seconds between two lines of progress in a log
NARROW = 12  # characters to which a column may be folded


class Output:
    """Prints for people, or one JSON object and nothing else. It is a `report.Report` too."""

    def __init__(self, as_json: bool = False, silent: bool = False) -> None:
        """Make one; `silent` for a process that works beside the one that prints."""
        self.as_json = as_json
        width = None if sys.stdout.isatty() else 160
        options: dict[str, Any] = {"highlight": False, "soft_wrap": True, "emoji": False}
        self._out = Console(file=unguarded(sys.stdout), width=width, quiet=silent, **options)
        self._err = Console(file=unguarded(sys.stderr), quiet=silent, **options)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stages: list[str] = []
        self._stage = ""
        self._item = ""
        self._started = self._stage_start = self._last_log = time.monotonic()
        self._pace = Pace()

    def line(self, text: str = "") -> None:
        """A line for people."""
        if not self.as_json:
            self._out.print(printable(text), markup=False)

    def table(
        self, columns: Sequence[str], lines: Sequence[Sequence[Any]], title: str | None = None
    ) -> None:
        """A table for people; columns after the first are set to the right if they hold figures.

        On a terminal too narrow for it lines are written out: rich would cut figures off without a
        sign."""
        if self.as_json:
            return
        columns = [printable(column) for column in columns]
        lines = [[printable(str(cell)) for cell in line] for line in lines]
        title = printable(title) if title else None
        if _least_width(columns, lines) > self._out.width:
            self._write_out(columns, lines, title)
            return
        table = Table(
            title=escape(title) if title else None, title_justify="left", header_style="bold"
        )
        for i, column in enumerate(columns):
            cells = [line[i] for line in lines]
            figures = i > 0 and all(map(_is_figure, cells))
            table.add_column(
                column,
                justify="right" if figures else "left",
                no_wrap=not _gives_way(i, cells),
                overflow="fold",
            )
        for line in lines:
            table.add_row(*[escape(cell) for cell in line])
        self._out.print(table, soft_wrap=False)

    def _write_out(
        self, columns: Sequence[str], lines: Sequence[Sequence[Any]], title: str | None
    ) -> None:
        """A table's lines as sentences, each cell after its column's name."""
        if title:
            self._out.print(title, markup=False)
        for line in lines:
            cells = [
                f"{name} {cell}".strip()
                for name, cell in zip(columns, line, strict=True)
                if str(cell)
            ]
            self._out.print(f"- {', '.join(cells)}", markup=False, soft_wrap=False)

    def result(self, data: dict[str, Any]) -> None:
        """The JSON object, where one was asked for."""
        if self.as_json and not self._out.quiet:
            print(json.dumps(data), file=self._out.file)

    def stages(self, names: Sequence[str]) -> None:
        """The stages that are to come; each tells its number when it begins."""
        self._stages = [printable(name) for name in names]

    def stage(self, name: str) -> None:
        """A new stage of work begins; the one before it gets a tick and its time."""
        self.close()
        self._stage = printable(name)
        self._stage_start = time.monotonic()
        self._pace = Pace()
        if self._err.is_terminal:
            number = ""
            if self._stage in self._stages:
                place = self._stages.index(self._stage) + 1
                number = f"step {place} of {len(self._stages)}: "
            self._err.print(f"{number}{self._stage} ...", style="dim", markup=False)

    def step(self, item: str, done: int, total: int) -> None:
        """Within a stage: what is worked on, and how far it is."""
        item = self._item = printable(item)
        self._pace.tell(done / total if total else 1.0)
        if self._err.quiet or not self._err.is_terminal:
            self._log(f"{item}, {done} of {total}{self._time_left()}")
            return

        # The bar is made with its first step: a stage without steps has none.
        if self._progress is None:
            text_column = TextColumn(
                "{task.description}",
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            )
            columns = (BarColumn(24), MofNCompleteColumn(), TimeLeft(self._pace), text_column)
            self._progress = Progress(
                *columns,
                console=self._err,
                transient=True,
                expand=True,
                redirect_stdout=False,  # what others print goes through guard_streams
                redirect_stderr=False,
            )
            self._progress.start()
            self._task = self._progress.add_task(self._stage, total=total)
        assert self._task is not None
        self._progress.update(self._task, completed=done, total=total, description=escape(item))

    def detail(self, text: str, share: float | None = None) -> None:
        """Within a step that takes long: how far it is, and the stage with it."""
        text = printable(text)
        if share is not None:
            self._pace.tell(share, parts_differ=True)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=escape(f"{text} ({self._item})"))
        else:
            self._log(f"{self._item} ({text}){self._time_left()}")

    def _time_left(self) -> str:
        """The time left as the end of a line, where it can be told."""
        seconds = self._pace.seconds_left()
        return f", about {duration(seconds)} left" if seconds else ""

    def _log(self, text: str) -> None:
        """A line of progress where there is no terminal, once a minute."""
        if time.monotonic() - self._last_log >= EVERY:
            self._last_log = time.monotonic()
            self._err.print(f"{self._stage}: {text}", markup=False)

    def note(self, text: str) -> None:
        """A remark or a warning, on stderr."""
        self._err.print(f"note: {printable(text)}", markup=False)

    def hint(self, text: str) -> None:
        """What may be done next, on stderr, for people."""
        if not self.as_json:
            self._err.print(printable(text), style="dim", markup=False)

    def close(self) -> None:
        """End the stage: its bar goes, and its time stays."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if not self._stage:
            return
        now = time.monotonic()
        took, total = now - self._stage_start, now - self._started
        if self._err.is_terminal:
            text = f"✓ {self._stage}: {duration(took)} ({duration(total)} so far)"
            self._err.print(text, style="dim", markup=False)
        elif took >= EVERY:
            self._err.print(f"{self._stage}: done in {duration(took)}", markup=False)
        self._stage = ""


class Pace:
    """How fast a stage goes: the time left is what has passed, times what is left by what is done.

    Work that an interrupted run has done costs no time, so it counts from the first share told.
    """

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None  # time and share
        self._share = 0.0
        self._parts_differ = False

    def tell(self, share: float, parts_differ: bool = False) -> None:
        """Which share of the stage is done.

        Args:
            share: 0 to 1; a smaller one than before begins anew.
            parts_differ: this one counts the work itself, and shares of parts are none from now on.
        """
        if self._parts_differ and not parts_differ:
            return
        if self._first is None or share < self._share or parts_differ > self._parts_differ:
            start = time.monotonic()
            self._first = (start, share)
        self._share = share
        self._parts_differ = parts_differ

    def seconds_left(self) -> float | None:
        """Seconds that are left, as far as anyone can tell."""
        if self._first is None:
            return None
        start, before = self._first
        done = self._share - before
        return (time.monotonic() - start) * (1 - self._share) / done if done > 0 else None


class TimeLeft(ProgressColumn):
    """The time left of a stage, as a column of its bar."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        super().__init__()

    def render(self, task: Task) -> Text:
        seconds = self._pace.seconds_left()
        text = "" if seconds is None else f"{duration(seconds)} left"
        return Text(text, style="progress.remaining")


def _is_figure(cell: str) -> bool:
    """Whether a cell of a table holds a number, or stands for one."""
    return cell in ("", "-") or cell[0].isdigit() or cell[0] in "+-~<."


def _gives_way(index: int, cells: Sequence[str]) -> bool:
    """Whether a column may be folded on a narrow terminal: the first, and those of long texts."""
    return index == 0 or any(len(cell) > 40 for cell in cells)


def _least_width(columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> int:
    """The width in which a table loses nothing."""
    total = 1
    for i, column in enumerate(columns):
        cells = [str(line[i]) for line in lines]
        width = max(len(text) for text in (column, *cells))
        total += 3 + (min(NARROW, width) if _gives_way(i, cells) else width)
    return total
