"""Targets: only mint-mlx's own checkpoints are replaced, and only when that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import Cli, Maker, llama

from mint_mlx.base.errors import MintError
from mint_mlx.base.files import MARK
from mint_mlx.converters.output import write
from mint_mlx.jobs.convert import convert

# Where force must delete nothing: the source, its parent, folders and files of others, links, and
# paths that cannot be written.
PRECIOUS = ("proj/src", "proj", "notes", "link", "gone", "file", ".", "..")
IMPOSSIBLE = ("a[1]", "x" * 250, "no/parent", "")


def test_force_deletes_nothing_but_our_own_checkpoints(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(llama(1), "proj/src")
    (tmp_path / "proj" / "thesis").write_text("")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "notes")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)

    before = sorted(p for p in tmp_path.rglob("*") if "cache" not in p.parts)
    for target in (*PRECIOUS, *IMPOSSIBLE):
        with pytest.raises(MintError):
            convert(str(source), "5bpw", target, smoke=False, force=True)
    assert sorted(p for p in tmp_path.rglob("*") if "cache" not in p.parts) == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux's /proc")
def test_where_nobody_can_write_is_not_called_full(make: Maker, cli: Cli) -> None:
    source = make(llama(1))
    for target in ("/proc/x", "/sys/x"):
        ran = cli("convert", source, "--budget", "5bpw", "-o", target)
        assert (ran.code, ran.err.count("\n")) == (1, 1)
        assert "cannot be written to" in ran.err and "free" not in ran.err


def test_a_work_folder_with_other_files_is_left_alone(make: Maker, tmp_path: Path) -> None:
    source = str(make(llama(1)))
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "gold").write_text("")
    (tmp_path / "other.partial").write_text("")
    for name in ("out", "other"):
        with pytest.raises(MintError, match="rename it"):
            convert(source, "5bpw", tmp_path / name, smoke=False)
    assert (tmp_path / "out.partial" / "gold").exists()
    assert (tmp_path / "other.partial").is_file()


def test_a_stranger_in_unfinished_work_blocks_its_deletion_and_not_its_use(
    make: Maker, tmp_path: Path
) -> None:
    source = str(make(llama(1)))
    work = tmp_path / "out.partial"
    work.mkdir()
    identity = {"source": "", "quantizer": "rtn", "versions": {}, "choice": {}}
    (work / "journal.jsonl").write_text(json.dumps(identity) + "\n")
    (work / "lock").write_text(MARK)
    strangers = {"thesis.txt", "scratch-thesis.safetensors", "my-journal.jsonl"}
    for name in strangers:
        (work / name).write_text("precious")
    with pytest.raises(MintError, match=r"holds my-journal.jsonl, which mint-mlx did not write"):
        convert(source, "5bpw", tmp_path / "out", smoke=False, force=True)
    assert {path.name for path in work.iterdir()} == strangers | {"journal.jsonl", "lock"}

    # Work that can be resumed is, and strangers stay beside the result.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for name in strangers:
            (work / name).unlink()
        patch.setattr(write, "verify", interrupt)
        convert(source, "5bpw", tmp_path / "out", smoke=False, force=True)
    for name in strangers:
        (work / name).write_text("precious")
    convert(source, "5bpw", tmp_path / "out", smoke=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names > strangers
    assert not names & {"lock", "journal.jsonl"}


def interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def test_a_neighbour_with_a_like_name_is_left_alone(make: Maker, tmp_path: Path) -> None:
    source = str(make(llama(1)))
    for name in ("out.replaced-notes", "out.replaced-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "diary").write_text("")
    convert(source, "5bpw", tmp_path / "old", smoke=False)
    (tmp_path / "old").rename(tmp_path / "out.replaced-3")  # as a killed run leaves it
    convert(source, "5bpw", tmp_path / "out", smoke=False)
    names = {p.name for p in tmp_path.glob("out*")}
    assert names == {"out", "out.replaced-notes", "out.replaced-2"}


def test_a_path_that_mlx_lm_cannot_handle_is_refused_from_inside_too(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(llama(1), "a[1]/model")
    monkeypatch.chdir(tmp_path / "a[1]")
    with pytest.raises(MintError, match="rename it"):
        convert("model", "5bpw", tmp_path / "out", smoke=False)


def test_a_folder_that_appears_meanwhile_is_left_alone(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def appear(*args: Any) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("")

    monkeypatch.setattr(write, "verify", appear)
    with pytest.raises(MintError, match="exists already"):
        convert(str(make(llama(1))), "5bpw", tmp_path / "out", smoke=False)
    assert (tmp_path / "out" / "precious").exists()


def test_an_existing_folder_is_replaced_only_when_told_to(make: Maker, tmp_path: Path) -> None:
    folder = str(make(llama(1)))
    convert(folder, "5bpw", tmp_path / "out", smoke=False)
    with pytest.raises(MintError, match="exists already"):
        convert(folder, "6bpw", tmp_path / "out", smoke=False)
    file = tmp_path / "out" / "model.safetensors"
    small = file.stat().st_size
    convert(folder, "6bpw", tmp_path / "out", smoke=False, force=True)
    assert file.stat().st_size > small
    assert {p.name for p in tmp_path.iterdir()} == {"model", "cache", "out"}
