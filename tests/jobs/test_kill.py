"""Killed at any point and started again, a command ends in the same bytes as undisturbed."""

from __future__ import annotations

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

import pytest
from commands import SHORT, WRITES, make_inputs, outcome
from helpers import Maker, qwen3_moe

from mint_mlx.jobs.convert import convert

POINTS = int(os.environ.get("KILLS", "20"))  # of each command

# Counts every call that changes the disk, in whichever thread, and stops the process before number
# `argv[3]` with the signal `argv[4]`. Of several ranks the one that COUNTING names counts, and
# STOPPED is the name of the file with the number of the process that is stopped: a rank's, or the
# launcher's.
COUNTED = """
import os, signal, sys, threading
calls, last, signal_number, lock = 0, int(sys.argv[3]), int(sys.argv[4]), threading.Lock()
rank, stopped = os.environ.get("MLX_RANK"), os.environ.get("STOPPED")
if rank:
    open(f"{os.path.dirname(stopped)}/rank {rank}", "w").write(str(os.getpid()))
# In the background of a script, or under nohup, tests inherit that these are ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

def counted(function):
    def call(*args, **more):
        global calls
        with lock:
            calls += 1
            if calls == last and rank == os.environ.get("COUNTING"):
                number = int(open(stopped).read()) if stopped else os.getpid()
                if stopped:
                    os.close(os.open(f"{stopped} was stopped", os.O_CREAT))
                os.kill(number, signal_number)
        return function(*args, **more)
    return call

def audit(event, args):
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wa+x"):
        counted(lambda: None)()

for name in ("pwrite", "fsync", "ftruncate", "replace", "rename", "unlink", "mkdir"):
    setattr(os, name, counted(getattr(os, name)))
sys.addaudithook(audit)
"""
KILLED = f"""{SHORT}
import mint_mlx.jobs.convert
{COUNTED}
convert = mint_mlx.jobs.convert.convert
convert(sys.argv[1], "5bpw", sys.argv[2], smoke=False, effort=sys.argv[5], force=True)
print(calls)
"""
COMMAND = f"""{SHORT}
import mint_mlx.jobs.convert
{COUNTED}
import atexit
from mint_mlx.cli.main import main
atexit.register(lambda: print(f"changes of {{rank}}: {{calls}}", file=sys.stderr))
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


def test_killed_at_a_random_point_it_goes_on(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        monkeypatch.setenv("MINT_MLX_CACHE", str(tmp_path / f"cache-{out.name}"))
        convert(str(folder), "5bpw", out, smoke=False, effort=effort, force=True)
        assert weights(out) == weights(tmp_path / "whole"), point
        assert not list(tmp_path.glob(f"out{point}.*"))


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


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITES)
def test_every_command_ends_as_undisturbed_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("MINT_MLX_CACHE", str(tmp_path / "made-cache"))
    make_inputs(tmp_path)
    whole = run_command(name, tmp_path / "whole", 0, 9)
    assert whole.returncode == 0, whole.stderr
    expected = outcome(name, tmp_path / "whole", tmp_path / "whole" / "cache")
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
        assert outcome(name, place, place / "cache") == expected, (point, stop)

        names = {path.name for path in place.iterdir()} - {"cache", "tmp"}
        names -= {Path(file).parts[0] for file in WRITES[name][1]}
        names |= {path.name for path in (place / "tmp").glob("mint-mlx-*")}
        assert not names, (point, stop, names)


def run_ranks(
    source: Path, out: Path, effort: str, counting: int, stopped: str, point: int, stop: int
) -> str:
    """Convert with two ranks; one process is stopped before the change number `point` of a rank.

    Args:
        source: a checkpoint.
        out: the output, in a folder with a cache and temporary files of its own.
        effort: the level.
        counting: the rank that counts its changes.
        stopped: the process: `rank 0`, `rank 1` or `launcher`.
        point: the change, 0 for none.
        stop: the signal.

    Returns:
        The numbers of changes and what else the ranks said on stderr.
    """
    place = out.with_name("processes")
    place.mkdir(exist_ok=True)
    out.with_name("tmp").mkdir(exist_ok=True)
    script = place / "script.py"
    script.write_text(COMMAND)
    port = str(random.randrange(20_000, 60_000))
    words = [str(Path(sys.executable).parent / "mlx.launch"), "-n", "2", "--backend", "ring"]
    words += ["-p", port, "--env", f"MINT_MLX_CACHE={out.with_name('cache')}"]
    words += ["--env", f"COUNTING={counting}", "--env", f"STOPPED={place / stopped}"]
    words += ["--env", f"TMPDIR={out.with_name('tmp')}", "--", sys.executable, str(script)]
    words += ["-", "-", str(point), str(stop), "convert", str(source), "--budget", "5bpw"]
    words += ["--no-smoke", "--effort", effort, "--force", "-o", str(out)]
    line = f"echo $$ > {shlex.quote(str(place / 'launcher'))}; exec {shlex.join(words)}"
    with (place / "said").open("w+") as said:  # a pipe would stay open in ranks that go on
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
@pytest.mark.parametrize("effort", ["fast", "balanced"])  # `best` is for one machine
@pytest.mark.parametrize("stopped", ["rank 0", "rank 1", "launcher"])
def test_two_ranks_end_as_undisturbed_after_a_kill_of_one(
    make: Maker, tmp_path: Path, stopped: str, effort: str
) -> None:
    source = make(qwen3_moe(2), shards=2)
    (tmp_path / "whole").mkdir()
    counting = int(stopped == "rank 1")
    said = run_ranks(source, tmp_path / "whole" / "out", effort, counting, stopped, 0, 9)
    expected = weights(tmp_path / "whole" / "out")
    counts = dict(map(str.split, re.findall(r"changes of (.*)", said)))
    calls = int(counts[f"{counting}:"])

    rng = random.Random(stopped)
    for i in range(POINTS // 2):
        point, stop, out = rng.randint(1, calls), SIGNALS[i % len(SIGNALS)], tmp_path / f"{i}/out"
        out.parent.mkdir()
        said = run_ranks(source, out, effort, counting, stopped, point, stop)
        assert (tmp_path / f"{i}/processes/{stopped} was stopped").exists(), (point, stop, said)
        assert not out.exists() or weights(out) == expected, (point, stop, said)
        said = run_ranks(source, out, effort, counting, stopped, 0, 9)
        assert weights(out) == expected, (point, stop, said)
        names = {path.name for path in out.parent.iterdir()}
        assert names == {"out", "cache", "processes", "tmp"}, (point, stop)
        assert not list(out.with_name("tmp").glob("mint-mlx-*")), (point, stop)
