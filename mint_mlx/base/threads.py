"""Work on many pieces, in as many threads as there are cores."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

T = TypeVar("T")
_local = threading.local()


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
    for _ in side_by_side(work, pieces, most):
        pass


def side_by_side(
    work: Callable[..., T], pieces: Iterable[tuple[Any, ...]], most: int
) -> Iterator[T]:
    """What the work gives for each piece, in order, computed as in `in_threads`.

    Work that is itself a piece of other work is done in its own thread: all others are busy.
    """
    count = cores(most)
    if count == 1 or getattr(_local, "is_worker", False):
        yield from (work(*piece) for piece in pieces)
        return
    running = deque[Future[T]]()
    try:
        for piece in pieces:
            running.append(_pool(count).submit(work, *piece))
            if len(running) > count:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:  # after a failure nothing goes on behind the caller's back
        for rest in running:
            rest.cancel()
        for rest in running:
            if not rest.cancelled():
                rest.exception()


@contextmanager
def single_blas() -> Iterator[None]:
    """Let each thread of ours multiply by itself: a BLAS of several waits for them at each call."""
    with _libraries().limit(limits=1, user_api="blas"):
        yield


def share_blas(threads: bool) -> None:
    """Let the BLAS use all its threads from now on, or one: for small products it only waits."""
    libraries = _libraries()
    libraries.limit(limits=_all_threads() if threads else 1, user_api="blas")


@lru_cache(maxsize=1)
def _all_threads() -> int:
    """Of the BLAS, as this process or its user has set them at first."""
    return max((library["num_threads"] for library in _libraries().info()), default=1)


@lru_cache(maxsize=1)
def _libraries() -> ThreadpoolController:
    """The BLAS libraries of this process; to look for them takes longer than a small product."""
    return ThreadpoolController()


@lru_cache(maxsize=2)
def _pool(count: int) -> ThreadPoolExecutor:
    # Kept, as MLX makes a stream for each thread.
    return ThreadPoolExecutor(count, initializer=lambda: setattr(_local, "is_worker", True))
