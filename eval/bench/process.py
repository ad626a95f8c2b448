"""Runs a command and says how long it took and how much memory it held at most."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """One finished process: wall seconds, the peak of its resident memory in bytes, whether it was
    cut short.
    """

    seconds: float
    peak: int
    stopped: bool = False


def run(command: list[str], log: Path, cache: Path, limit: float = 3600) -> Run:
    """Run a command to its end or for `limit` seconds, its output in a log.

    Raises:
        SystemExit: it failed; the end of the log says why.
    """
    with log.open("wb") as out:
        started = time.monotonic()
        environment = os.environ | {"MINT_MLX_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        timer = threading.Timer(limit, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        seconds = time.monotonic() - started
    stopped = status != 0 and seconds >= limit
    if status and not stopped:
        tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        sys.exit(f"error: {' '.join(command)} failed:\n{tail}")
    return Run(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), stopped)


def python(*arguments: str) -> list[str]:
    """A command that this interpreter runs."""
    return [sys.executable, *arguments]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import platform
    from datetime import date
    from importlib.metadata import version

    from ...base.blas import use_fast_blas

    blas = use_fast_blas()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9),
        "blas": str(blas) if blas else "MLX's own",
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        told = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"],
            capture_output=True,
            text=True,
            check=False,
        )
        return told.stdout.strip()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        "unknown",
    )


def last_json(log: Path) -> Any:
    """The JSON object in the last line of a log."""
    return json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
