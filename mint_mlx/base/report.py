"""Where the progress of long work goes; cli/output.py reports it to people and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

# Called with the name of the current item, how many are done, and how many there are.
Progress = Callable[[str, int, int], None]


class Report(Protocol):
    """Receives progress and remarks.

    `stages` names what is to come, `stage` begins one, `step` tells how many of its parts are done,
    and `detail` what happens within one; where its parts take different times, `share` tells how
    much of the whole stage is done (0 to 1).
    """

    def stages(self, names: Sequence[str]) -> None: ...
    def stage(self, name: str) -> None: ...
    def step(self, item: str, done: int, total: int) -> None: ...
    def detail(self, text: str, share: float | None = None) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    """A report for library use: says nothing."""

    def stages(self, names: Sequence[str]) -> None:
        pass

    def stage(self, name: str) -> None:
        pass

    def step(self, item: str, done: int, total: int) -> None:
        pass

    def detail(self, text: str, share: float | None = None) -> None:
        pass

    def note(self, text: str) -> None:
        pass
