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


class Part:
    """Reports a part of some work, whose stages are named after it."""

    def __init__(self, name: str, whole: Report) -> None:
        self._name = name
        self._whole = whole

    def stages(self, names: Sequence[str]) -> None:
        """The whole has listed its stages already."""

    def stage(self, name: str) -> None:
        """A stage of the part begins."""
        self._whole.stage(f"{self._name}: {name}")

    def step(self, item: str, done: int, total: int) -> None:
        """As of a Report."""
        self._whole.step(item, done, total)

    def detail(self, text: str, share: float | None = None) -> None:
        """As of a Report."""
        self._whole.detail(text, share)

    def note(self, text: str) -> None:
        """A remark on the part."""
        self._whole.note(f"{self._name}: {text}")
