"""MLX's streams: one that reads the disk, and those that compute side by side (a CPU stream is one thread)."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

_threads = threading.local()


@lru_cache(maxsize=1)
def reading() -> Any:
    """The CPU stream that reads, so that the next layer is read while this one is quantized."""
    import mlx.core as mx

    return mx.new_stream(mx.cpu)


def of_thread() -> Any:
    """A CPU stream of the calling thread's own, made once for it."""
    import mlx.core as mx

    if not hasattr(_threads, "stream"):
        _threads.stream = mx.new_stream(mx.cpu)
    return _threads.stream


@lru_cache(maxsize=1)
def working() -> tuple[Any, ...]:
    """Where work that can be split is done: two CPU streams, or the GPU's one."""
    import mlx.core as mx

    if mx.default_device() == mx.gpu:
        return (mx.default_stream(mx.gpu),)
    return (mx.new_stream(mx.cpu), mx.new_stream(mx.cpu))
