"""Work on many pieces of a layer, in as many threads as there are cores."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any


def cores(most: int) -> int:
    """How many threads are used where there may be so many."""
    return min(most, os.cpu_count() or 1)


def in_threads(work: Callable[..., None], pieces: Iterable[tuple[Any, ...]], most: int) -> None:
    """Do the work on each piece; no more pieces are made ahead than there are threads.

    Args:
        work: called with what a piece holds.
        pieces: made in this thread.
        most: threads.
    """
    count = cores(most)
    running = deque[Future[None]]()
    for piece in pieces:
        running.append(_pool(count).submit(work, *piece))
        if len(running) > count:
            running.popleft().result()
    for rest in running:
        rest.result()


@lru_cache(maxsize=2)
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count)  # kept, as MLX makes a stream for each thread
