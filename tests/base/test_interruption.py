"""Ctrl-C and `kill` end a command soon while something computes that Python can't interrupt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import WRITES, make_inputs

from mint_mlx.base import interruption

# An evaluation of minutes, beside a temporary folder; nobody is told of it before it has begun.
COMPUTING = """
import mlx.core as mx
from mint_mlx.base import interruption
from mint_mlx.base.remove import Kind
from mint_mlx.base.scratch import scratch_folder
import signal, sys, threading, time
for stop in interruption.STOPS:
    signal.signal(stop, interruption.interrupt)
interruption.GRACE = 0.2
interruption.watch(lambda: "ended")
x = mx.full((1024, 1024), 1 / 1024)
for _ in range(20_000):
    x = x @ x
with scratch_folder(Kind("a test", ("*",))) as folder:
    (folder / "file").write_text("")
    threading.Timer(0.5, lambda: print("ready", flush=True)).start()
    mx.eval(x)
"""

# Runs a command whose first evaluation never ends, nor returns to Python for a signal.
STUCK = """
import ctypes, os, signal, sys
stop = int(sys.argv.pop(1))
signal.signal(signal.SIGINT, signal.default_int_handler)
from mint_mlx.base import interruption
interruption.GRACE = 0.2
from mint_mlx.base.blas import use_fast_blas
use_fast_blas()
import mlx.core as mx
def stuck(*_):
    signal.siginterrupt(stop, False)
    print("ready", file=sys.stderr, flush=True)
    ctypes.CDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
mx.eval = stuck
from mint_mlx.__main__ import start
start()
"""


def stopped(command: list[str], stop: int, folder: Path) -> tuple[int, str]:
    """Run a command until it says `ready`, send it a signal, and return its exit code and words."""
    (folder / "tmp").mkdir(parents=True)
    env = os.environ | {"TMPDIR": str(folder / "tmp")}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder, env=env, **output) as process:  # type: ignore[call-overload]
        words = ""
        for line in process.stdout:
            words += line
            if line == "ready\n":
                process.send_signal(stop)
    return process.returncode, words


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_evaluation_of_minutes_ends_and_leaves_nothing(stop: int, tmp_path: Path) -> None:
    code, words = stopped([sys.executable, "-c", COMPUTING], stop, tmp_path / "run")
    assert (code, words) == (130, "ready\nerror: ended\n")
    assert not list((tmp_path / "run" / "tmp").iterdir())


MORE = {
    "check": ("../made", "--source", "../model"),
    "report": ("../made", "--source", "../model"),
    "speed": ("../made",),
}
EVALUATING = ("convert fast", "convert balanced", "convert best", "refine", "eval", "compare")
COMMANDS = MORE | {name: WRITES[name][0] for name in EVALUATING}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_computes_ends(name: str, tmp_path: Path) -> None:
    make_inputs(tmp_path)
    stop = signal.SIGTERM
    command = [sys.executable, "-c", STUCK, str(int(stop)), name.split()[0], *COMMANDS[name]]
    code, words = stopped(command, stop, tmp_path / "run")
    assert code == 130, words
    assert words.splitlines()[-1].startswith("error: interrupted"), words
    assert "Traceback" not in words
    assert not list((tmp_path / "run" / "tmp").glob("mint-mlx-[0-9]*"))


def test_results_so_far_are_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def end(sentence: str) -> None:
        said.append(sentence)
        raise SystemExit

    monkeypatch.setattr(interruption, "GRACE", 0)
    monkeypatch.setattr(interruption, "_say", said.append)
    monkeypatch.setattr(interruption, "_end", end)
    reader, writer = os.pipe()

    def meet(*signals: int) -> list[str]:
        said.clear()
        os.write(writer, bytes(signals))
        with pytest.raises(SystemExit):
            interruption._watch(reader, lambda: "ended")
        return said

    # A second signal ends the process; other signals are none of this thread's business.
    with interruption.keeping_results():
        assert meet(signal.SIGUSR1, signal.SIGINT) == ["ended"]
        interruption.have_results()
        note, ended = meet(signal.SIGINT, signal.SIGTERM)
        assert note.startswith("note: the results so far come")
        assert ended == "ended"

    # Only a command that prints results is waited for.
    interruption.have_results()
    assert meet(signal.SIGINT) == ["ended"]
