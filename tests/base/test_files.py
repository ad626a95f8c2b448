"""Files are written whole or not at all, and locks are used only where there are any."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from helpers import Maker, llama

from mint_mlx.base.files import atomic_write
from mint_mlx.jobs.convert import convert


def test_what_is_written_whole_leaves_nothing_when_it_fails(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_text("old")
    with pytest.raises(OSError, match="full"), atomic_write(tmp_path / "x.npz") as partial:
        partial.write_text("half")
        raise OSError(28, "full")
    assert [f.name for f in tmp_path.iterdir()] == ["x.npz"]
    assert (tmp_path / "x.npz").read_text() == "old"


def test_a_file_system_without_locks_stops_nothing(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    convert(str(make(llama(1))), "5bpw", tmp_path / "out", smoke=False)
    assert (tmp_path / "out" / "config.json").is_file()
