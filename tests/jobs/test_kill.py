"""Killed at any point and started again, a conversion ends in the same bytes as undisturbed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import Maker, qwen3_moe

POINTS = 20

# Counts every call that changes the disk, in whichever thread, and kills the process before number
# `argv[3]`.
KILLED = """
import os, signal, sys, threading
calls, last, lock = 0, int(sys.argv[3]), threading.Lock()

def counted(function):
    def call(*args, **more):
        global calls
        with lock:
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **more)
    return call

def audit(event, args):
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wa+x"):
        counted(lambda: None)()

from mint_mlx.base.blas import use_fast_blas
use_fast_blas()
import mint_mlx.jobs.convert
from mint_mlx.converters.quantizers import distil, learn_block
from mint_mlx.rules import efforts
efforts.TOKENS = 512
learn_block.STEPS, learn_block.TOKENS = 2, 256
distil.STEPS, distil.TOKENS = 2, 256
for name in ("pwrite", "fsync", "ftruncate", "replace", "rename", "unlink", "mkdir"):
    setattr(os, name, counted(getattr(os, name)))
sys.addaudithook(audit)
convert = mint_mlx.jobs.convert.convert
convert(sys.argv[1], "5bpw", sys.argv[2], smoke=False, effort=sys.argv[4], force=True)
print(calls)
"""


def run(folder: Path, out: Path, point: int, effort: str) -> subprocess.CompletedProcess[str]:
    """Convert in a process with a cache for `out`, killed before its change number `point`."""
    command = [sys.executable, "-c", KILLED, str(folder), str(out), str(point), effort]
    env = os.environ | {"MINT_MLX_CACHE": str(out.with_name(f"cache-{out.name}"))}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=env)


def weights(folder: Path) -> dict[str, bytes]:
    names = ("model*.safetensors", "config.json", "mint-plan.yaml", "*.index.json")
    return {file.name: file.read_bytes() for name in names for file in folder.glob(name)}


def check(folder: Path, tmp_path: Path, points: int, effort: str) -> None:
    whole = run(folder, tmp_path / "whole", 0, effort)
    assert whole.returncode == 0, whole.stderr
    calls = int(whole.stdout)
    assert calls > 30

    rng = random.Random(effort)
    for point in sorted(rng.sample(range(1, calls + 1), points)):
        out = tmp_path / f"out{point}"
        killed = run(folder, out, point, effort)
        assert killed.returncode == -9, killed.stderr
        if out.exists():  # then it has all of it
            assert weights(out) == weights(tmp_path / "whole")
        again = run(folder, out, 0, effort)
        assert again.returncode == 0, (point, again.stderr)
        assert weights(out) == weights(tmp_path / "whole"), point
        assert not list(tmp_path.glob(f"out{point}.*"))


def test_killed_at_a_random_point_it_goes_on(make: Maker, tmp_path: Path) -> None:
    check(make(qwen3_moe(2), shards=2), tmp_path, 2, "fast")


@pytest.mark.slow
@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
def test_killed_at_twenty_random_points_it_goes_on(
    make: Maker, tmp_path: Path, effort: str
) -> None:
    check(make(qwen3_moe(2), shards=2), tmp_path, POINTS, effort)
