"""What a shell does to the command: closed streams, limits, a folder that is gone, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = f"{sys.executable} -m mint_mlx recipes"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (f"exec {COMMAND} >&-", "standard output is closed"),
        (f"mkdir gone; cd gone; rmdir ../gone; exec {COMMAND}", "does not exist any more"),
        pytest.param(
            f"ulimit -v 1300000; exec {COMMAND}",
            "ulimit -v",
            marks=pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such limit"),
        ),
    ],
)
def test_what_makes_work_impossible_is_one_sentence(
    script: str, words: str, tmp_path: Path
) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(
        ["sh", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1, ran.stderr
    assert ran.stderr.startswith("error: ")
    assert words in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """Else messages would be written into the next file that is opened."""
    script = (
        "import os\nfrom mint_mlx.__main__ import _open_streams\n_open_streams()\n"
        "print(os.open('x', os.O_CREAT))"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, script]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert int(ran.stdout) > 2


# Says when the module is there, then waits as a slow import would. Tests that run in the background
# of a script ignore Ctrl-C, and their processes inherit that.
WAITING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from mint_mlx import __main__
class Slow:
    def find_spec(self, name, *more):
        if name == "mint_mlx.cli":
            print("ready", flush=True)
            import time
            time.sleep(20)
sys.meta_path.insert(0, Slow())
__main__.start()
"""


def test_ctrl_c_while_it_imports_is_one_line(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", WAITING]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert (process.returncode, err) == (130, "error: interrupted\n")
    assert time.monotonic() - started < 10
