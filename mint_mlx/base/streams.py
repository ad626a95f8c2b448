"""MLX's streams: one that reads the disk, and those that compute side by side (a CPU stream is one
thread).

MLX binds a stream to the thread that made it, so each of a program's threads has its own.
"""

from __future__ import annotations

import threading
from typing import Any

_own = threading.local()


def reading() -> Any:
    """The CPU stream that reads, so that the next layer is read while this one is quantized."""
    import mlx.core as mx

    if not hasattr(_own, "reading"):
        _own.reading = mx.new_stream(mx.cpu)
    return _own.reading


def working() -> tuple[Any, ...]:
    """Where work that can be split is done: two CPU streams, or the GPU's one."""
    import mlx.core as mx

    if mx.default_device() == mx.gpu:
        return (mx.default_stream(mx.gpu),)
    if not hasattr(_own, "working"):
        _own.working = (mx.new_stream(mx.cpu), mx.new_stream(mx.cpu))
    return tuple(_own.working)
