"""Ctrl-C, `kill` and a closed terminal end a command within seconds, whatever it computes.

Python runs a signal's handler between two of its own instructions, and one evaluation of MLX may
take minutes. So a thread hears of signals too. Where the main thread doesn't meet one in time, this
thread deletes the temporary folders and ends the process as a kill would, which all commands
survive: files are written whole or not at all, and begun work is resumed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from .scratch import discard_open

EXIT_CODE = 130
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 1.5  # seconds in which the main thread may meet a signal
UNWINDING = 5.0  # seconds in which it may then end: threads finish their pieces
SHOW_CURSOR = "\r\x1b[K\x1b[?25h"  # a bar of progress hides it

_met = threading.Event()
_results_remain = threading.Event()
_keeps_results = False


def interrupt(number: int, frame: FrameType | None) -> None:
    """A signal's handler: an interruption is an exception, which deletes temporary files."""
    _met.set()
    raise KeyboardInterrupt


@contextmanager
def keeping_results() -> Iterator[None]:
    """From the first `have_results` on, let the main thread take its time for the first signal.

    A second one ends the process in any case.
    """
    global _keeps_results
    _keeps_results = True
    try:
        yield
    finally:
        _keeps_results = False
        _results_remain.clear()


def have_results() -> None:
    """What was computed so far is worth printing, where a command prints it (`keeping_results`)."""
    if _keeps_results:
        _results_remain.set()


def watch(sentence: Callable[[], str]) -> None:
    """Start the thread that ends this process where the main thread can't; from the main thread.

    Args:
        sentence: gives what is said last, after `error: `.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, sentence), daemon=True).start()


def _watch(reader: int, sentence: Callable[[], str]) -> None:
    """Wait for signals, and for the main thread to meet each of them."""
    waited = False
    while number := os.read(reader, 1):
        if number[0] not in STOPS:
            continue
        if not _met.wait(GRACE):
            if waited or not _results_remain.is_set():
                _end(sentence())
            waited = True
            _say("note: the results so far come after this step; another Ctrl-C ends at once")
        elif not _results_remain.is_set():
            time.sleep(UNWINDING)  # as a rule the process ends meanwhile
            _end(sentence())
        _met.clear()


def _end(sentence: str) -> None:
    """Delete temporary folders and end the process: nothing of Python's runs any more."""
    try:
        discard_open()
    finally:
        _say(f"error: {sentence}")
        os._exit(EXIT_CODE)


def _say(line: str) -> None:
    """A line on stderr that waits for no lock: the main thread may hold that of the stream."""
    start = SHOW_CURSOR if sys.stderr.isatty() else ""
    os.write(2, f"{start}{line}\n".encode(errors="replace"))
