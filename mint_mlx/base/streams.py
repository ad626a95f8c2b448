"""MLX's streams: one that reads the disk, and those that compute in parallel.

A CPU stream is one thread. MLX binds a stream to the thread that made it, so each of a program's
threads has streams of its own.
"""

from __future__ import annotations

import threading
from typing import Any

_local = threading.local()


def reading() -> Any:
    """The CPU stream that reads the next layer from the disk while this one is quantized."""
    import mlx.core as mx

    if not hasattr(_local, "reading"):
        _local.reading = mx.new_stream(mx.cpu)
    return _local.reading


def working() -> tuple[Any, ...]:
    """The streams that share work that can be split: two CPU streams, or the GPU's one."""
    import mlx.core as mx

    if mx.default_device() == mx.gpu:
        return (mx.default_stream(mx.gpu),)
    if not hasattr(_local, "working"):
        _local.working = (mx.new_stream(mx.cpu), mx.new_stream(mx.cpu))
    return tuple(_local.working)
