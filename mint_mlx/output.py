"""What the commands print: tables and sentences for people on stdout, or one JSON object; progress on stderr.

An `Output` is made once by the command line. Progress appears on a terminal only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table


class Output:
    """Prints for people, or one JSON object and nothing else. It is a `report.Report` too."""

    def __init__(self, as_json: bool = False, silent: bool = False) -> None:
        """Make one; `silent` for a process that works beside the one that prints."""
        self.as_json = as_json
        width = None if sys.stdout.isatty() else 160
        self._out = Console(width=width, highlight=False, soft_wrap=True, emoji=False, quiet=silent)
        self._err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False, quiet=silent)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._item = ""

    def line(self, text: str = "") -> None:
        """A line for people."""
        if not self.as_json:
            self._out.print(text, markup=False)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
        """A table for people; columns after the first are set to the right if they hold figures."""
        if self.as_json:
            return
        table = Table(title=escape(title) if title else None, title_justify="left", header_style="bold")
        for i, column in enumerate(columns):
            cells = [str(row[i]) for row in rows]
            figures = i > 0 and all(c[:1].isdigit() or c in ("", "-") or c[:1] in "+-~<." for c in cells)
            wide = i == 0 or any(len(c) > 40 for c in cells)  # on a narrow terminal only these give way
            table.add_column(column, justify="right" if figures else "left", no_wrap=not wide, overflow="fold")
        for row in rows:
            table.add_row(*[escape(str(cell)) for cell in row])
        self._out.print(table, soft_wrap=False)

    def result(self, data: dict[str, Any]) -> None:
        """The JSON object, where one was asked for."""
        if self.as_json and not self._out.quiet:
            print(json.dumps(data))

    def stage(self, name: str) -> None:
        """A new stage of work begins."""
        self.close()
        self._stage = name
        if self._err.is_terminal:
            self._err.print(f"{name} ...", style="dim")

    def step(self, item: str, done: int, total: int) -> None:
        """Within a stage: what is worked on, and how far it is."""
        if self._err.quiet or not self._err.is_terminal:
            return
        if self._progress is None:
            columns = (BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=self._err, transient=True)
            self._progress.start()
            self._task = self._progress.add_task(self._stage, total=total)
        assert self._task is not None
        self._item = item
        self._progress.update(self._task, completed=done, total=total, description=escape(item))

    def detail(self, text: str) -> None:
        """Within a step that takes long: how far it is."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=escape(f"{self._item} ({text})"))

    def note(self, text: str) -> None:
        """A remark or a warning, on stderr."""
        self._err.print(f"note: {text}", markup=False)

    def close(self) -> None:
        """End the progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
