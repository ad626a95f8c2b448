"""Entry point of `mint-mlx`: runs a command and turns errors into one sentence and an exit code.

Nothing heavy is imported before a command runs, so that `--help` is instant.
"""

from __future__ import annotations

import signal
import sys
import warnings
from io import TextIOWrapper
from typing import Any

from ..base.checksum import DamagedFile
from ..base.distributed import launched
from ..base.errors import UsageError, explain
from ..base.interruption import EXIT_CODE, interrupt
from ..base.printable import printable
from .allocate import allocate
from .cache import cache_app
from .check import check
from .compare import compare
from .convert import convert
from .demo import demo
from .doctor import doctor
from .evaluate import evaluate
from .inspect import inspect
from .mlx_lm_words import own_words
from .options import app
from .profile import profile
from .recipes import recipes
from .refine import refine
from .report import report
from .sensitivity import sensitivity
from .speed import speed
from .sweep import sweep
from .upload import upload

COMMANDS = {  # as --help lists them
    "Everyday": (convert, upload, inspect, speed, doctor, recipes, demo),
    "Proof": (evaluate, compare, check, report),
    "Steps of a conversion, one by one": (profile, sensitivity, allocate, sweep, refine),
}

RESUMED = ("convert", "profile", "sensitivity", "compare")
ISSUES = "https://github.com/mint-mlx/mint-mlx/issues"


for panel, commands in COMMANDS.items():
    for command in commands:
        app.command("eval" if command is evaluate else None, rich_help_panel=panel)(command)
app.add_typer(cache_app, name="cache", rich_help_panel="Everyday")


def main() -> None:
    """Entry point: run a command and turn errors into one sentence and an exit code.

    Exit codes: 0 done, 1 refused or failed, 2 usage, 70 an exception that nobody foresaw, 130
    interrupted."""
    # A `kill` or a closed terminal is an interruption: temporary files are deleted. But a process
    # that a launcher ends may wait in MLX for a lost rank, where no handler of Python's runs; and
    # `nohup` lets a program ignore that its terminal is closed.
    for stop in (signal.SIGTERM, signal.SIGHUP):
        if not launched() and signal.getsignal(stop) is signal.SIG_DFL:
            signal.signal(stop, interrupt)
    debug = "--debug" in sys.argv
    argv = [a for a in sys.argv[1:] if a != "--debug"]

    # A model's sentence may hold what a terminal can't show.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("once", DamagedFile)
            warnings.showwarning = _note
            words, notes = own_words(argv)
            for note in notes:
                print(f"note: {note}", file=sys.stderr)
            code = app(args=words, standalone_mode=False)
    except Exception as error:
        if debug:
            raise
        _report(error)
    if code == EXIT_CODE:  # typer's own translation of Ctrl-C
        _fail(interruption_sentence(), EXIT_CODE)
    sys.exit(code if isinstance(code, int) else 0)


def interruption_sentence() -> str:
    """What an interrupted command says last."""
    command = next((word for word in sys.argv[1:] if word != "--debug"), "")
    resumes = ": finished parts are kept, the same command resumes from there"
    advice = resumes if command in RESUMED else ""
    return f"interrupted{advice}"


def _note(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Show a warning of ours as a note; those of other packages are for developers."""
    if issubclass(category, DamagedFile):
        print(f"note: {printable(str(message))}", file=sys.stderr)


def _report(error: Exception) -> None:
    """Print an exception the way its kind asks for, and exit."""
    if type(error).__module__.startswith(("typer", "click")) and hasattr(error, "exit_code"):
        if hasattr(error, "message"):
            error.message = printable(str(error.message))
        show = getattr(error, "show", None)
        if callable(show):
            show()
        sys.exit(error.exit_code)
    sentence = explain(error)
    if sentence is None:
        kind = type(error).__name__
        _fail(
            f"internal error ({kind}: {error}); please report it at {ISSUES} with the output of "
            "--debug",
            70,
        )
    _fail(str(sentence), 2 if isinstance(error, UsageError) else 1)


def _fail(sentence: str, code: int) -> None:
    sys.stdout.flush()
    print(f"error: {printable(' '.join(sentence.split()))}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
