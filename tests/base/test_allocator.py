"""Freed memory is kept where the C library can do that."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_used_again() -> None:
    """An array of 16 MB faults in its 4,096 pages once, not at each use."""
    script = (
        "import resource, sys, numpy as np\n"
        "from mint_mlx.base.allocator import reuse_freed_memory\n"
        "assert reuse_freed_memory()\n"
        "for _ in range(20):\n"
        "    np.ones(1 << 22, dtype=np.float32)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert int(result.stdout) < 10 * 4096
