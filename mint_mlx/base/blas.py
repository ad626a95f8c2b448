"""Opens a fast BLAS for MLX on Linux, where MLX's wheel bundles the slow reference one.

A BLAS that is opened globally before MLX is imported takes the place of the bundled one: call
`use_fast_blas` before anything imports `mlx.core`. It is optional: without it everything runs,
only slower.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from functools import lru_cache
from pathlib import Path

CANDIDATES = ("libmkl_rt.so.3", "libmkl_rt.so.2", "libopenblas.so.0", "libopenblas.so")
# OpenBLAS's threads wait 2**4 cycles for work, the least it allows; its default of 2**26 would
# keep a core from MLX's own threads.
THREAD_TIMEOUT = "4"
ADVICE = (
    "install one with `apt install libopenblas0` (or `pip install mkl`) to evaluate about 30 "
    "times faster"
)
LATE = (
    "MLX was imported before mint_mlx, so no fast BLAS could be opened for it: put `from mint_mlx "
    "import convert` (or another of its functions) above `import mlx`"
)


@lru_cache(maxsize=1)
def use_fast_blas() -> str | None:
    """Open the system's MKL or OpenBLAS for MLX.

    MLX resolves its BLAS symbols when it is first imported, so a later call only warns.

    Returns:
        The name of the library, or None where there is none (and on a Mac, which needs none).
    """
    if sys.platform != "linux":
        return None
    if "mlx.core" in sys.modules:
        warnings.warn(LATE, RuntimeWarning, stacklevel=3)
        return None
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", THREAD_TIMEOUT)

    # '' is the system's own search path; pip puts MKL into the lib folder of the environment.
    folders = ["", *(f"{Path(p).parent.parent}/" for p in sys.path if p.endswith("site-packages"))]
    for name in CANDIDATES:
        for folder in folders:
            try:
                ctypes.CDLL(folder + name, mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            return name.split(".")[0]
    return None
