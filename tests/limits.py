"""A limit on the time of one case, so that one that hangs is a failure."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 60  # more than any case takes


@contextmanager
def limited() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError("this case hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
