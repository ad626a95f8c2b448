"""Limits on cases with strange input: one that hangs, dies or takes much memory is a failure.

A short run has its cases in the tests' own process, with an alarm. A long one has them in child
processes, which are watched: there a native death is seen, and a hang outside of Python.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 30  # more than any case takes
MEMORY = 2_000_000_000  # bytes that a child may have; that the tests' own process may grow by
START = 300  # seconds until a child has made what its cases need

# How a child is told its cases, and where it writes how they ended.
CASES, ENDS = "MINT_MLX_TEST_CASES", "MINT_MLX_TEST_ENDS"


@contextmanager
def limited() -> Iterator[None]:
    """Raise a TimeoutError in a case that hangs."""

    def late(*_: object) -> None:
        raise TimeoutError("this case hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(2 * SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_cases(check: Callable[[int], str], count: int) -> list[str]:
    """The ends of the first cases; in a child, of those that it was told.

    Args:
        check: gives the end of a case; an AssertionError says what it should not have done.
        count: how many.
    """
    first, stop = map(int, os.environ.get(CASES, f"0-{count}").split("-"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ends, failures = [], []
    for number in range(first, stop):
        _note(f"{number}: ")
        try:
            end = check(number)
        except AssertionError as error:
            end = f"FAILED {error}"
            failures.append(end)
        _note(f"{' '.join(end.split())}\n")
        ends.append(end)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert not failures, "\n".join(failures)
    assert grown * 1024 < MEMORY
    return ends


def in_child() -> bool:
    """Whether this process runs cases for another."""
    return CASES in os.environ


def _note(text: str) -> None:
    """Tell the watching process, if there is one."""
    if in_child():
        with Path(os.environ[ENDS]).open("a") as file:
            file.write(text)


def run_in_child(test: str, cases: range, folder: Path) -> list[str]:
    """Run cases of a test in a process of its own.

    Args:
        test: its file and name, as pytest takes them.
        cases: their numbers.
        folder: for all files.

    Returns:
        How each case ended.

    Raises:
        AssertionError: naming the case at which the process died, hung or grew too large, or those
            that ended in a failure.
    """
    ends = folder / "ends"
    ends.touch()
    env = os.environ | {CASES: f"{cases.start}-{cases.stop}", ENDS: str(ends)}
    words = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", test]
    with (
        (folder / "said").open("w") as said,
        subprocess.Popen(
            [*words, f"--basetemp={folder / 'child'}"],
            env=env,
            stdout=said,
            stderr=said,
            start_new_session=True,
        ) as process,
    ):
        try:
            fault = _watch(process, ends)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    text = ends.read_text()
    failed = [line for line in text.splitlines() if "FAILED" in line]
    code = process.returncode
    words_of_child = (folder / "said").read_text()[-3000:] if code or fault else ""
    assert not fault and not code, (fault or code, failed, text[-200:], words_of_child)
    return [line.partition(": ")[2] for line in text.splitlines()]


def _watch(process: subprocess.Popen[bytes], ends: Path) -> str:
    """Wait for a child; returns why it has to be stopped, '' once it has ended."""
    size, until = 0, time.monotonic() + START
    while process.poll() is None:
        if ends.stat().st_size != size:
            size, until = ends.stat().st_size, time.monotonic() + SECONDS
        if time.monotonic() > until:
            return "it hangs"
        if _resident(process.pid) > MEMORY:
            return "it takes too much memory"
        time.sleep(0.05)
    return ""


def _resident(pid: int) -> int:
    """Bytes of memory that a process has (on Linux; 0 elsewhere)."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * resource.getpagesize()
