"""Where the progress of long work goes; cli/output.py reports it to people and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

# Called with the name of the current item, how many are done, and how many there are.
Progress = Callable[[str, int, int], None]


class Report(Protocol):
    """Receives progress and remarks."""

    def stage(self, name: str) -> None: ...
    def step(self, item: str, done: int, total: int) -> None: ...
    def detail(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    """A report for library use: says nothing."""

    def stage(self, name: str) -> None:
        pass

    def step(self, item: str, done: int, total: int) -> None:
        pass

    def detail(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass
