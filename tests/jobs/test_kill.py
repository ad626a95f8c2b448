"""Killed at any point and started again, a command ends in the same bytes as undisturbed."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import Maker, qwen3_moe

from mint_mlx.base.array_files import read_arrays
from mint_mlx.jobs.convert import convert

POINTS = int(os.environ.get("KILLS", "20"))  # of each command

# Counts every call that changes the disk, in whichever thread, and stops the process (or STOPPED,
# the launcher of several ranks) before number `argv[3]` with the signal `argv[4]`; of several ranks
# only the one that KILLED_RANK names.
COUNTED = """
import os, signal, sys, threading
calls, last, signal_number, lock = 0, int(sys.argv[3]), int(sys.argv[4]), threading.Lock()
# In the background of a script, or under nohup, tests inherit that these are ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

def counted(function):
    def call(*args, **more):
        global calls
        with lock:
            calls += 1
            if calls == last and os.environ.get("MLX_RANK") == os.environ.get("KILLED_RANK"):
                os.write(2, b"stopped. ")
                os.kill(int(os.environ.get("STOPPED") or os.getpid()), signal_number)
        return function(*args, **more)
    return call

def audit(event, args):
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wa+x"):
        counted(lambda: None)()

from mint_mlx.base.blas import use_fast_blas
use_fast_blas()
import mint_mlx.jobs.convert
from mint_mlx.measure import self_text
from mint_mlx.converters.quantizers import distil, learn_block
from mint_mlx.rules import efforts
efforts.TOKENS = 512
learn_block.STEPS, learn_block.TOKENS = 2, 256
distil.STEPS, distil.TOKENS = 2, 256
self_text.LENGTH = 64
for name in ("pwrite", "fsync", "ftruncate", "replace", "rename", "unlink", "mkdir"):
    setattr(os, name, counted(getattr(os, name)))
sys.addaudithook(audit)
"""
KILLED = f"""{COUNTED}
convert = mint_mlx.jobs.convert.convert
convert(sys.argv[1], "5bpw", sys.argv[2], smoke=False, effort=sys.argv[5], force=True)
print(calls)
"""
COMMAND = f"""{COUNTED}
import atexit
from mint_mlx.cli.main import main
atexit.register(lambda: print("changes:", calls, file=sys.stderr))
sys.argv[1:] = sys.argv[5:]
main()
"""


def run(folder: Path, out: Path, point: int, effort: str) -> subprocess.CompletedProcess[str]:
    """Convert in a process with a cache for `out`, killed before its change number `point`."""
    kill = str(int(signal.SIGKILL))
    command = [sys.executable, "-c", KILLED, str(folder), str(out), str(point), kill, effort]
    env = os.environ | {"MINT_MLX_CACHE": str(out.with_name(f"cache-{out.name}"))}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=env)


def weights(folder: Path) -> dict[str, bytes]:
    names = ("model*.safetensors", "config.json", "mint-plan.yaml", "*.index.json")
    return {file.name: file.read_bytes() for name in names for file in folder.glob(name)}


def test_killed_at_a_random_point_it_goes_on(make: Maker, tmp_path: Path) -> None:
    folder, effort = make(qwen3_moe(2), shards=2), "fast"
    whole = run(folder, tmp_path / "whole", 0, effort)
    assert whole.returncode == 0, whole.stderr
    calls = int(whole.stdout)
    assert calls > 30

    rng = random.Random(effort)
    for point in sorted(rng.sample(range(1, calls + 1), 2)):
        out = tmp_path / f"out{point}"
        killed = run(folder, out, point, effort)
        assert killed.returncode == -9, killed.stderr
        if out.exists():  # then it has all of it
            assert weights(out) == weights(tmp_path / "whole")
        again = run(folder, out, 0, effort)
        assert again.returncode == 0, (point, again.stderr)
        assert weights(out) == weights(tmp_path / "whole"), point
        assert not list(tmp_path.glob(f"out{point}.*"))


TEXT = ("--text", "../t.txt", "--length", "32", "--windows", "2")

# The words of each command, run in a folder of its own, and the files there that count.
WEIGHTS = ("out/model.safetensors", "out/config.json", "out/mint-plan.yaml")
CONVERT = ("../model", "--budget", "5bpw", "-o", "out", "--force", "--no-smoke", "--effort")
WRITES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "convert fast": ((*CONVERT, "fast"), WEIGHTS),
    "convert balanced": ((*CONVERT, "balanced"), WEIGHTS),
    "convert best": ((*CONVERT, "best"), WEIGHTS),
    "profile": (("-o", "p.json", "../model"), ("p.json",)),
    "sensitivity": (("-o", "s.npz", "--tokens", "1024", "../model"), ("s.npz",)),
    "allocate": (
        ("../made/mint-profile.json", "--budget", "5bpw", "-o", "x.yaml", "--force"),
        ("x.yaml",),
    ),
    "refine": (
        ("../made", "--source", "../model", "-o", "r", "--force", "--steps", "40"),
        ("r/model.safetensors", "r/config.json"),
    ),
    "eval": (
        ("../made", "--source", "../model", "--save-reference", "e.safetensors", *TEXT),
        ("e.safetensors",),
    ),
    "compare": (
        ("../model", "--budget", "5bpw", "--methods", "fast,uniform-g64", "--no-speed", *TEXT),
        ("model-compare/results.json",),
    ),
    "cache": (("clear",), ()),
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run_command(name: str, folder: Path, point: int, stop: int) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder with a cache and temporary files of its own."""
    cache, temporary = folder / "cache", folder / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    if name == "cache" and not cache.exists():
        shutil.copytree(folder.parent / "made-cache", cache)
    words = [sys.executable, "-c", COMMAND, "-", "-", str(point), str(stop)]
    words += [name.split()[0], *WRITES[name][0]]
    env = os.environ | {"MINT_MLX_CACHE": str(cache), "TMPDIR": str(temporary)}
    return subprocess.run(words, check=False, capture_output=True, text=True, env=env, cwd=folder)


