"""A copy of a finished checkpoint to change, which gets its name only when the change succeeds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...base.errors import MintError
from ...base.files import LOCK
from ...base.folders import JOURNAL, WORK
from ...base.remove import discard, empty_folder, remove_file
from ...base.report import Report
from ...base.targets import check_space, put_in_place, work_folder
from .shard_writer import check_work, lock
from .small_files import checkpoint_files


@contextmanager
def copied(folder: Path, target: Path, force: bool, report: Report | None = None) -> Iterator[Path]:
    """A copy of a checkpoint to work on, beside the target: its weights and what goes with them.

    It is renamed to the target in the end, or removed on an error.

    Raises:
        MintError: another run works there, the disk is too small, or something else has the copy's
            name.
    """
    work = work_folder(target)
    check_work(work)
    if (work / JOURNAL).is_file() and not force:
        raise MintError(
            f"{work} holds an unfinished conversion: finish it, or give --force to throw it away"
        )
    files = checkpoint_files(folder)
    sizes = [file.stat().st_size for file in files]
    check_space(target.absolute().parent, sum(sizes) + max(sizes))

    work.mkdir(exist_ok=True)
    with lock(work):
        empty_folder(work, WORK, keep=LOCK)
        try:
            for file in files:
                copy = work / file.relative_to(folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
            yield work

            put_in_place(work, target, force, report)
            remove_file(target / LOCK)
        finally:
            discard(work, WORK)
