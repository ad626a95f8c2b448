"""Shards are written in any order, resumed after any end, and never twice at once."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
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


def tensors(folder: Path) -> dict[str, mx.array]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in mx.load(str(f)).items()}


def raw(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def interrupt_after(monkeypatch: pytest.MonkeyPatch, units: int, error: BaseException) -> None:
    put = shard_writer.Writer.put
    left = [units]

    def stop(self: Any, unit: str, arrays: Any) -> None:
        if left[0] == 0:
            raise error
        left[0] -= 1
        put(self, unit, arrays)

    monkeypatch.setattr(shard_writer.Writer, "put", stop)


def test_shards_and_index_agree(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "MAX_SHARD", 60_000)
    result = convert(str(make(qwen3_moe(2), shards=3)), "6bpw", tmp_path / "out", smoke=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {f.name: set(mx.load(str(f))) for f in (tmp_path / "out").glob("*.safetensors")}
    assert len(files) > 2
    assert all(f.stat().st_size <= 60_000 for f in (tmp_path / "out").glob("*.safetensors"))
    assert index["weight_map"] == {name: file for file, names in files.items() for name in names}
    assert index["metadata"]["total_parameters"] == result.inventory.parameters
    assert index["metadata"]["total_size"] == sum(
        a.nbytes for a in tensors(tmp_path / "out").values()
    )
    load(str(tmp_path / "out"))


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
    shards = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert shards[0] == shards[1]


@pytest.mark.parametrize("units", [0, 1, 7, 20])
def test_interrupted_work_is_resumed_byte_for_byte(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: int
) -> None:
    folder = str(make(qwen3_moe(2)))
    convert(folder, "5bpw", tmp_path / "whole", smoke=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, units, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(folder, "5bpw", tmp_path / "out", smoke=False)
    assert not (tmp_path / "out").exists()
    assert not any((tmp_path / "out.partial").glob("*.safetensors"))
    written: list[str] = []
    put = shard_writer.Writer.put
    with monkeypatch.context() as patch:
        patch.setattr(
            shard_writer.Writer,
            "put",
            lambda self, unit, a: written.append(unit) or put(self, unit, a),
        )
        result = convert(folder, "5bpw", tmp_path / "out", smoke=False)
    assert len(written) == len(result.inventory.order) - units
    ours, whole = raw(tmp_path / "out"), raw(tmp_path / "whole")
    assert ours.keys() == whole.keys()
    assert {n for n in ours if ours[n] != whole[n]} <= {"README.md"}  # the card names its folder
    assert not (tmp_path / "out.partial").exists()


KILLED = """
import os, sys, signal
from mint_mlx.converters.output import shard_writer
put, left = shard_writer.Writer.put, [int(sys.argv[3])]
def stop(self, unit, arrays):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    put(self, unit, arrays)
shard_writer.Writer.put = stop
from mint_mlx import convert
convert(sys.argv[1], "5bpw", sys.argv[2], smoke=False, effort="fast")
"""


def test_a_killed_run_is_resumed(make: Maker, tmp_path: Path) -> None:
    folder = str(make(qwen3_moe(1)))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, folder, str(tmp_path / "out"), "9"], check=False
    )
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    lines = (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()
    assert 5 <= len(lines) <= 10  # (the last ones may still have waited for the disk)
    convert(folder, "5bpw", tmp_path / "out", smoke=False)
    convert(folder, "5bpw", tmp_path / "whole", smoke=False)
    assert (
        raw(tmp_path / "out")["model.safetensors"] == raw(tmp_path / "whole")["model.safetensors"]
    )


def test_shards_of_an_earlier_layout_do_not_stay(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(llama(2)))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(folder, uniform="4bit-g64", out=tmp_path / "out", smoke=False)
    assert (tmp_path / "out.partial" / "model.safetensors.part").is_file()
    monkeypatch.setattr(layout, "MAX_SHARD", 100_000)
    convert(folder, uniform="4bit-g64", out=tmp_path / "out", smoke=False)
    shards = sorted(f.name for f in (tmp_path / "out").glob("model*") if f.suffix != ".json")
    assert len(shards) > 1
    assert all("-of-0000" in name and name.endswith(".safetensors") for name in shards)


def test_bytes_lost_since_the_journal_are_written_again(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(llama(2)))
    convert(folder, "5bpw", tmp_path / "whole", smoke=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 12, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(folder, "5bpw", tmp_path / "out", smoke=False)
    part = tmp_path / "out.partial" / "model.safetensors.part"
    damaged = bytearray(part.read_bytes())
    damaged[len(damaged) // 8 :] = bytes(len(damaged) - len(damaged) // 8)
    part.write_bytes(damaged)
    convert(folder, "5bpw", tmp_path / "out", smoke=False)
    assert (
        raw(tmp_path / "out")["model.safetensors"] == raw(tmp_path / "whole")["model.safetensors"]
    )


def test_unfinished_work_of_another_plan_is_refused_or_discarded(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(llama(1)))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(folder, "5bpw", tmp_path / "out", smoke=False)
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
    convert(folder, "5bpw", tmp_path / "out", smoke=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("U", (), {"free": 1000}))
    with pytest.raises(MintError, match="are needed"):
        convert(folder, "5bpw", tmp_path / "other", smoke=False)
