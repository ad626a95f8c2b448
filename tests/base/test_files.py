"""Files are written whole or not at all, and locks are used only where there are any."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import Maker, llama

from mint_mlx.base.files import atomic_write, lock_folder, shared
from mint_mlx.jobs.convert import convert


def test_what_is_written_whole_leaves_nothing_when_it_fails(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_text("old")
    with pytest.raises(OSError, match="full"), atomic_write(tmp_path / "x.npz") as partial:
        partial.write_text("half")
        raise OSError(28, "full")
    assert [f.name for f in tmp_path.iterdir()] == ["x.npz"]
    assert (tmp_path / "x.npz").read_text() == "old"


# Dies while a file is half written.
KILLED = """
import os, signal, sys
from pathlib import Path
from mint_mlx.base.files import atomic_write, lock_folder, shared
with atomic_write(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_write_left_goes_with_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    (unfinished,) = tmp_path.iterdir()

    # That of another file stays, and so do a link of such a name and what is being written.
    with atomic_write(tmp_path / "y.npz") as other:
        other.write_text("whole")
    link = unfinished.with_name(unfinished.name.replace(unfinished.name[20:24], "0000"))
    link.symlink_to(other)
    assert unfinished.exists()
    with atomic_write(path) as first:
        assert not unfinished.exists()
        first.write_text("first")
        with atomic_write(path) as second:
            second.write_text("second")
            assert first.exists()
    assert {f.name for f in tmp_path.iterdir()} == {"x.npz", "y.npz", link.name}
    assert path.read_text() == "first"


def test_a_file_system_without_locks_stops_nothing(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    convert(str(make(llama(1))), "5bpw", tmp_path / "out", smoke=False)
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_pipe_in_place_of_a_lock_is_an_error_and_no_endless_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(OSError) as raised:
        lock_folder(tmp_path)
    assert raised.value.errno == errno.ENXIO
    with shared(tmp_path / "lock"):  # whoever can't lock it can't delete beside it either
        pass
