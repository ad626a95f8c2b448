"""MLX's streams: one that reads the disk, and those that compute side by side (a CPU stream is one thread)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def reading() -> Any:
    """The CPU stream that reads, so that the next layer is read while this one is quantized."""
    import mlx.core as mx

    return mx.new_stream(mx.cpu)


@lru_cache(maxsize=1)
def working() -> tuple[Any, ...]:
    """Where work that can be split is done: two CPU streams, or the GPU's one."""
    import mlx.core as mx

    if mx.default_device() == mx.gpu:
        return (mx.default_stream(mx.gpu),)
    return (mx.new_stream(mx.cpu), mx.new_stream(mx.cpu))
