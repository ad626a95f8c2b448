"""Shards: written in parts, resumed after any end, and by one run at a time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers import Maker, llama, qwen3_moe
from mlx_lm import load

from mint_mlx.base.errors import MintError, explain
from mint_mlx.checkpoint import layout
from mint_mlx.converters.output import shard_writer
from mint_mlx.jobs.convert import convert

Convert = Callable[..., Any]


def raw(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def interrupt_after(monkeypatch: pytest.MonkeyPatch, units: int, error: BaseException) -> None:
    """Raise `error` in place of writing the unit after so many."""
    put = shard_writer.Writer.put
    written: list[str] = []

    def stop(self: Any, unit: str, arrays: Any) -> None:
        if len(written) == units:
            raise error
        written.append(unit)
        put(self, unit, arrays)

    monkeypatch.setattr(shard_writer.Writer, "put", stop)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Convert:
    """interrupted(units, source, ...) converts until so many units are written."""

    def convert_some(units: int, *args: Any, **more: Any) -> None:
        with monkeypatch.context() as patch:
            interrupt_after(patch, units, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                convert(*args, smoke=False, **more)

    return convert_some


def test_shards_and_index_agree(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "MAX_SHARD", 60_000)
    out = tmp_path / "out"
    result = convert(str(make(qwen3_moe(2), shards=3)), "6bpw", out, smoke=False)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(file.stat().st_size <= 60_000 for file in shards)

    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = {file.name: mx.load(str(file)) for file in shards}
    weight_map = {name: file for file, names in tensors.items() for name in names}
    assert index["weight_map"] == weight_map
    assert index["metadata"]["total_parameters"] == result.inventory.parameters
    size = sum(array.nbytes for arrays in tensors.values() for array in arrays.values())
    assert index["metadata"]["total_size"] == size
    load(str(out))


def test_a_large_tensor_is_written_in_parts(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(llama(1)))
    write = os.pwrite
    convert(folder, "5bpw", tmp_path / "whole", smoke=False)

    def like_macos(file: int, data: Any, offset: int) -> int:
        if len(data) > 1000:  # there 2^31 - 1
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return write(file, data, offset)

    monkeypatch.setattr(shard_writer, "AT_ONCE", 1000)
    monkeypatch.setattr(shard_writer.os, "pwrite", like_macos)
    convert(folder, "5bpw", tmp_path / "out", smoke=False)
    assert weights(tmp_path / "whole") == weights(tmp_path / "out")


@pytest.mark.parametrize("units", [0, 1, 7, 20])
def test_interrupted_work_is_resumed_byte_for_byte(
    make: Maker,
    interrupted: Convert,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    units: int,
) -> None:
    folder = str(make(qwen3_moe(2)))
    convert(folder, "5bpw", tmp_path / "whole", smoke=False)
    interrupted(units, folder, "5bpw", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not any((tmp_path / "out.partial").glob("*.safetensors"))

    # What was written is not written again.
    written: list[str] = []
    put = shard_writer.Writer.put

    def recorded(self: Any, unit: str, arrays: Any) -> None:
        written.append(unit)
        put(self, unit, arrays)

    monkeypatch.setattr(shard_writer.Writer, "put", recorded)
    result = convert(folder, "5bpw", tmp_path / "out", smoke=False)
    assert len(written) == len(result.inventory.order) - units

    # All is as if nothing had happened, but for the card, which names its folder.
    ours, whole = raw(tmp_path / "out"), raw(tmp_path / "whole")
    assert ours.keys() == whole.keys()
    assert {name for name in ours if ours[name] != whole[name]} <= {"README.md"}
    assert not (tmp_path / "out.partial").exists()


KILLED = """
import os, sys, signal
from mint_mlx.converters.output import shard_writer
put, written = shard_writer.Writer.put, []

def stop(self, unit, arrays):
    if len(written) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(unit)
    put(self, unit, arrays)

shard_writer.Writer.put = stop
from mint_mlx import convert
convert(sys.argv[1], "5bpw", sys.argv[2], smoke=False, effort="fast")
"""


def test_a_killed_run_is_resumed(make: Maker, tmp_path: Path) -> None:
    folder = str(make(qwen3_moe(1)))
    command = [sys.executable, "-c", KILLED, folder, str(tmp_path / "out"), "9"]
    done = subprocess.run(command, check=False)
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    lines = (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()
    assert 5 <= len(lines) <= 10  # the last ones may still have waited for the disk
    convert(folder, "5bpw", tmp_path / "out", smoke=False)
    convert(folder, "5bpw", tmp_path / "whole", smoke=False)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_shards_of_an_earlier_layout_do_not_stay(
    make: Maker, interrupted: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(llama(2)))
    interrupted(8, folder, uniform="4bit-g64", out=tmp_path / "out")
    assert (tmp_path / "out.partial" / "model.safetensors.part").is_file()
    monkeypatch.setattr(layout, "MAX_SHARD", 100_000)
    convert(folder, uniform="4bit-g64", out=tmp_path / "out", smoke=False)
    shards = sorted(f.name for f in (tmp_path / "out").glob("model*") if f.suffix != ".json")
    assert len(shards) > 1
    assert all("-of-0000" in name and name.endswith(".safetensors") for name in shards)


def test_bytes_lost_since_the_journal_are_written_again(
    make: Maker, interrupted: Convert, tmp_path: Path
) -> None:
    folder = str(make(llama(2)))
    convert(folder, "5bpw", tmp_path / "whole", smoke=False)
    interrupted(12, folder, "5bpw", tmp_path / "out")
    shard = tmp_path / "out.partial" / "model.safetensors.part"
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 8 :] = bytes(len(damaged) - len(damaged) // 8)
    shard.write_bytes(damaged)
    convert(folder, "5bpw", tmp_path / "out", smoke=False)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_unfinished_work_of_another_plan_is_refused_or_discarded(
    make: Maker, interrupted: Convert, tmp_path: Path
) -> None:
    folder = str(make(llama(1)))
    interrupted(3, folder, "5bpw", tmp_path / "out")
    with pytest.raises(MintError, match="unfinished work"):
        convert(folder, "6bpw", tmp_path / "out", smoke=False)
    convert(folder, "6bpw", tmp_path / "out", smoke=False, force=True)
    assert (tmp_path / "out" / "config.json").is_file()


def test_two_runs_into_one_folder(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(llama(1)))
    problems: list[str] = []
    put = shard_writer.Writer.put

    def second(self: Any, unit: str, arrays: Any) -> None:
        if not problems:
            with pytest.raises(MintError) as caught:
                shard_writer.Writer(self.work, self.layout, self.units, {})
            problems.append(str(caught.value))
        put(self, unit, arrays)

    monkeypatch.setattr(shard_writer.Writer, "put", second)
    convert(folder, "5bpw", tmp_path / "out", smoke=False)
    assert "another run" in problems[0]


def test_a_full_disk_is_one_sentence_and_no_result(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(llama(1)))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(OSError, match="No space") as caught:
            convert(folder, "5bpw", tmp_path / "out", smoke=False)
    assert "the disk is full" in (explain(caught.value) or "")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "config.json").exists()

    # With room again it goes on; too little room is known beforehand.
    convert(folder, "5bpw", tmp_path / "out", smoke=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("U", (), {"free": 1000}))
    with pytest.raises(MintError, match="are needed"):
        convert(folder, "5bpw", tmp_path / "other", smoke=False)
