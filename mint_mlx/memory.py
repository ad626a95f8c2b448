"""Which Mac a checkpoint fits: the memory that macOS lets the GPU use, less room for the cache and the system.

macOS lets the GPU wire about two thirds of the memory of a Mac with up to 32 GiB, and three quarters of larger ones
(`max_recommended_working_set_size`).
"""

from __future__ import annotations

from .units import UNITS

GIB = UNITS["GiB"]
MAC_SIZES = (8, 16, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)  # GiB, as sold
RESERVE = 3 * GIB // 2  # key-value cache of a few thousand tokens, activations, buffers


def gpu_limit(memory: int) -> int:
    """Bytes that the GPU may use on a Mac of so many bytes."""
    return memory * 2 // 3 if memory <= 32 * GIB else memory * 3 // 4


def smallest_mac(model_bytes: int) -> int | None:
    """The memory in GiB of the smallest Mac that runs a model of so many bytes, or None."""
    return next((size for size in MAC_SIZES if gpu_limit(size * GIB) >= model_bytes + RESERVE), None)


def machine_memory() -> int:
    """Bytes of memory of this machine."""
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fits_here(model_bytes: int) -> bool:
    """Whether a model of so many bytes can be run on this machine."""
    import mlx.core as mx

    limit = mx.device_info().get("max_recommended_working_set_size") if mx.metal.is_available() else None
    return model_bytes + RESERVE // 2 <= int(limit or machine_memory() * 0.7)
