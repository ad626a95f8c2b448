"""Lets glibc keep freed memory for reuse.

On Linux each array of some MB is otherwise taken from the system anew, which takes time to fill
its pages with zeros (docs/research-log.md). Commands do it for their own process; a program that
imports mint_mlx is left as it is.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping

# Numbers of mallopt's parameters, from malloc.h.
TRIM_THRESHOLD = -1
MMAP_THRESHOLD = -3
MMAP_MAX = -4
ARENA_MAX = -8

KEPT = 1 << 28  # freed bytes that stay with the process
LARGE = 1 << 25  # bytes of an array that the system gives and takes; glibc allows no more


def reuse_freed_memory() -> bool:
    """Keep up to 256 MiB of freed memory, in one heap for all threads.

    (Running a model keeps all of it: runtime/device.py.)

    Returns:
        Whether the C library can do that.
    """
    return set_options({ARENA_MAX: 1, TRIM_THRESHOLD: KEPT, MMAP_THRESHOLD: LARGE})


def set_options(options: Mapping[int, int]) -> bool:
    """Give glibc's allocator values of its parameters, in order; whether it took all of them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # another C library
        return False
    taken = [mallopt(option, value) for option, value in options.items()]
    return all(taken)
