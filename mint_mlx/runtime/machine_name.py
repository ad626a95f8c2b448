"""What people call the machine that MLX computes on."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import mlx.core as mx

from .device import on_cpu


def machine_name() -> str:
    """The chip that MLX computes on, such as `Apple M4 Pro` or `2 cores of AMD EPYC`."""
    if not on_cpu():
        return str(mx.device_info().get("device_name", "an unknown GPU"))
    return f"{os.cpu_count()} cores of {cpu_name()}"


def cpu_name() -> str:
    """The processor's name, on Linux or a Mac."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout.strip()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown")
