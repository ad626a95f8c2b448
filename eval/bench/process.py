"""Runs a command and measures its time and its highest memory."""

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
    """One finished process.

    Attributes:
        seconds: of wall time.
        peak: of its resident memory, in bytes.
        stopped: whether it was stopped at its limit.
    """

    seconds: float
    peak: int
    stopped: bool = False


def run(command: list[str], log: Path, cache: Path, limit: float = 3600) -> Run:
    """Run a command to its end or for `limit` seconds.

    Args:
        command: the program and its arguments.
        log: the file that its output goes to.
        cache: mint-mlx's cache for it.
        limit: seconds after which it is stopped.

    Raises:
        SystemExit: it failed; the end of the log says why.
    """
    environment = os.environ | {"MINT_MLX_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    # Modules are compiled once, as those of an installed package are.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with log.open("wb") as out:
        started = time.monotonic()
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

    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, usage.ru_maxrss * unit, stopped)


def python(*arguments: str | Path) -> list[str]:
    """The command line of this interpreter with these arguments."""
    return [sys.executable, *map(str, arguments)]


def of_tree(tree: Path, command: list[str]) -> list[str]:
    """A command of `python` with the version in a folder, wherever it is started (-P)."""
    return ["env", f"PYTHONPATH={tree.absolute()}", command[0], "-P", *command[1:]]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import platform
    from datetime import date
    from importlib.metadata import version

    from ...base.blas import use_fast_blas

    blas = use_fast_blas()
    from ...runtime.machine_name import cpu_name

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9),
        "blas": str(blas) if blas else "MLX's own",
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
    }


def last_json(log: Path) -> Any:
    """The JSON object in the last line of a log."""
    return json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