def outcome(name: str, folder: Path) -> Any:
    """What counts of a command's results, without measured times; the cache's files by name."""
    files: dict[str, Any] = {}
    for file in WRITES[name][1]:
        data = (folder / file).read_bytes()
        files[file] = _without_times(json.loads(data)) if name == "compare" else data
        if name == "eval":  # whose header has its entries in any order
            arrays, about = read_arrays(folder / file)
            files[file] = {n: a.tobytes() for n, a in arrays.items()}, about
    names = [str(path.relative_to(folder)) for path in (folder / "cache").rglob("*")]
    return files, sorted(names)


def _without_times(data: Any) -> Any:
    """JSON data without what differs from run to run."""
    if isinstance(data, dict):
        measured = ("second", "memory", "date", "machine")
        return {
            key: _without_times(value)
            for key, value in data.items()
            if not any(word in key for word in measured)
        }
    return [_without_times(value) for value in data] if isinstance(data, list) else data


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITES)
def test_every_command_ends_as_undisturbed_after_a_kill(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = make(qwen3_moe(2))
    monkeypatch.setenv("MINT_MLX_CACHE", str(tmp_path / "made-cache"))
    convert(str(folder), "5bpw", tmp_path / "made", smoke=False)
    (tmp_path / "t.txt").write_text("pack my box with five dozen jugs " * 20)
    whole = run_command(name, tmp_path / "whole", 0, 9)
    assert whole.returncode == 0, whole.stderr
    expected = outcome(name, tmp_path / "whole")
    calls = int(whole.stderr.split()[-1])

    rng = random.Random(name)
    for i in range(POINTS):
        point, stop, place = rng.randint(1, calls), SIGNALS[i % len(SIGNALS)], tmp_path / f"{i}"
        stopped = run_command(name, place, point, stop)
        assert stopped.returncode in (-stop, 130), (point, stop, stopped.stderr)
        if (place / "out").exists():  # then it has all of it
            assert weights(place / "out") == weights(tmp_path / "whole" / "out")
        again = run_command(name, place, 0, 9)
        assert again.returncode == 0, (point, stop, again.stderr)
        assert outcome(name, place) == expected, (point, stop)

        names = {path.name for path in place.iterdir()} - {"cache", "tmp"}
        names -= {Path(file).parts[0] for file in WRITES[name][1]}
        names |= {path.name for path in (place / "tmp").glob("mint-mlx-*")}
        assert not names, (point, stop, names)


def run_ranks(
    source: Path, out: Path, effort: str, rank: int, point: int, stop: int, launcher: bool = False
) -> str:
    """Convert with two ranks, one of which is stopped before its change number `point`.

    Args:
        source: a checkpoint.
        out: the output, in a folder with a cache and temporary files of its own.
        effort: the level.
        rank: that counts its changes.
        point: the change, 0 for none.
        stop: the signal.
        launcher: whether `mlx.launch` gets the signal in its place.

    Returns:
        The numbers of changes and what else the ranks said on stderr.
    """
    script = out.with_name("ranks.py")
    script.write_text(COMMAND)
    out.with_name("tmp").mkdir(exist_ok=True)
    port = str(random.randrange(20_000, 60_000))
    words = [str(Path(sys.executable).parent / "mlx.launch"), "-n", "2", "--backend", "ring"]
    words += ["-p", port, "--env", f"MINT_MLX_CACHE={out.with_name('cache')}"]
    words += ["--env", f"KILLED_RANK={rank}", "--env", f"TMPDIR={out.with_name('tmp')}"]
    line = shlex.join(words) + (" --env STOPPED=$$" if launcher else "")
    words = ["--", sys.executable, str(script), "-", "-", str(point), str(stop), "convert"]
    words += [str(source), "--budget", "5bpw", "--no-smoke", "--effort", effort, "--force"]
    line = f"exec {line} {shlex.join([*words, '-o', str(out)])}"
    with out.with_name("said").open("w+") as said:  # a pipe would stay open in ranks that go on
        subprocess.run(line, check=False, shell=True, stdout=said, stderr=said, timeout=240)
        _wait_for_ranks(script)
        said.seek(0)
        return said.read()


def _wait_for_ranks(script: Path) -> None:
    """Wait for ranks that go on without their launcher (Linux)."""
    until = time.monotonic() + 120
    while any(_runs(process, script) for process in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < until, "ranks go on"
        time.sleep(0.2)


def _runs(process: Path, script: Path) -> bool:
    """Whether a process of this machine runs a script."""
    try:
        return os.fsencode(script) in (process / "cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return False


@pytest.mark.slow
@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
@pytest.mark.parametrize("stopped", ["rank 0", "rank 1", "launcher"])
def test_two_ranks_end_as_undisturbed_after_a_kill_of_one(
    make: Maker, tmp_path: Path, stopped: str, effort: str
) -> None:
    source = make(qwen3_moe(2), shards=2)
    (tmp_path / "whole").mkdir()
    rank, launcher = int(stopped == "rank 1"), stopped == "launcher"
    said = run_ranks(source, tmp_path / "whole" / "out", effort, rank, 0, 9)
    expected = weights(tmp_path / "whole" / "out")
    calls = min(map(int, re.findall(r"changes: (\d+)", said)))

    rng = random.Random(f"{rank}{launcher}")
    for i in range(POINTS // 2):
        point, stop, out = rng.randint(1, calls), SIGNALS[i % len(SIGNALS)], tmp_path / f"{i}/out"
        out.parent.mkdir()
        said = run_ranks(source, out, effort, rank, point, stop, launcher)
        assert "stopped" in said, (point, stop, said)
        assert not out.exists() or weights(out) == expected, (point, stop, said)
        said = run_ranks(source, out, effort, rank, 0, 9)
        assert weights(out) == expected, (point, stop, said)
        names = {path.name for path in out.parent.iterdir()}
        assert names == {"out", "cache", "ranks.py", "said", "tmp"}, (point, stop)
        assert not list(out.with_name("tmp").glob("mint-mlx-*")), (point, stop)
