"""A fast BLAS on Linux: MLX's wheel bundles the reference one, but one that is opened globally
before takes its place.

Call `use_fast_blas` before anything imports `mlx.core`. It is never required: everything runs
without, only slower."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path

CANDIDATES = ("libmkl_rt.so.3", "libmkl_rt.so.2", "libopenblas.so.0", "libopenblas.so")
# 2**4 cycles that OpenBLAS's threads wait awake for work, its smallest; 2**26 keep a core from MLX
SPIN = "4"
ADVICE = (
    "install one with `apt install libopenblas0` (or `pip install mkl`) to evaluate about 30 "
    "times faster"
)


@lru_cache(maxsize=1)
def use_fast_blas() -> str | None:
    """Open the system's MKL or OpenBLAS for MLX; returns its name, or None where there is none (or
    on a Mac).

    MLX resolves its BLAS symbols when it is first imported, so a call after that finds nothing to
    do."""
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return None
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", SPIN)
    folders = ["", *(f"{Path(p).parent.parent}/" for p in sys.path if p.endswith("site-packages"))]
    for name in CANDIDATES:
        for folder in folders:
            try:
                ctypes.CDLL(folder + name, mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            return name.split(".")[0]
    return None
