"""Where MLX computes, and how this process's memory is handled there. Imports no mlx-lm."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from ..base.allocator import MMAP_MAX, TRIM_THRESHOLD, set_options
from ..base.threads import share_blas

NARROW = 512  # hidden size below which a product is done before a second thread has begun


def on_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return bool(mx.default_device() != mx.gpu)


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Have glibc reuse freed memory instead of returning it to the system.

    MLX's large arrays are otherwise faulted in again page by page: keeping the memory saves a third
    of the time of a backward pass, for a twentieth more of peak memory (measured on Qwen3-30B's
    shapes).
    """
    if on_cpu():
        set_options({MMAP_MAX: 0, TRIM_THRESHOLD: -1})  # never


def fit_blas(width: int) -> None:
    """Let the BLAS have threads for a model of this hidden size, from now on, where they gain."""
    if on_cpu():
        share_blas(width >= NARROW)
