"""`python -m mint_mlx` is `mint-mlx`.

What a shell can do to a program is met here, before anything else is imported: Ctrl-C in the first
moment ends it in one line, closed streams don't become files, and limits too low for MLX are named.
"""

import os
import signal
import sys

# Bytes of address space that MLX takes, with some room, and those that each core's thread reserves:
# with less, a fast BLAS would wait for memory without end.
MEMORY, MEMORY_OF_THREAD = 2 << 30, 128 << 20


def _stop(*_: object) -> None:
    """End at once: nothing was begun yet, or all is done."""
    os.write(2, b"error: interrupted\n")
    os._exit(130)


def _open_streams() -> None:
    """Open the standard streams that are closed: the next file would take their place."""
    for stream in range(3):
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w")


def _objection() -> str | None:
    """What of the surroundings makes work impossible, in a sentence; None where nothing does."""
    import resource

    if sys.stdout is None:
        return "standard output is closed: send it to a file, or to /dev/null"
    try:
        os.getcwd()
    except OSError:
        return "the current folder does not exist any more: change to another one"
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    needed = MEMORY + MEMORY_OF_THREAD * (os.cpu_count() or 1)
    if limit != resource.RLIM_INFINITY and limit < needed:
        return (
            f"this shell allows {limit >> 20} MiB of memory, and MLX needs {needed >> 20} MiB to "
            "start: raise the limit with `ulimit -v`"
        )
    return None


def start() -> None:
    """Entry point of the command."""
    # A shell that starts it in the background lets it ignore Ctrl-C.
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if listens:
        signal.signal(signal.SIGINT, _stop)
    _open_streams()
    if objection := _objection():
        print(f"error: {objection}", file=sys.stderr)
        sys.exit(1)
    from .base.distributed import launched
    from .base.interruption import interrupt, watch
    from .cli.main import interruption_sentence, main

    # While a command runs, an interruption is an exception, and temporary files are deleted. A
    # process that a launcher ends may wait in MLX for a lost rank: it ends at once.
    try:
        if listens:
            signal.signal(signal.SIGINT, interrupt)
        if not launched():
            watch(interruption_sentence)
        main()
    except KeyboardInterrupt:
        _stop()
    finally:
        if listens:
            signal.signal(signal.SIGINT, _stop)


if __name__ == "__main__":
    start()
