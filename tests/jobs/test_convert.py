"""A conversion: exact bytes, the codes of mlx-lm, reload by stock mlx-lm, and nothing half-written
after a fault.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import Maker, llama, mixtral, qwen3_moe
from mlx_lm import convert as mlx_lm_convert
from mlx_lm import load

from mint_mlx.base.errors import MintError, explain
from mint_mlx.checkpoint import layout
from mint_mlx.converters.output import shard_writer
from mint_mlx.jobs.convert import convert


def tensors(folder: Path) -> dict[str, mx.array]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in mx.load(str(f)).items()}


def on_disk(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def raw(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "model",
    [llama(2), llama(1, tied=True), qwen3_moe(2), mixtral(1)],
    ids=["llama", "tied", "qwen3_moe", "mixtral"],
)
def test_the_result_loads_in_stock_mlx_lm_within_the_budget(
    make: Maker, tmp_path: Path, model: Any
) -> None:
    result = convert(str(make(model)), "5bpw", tmp_path / "out")
    assert result.sentence
    assert result.bytes == on_disk(tmp_path / "out") <= 5 * result.inventory.parameters / 8
    loaded, tokenizer = load(str(tmp_path / "out"))
    loaded.set_dtype(mx.float32)
    logits = loaded(mx.array([tokenizer.encode("abc")]))
    assert np.isfinite(np.array(logits)).all()
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    for path, config in result.plan.choice.items():
        assert quantization.get(path) == (config.as_mlx() if config.quantized else None)
    assert {"group_size", "bits", "mode"} <= quantization.keys()


@pytest.mark.parametrize("model", [llama(2), qwen3_moe(2)], ids=["llama", "qwen3_moe"])
@pytest.mark.parametrize("config", ["4bit-g64", "3bit-g32", "6bit-g128"])
def test_uniform_is_bit_identical_to_mlx_lm(
    make: Maker, tmp_path: Path, model: Any, config: str
) -> None:
    folder = make(model)
    convert(str(folder), out=tmp_path / "ours", uniform=config, smoke=False)
    bits, group = int(config[0]), int(config.partition("-g")[2])
    mlx_lm_convert(
        str(folder), str(tmp_path / "theirs"), quantize=True, q_bits=bits, q_group_size=group
    )
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    guarded = {name for name in theirs if ".mlp.gate." in name}  # 4 outputs: ours stay unquantized
    assert ours.keys() - theirs.keys() <= guarded | {n for n in ours if ".mlp.gate." in n}
    for name in theirs.keys() - guarded:
        assert ours[name].dtype == theirs[name].dtype and mx.array_equal(
            ours[name], theirs[name]
        ), name


def test_shards_and_index_agree(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "MAX_SHARD", 60_000)
    result = convert(str(make(qwen3_moe(2), shards=3)), "6bpw", tmp_path / "out", smoke=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {f.name: set(mx.load(str(f))) for f in (tmp_path / "out").glob("*.safetensors")}
    assert len(files) > 2 and all(
        f.stat().st_size <= 60_000 for f in (tmp_path / "out").glob("*.safetensors")
    )
    assert index["weight_map"] == {name: file for file, names in files.items() for name in names}
    assert index["metadata"]["total_parameters"] == result.inventory.parameters
    assert index["metadata"]["total_size"] == sum(
        a.nbytes for a in tensors(tmp_path / "out").values()
    )
    load(str(tmp_path / "out"))


def test_a_large_tensor_is_written_in_parts(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = str(make(llama(1))), os.pwrite
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


def test_small_files_and_a_card_come_along(make: Maker, tmp_path: Path) -> None:
    folder = make(llama(1))
    for name in (
        "chat_template.jinja",
        "generation_config.json",
        "added_tokens.json",
        "merges.txt",
        "LICENSE",
    ):
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nmetrics: [x]\n---\nhello")
    (folder / "notes.pdf").write_text("")
    convert(str(folder), "6bpw", tmp_path / "out", smoke=False)
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert {
        "chat_template.jinja",
        "generation_config.json",
        "added_tokens.json",
        "merges.txt",
        "LICENSE",
    } <= names
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "mint-plan.yaml",
    } <= names and "notes.pdf" not in names
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "license: apache-2.0" in card
        and "library_name: mlx" in card
        and "| 6bit-" in card
        and "metrics" not in card
    )
    assert str(tmp_path) not in card + (tmp_path / "out" / "mint-plan.yaml").read_text()


def test_the_plan_that_is_kept_makes_the_same_bytes(make: Maker, tmp_path: Path) -> None:
    folder = make(qwen3_moe(1))
    convert(str(folder), "5bpw", tmp_path / "a", smoke=False)
    convert(str(folder), plan=tmp_path / "a" / "mint-plan.yaml", out=tmp_path / "b", smoke=False)
    assert raw(tmp_path / "a")["model.safetensors"] == raw(tmp_path / "b")["model.safetensors"]


def test_memory_does_not_grow_with_depth(make: Maker, tmp_path: Path) -> None:
    peaks = []
    for layers in (4, 16):
        folder = make(llama(layers), f"deep{layers}")
        mx.clear_cache()
        mx.reset_peak_memory()
        base = mx.get_active_memory()
        convert(str(folder), "4.5bpw", tmp_path / f"out{layers}", smoke=False)
        peaks.append(mx.get_peak_memory() - base)
    assert peaks[1] <= 1.1 * peaks[0] + 50_000


def interrupt_after(monkeypatch: pytest.MonkeyPatch, units: int, error: BaseException) -> None:
    put, left = shard_writer.Writer.put, [units]

    def stop(self: Any, unit: str, arrays: Any) -> None:
        if left[0] == 0:
            raise error
        left[0] -= 1
        put(self, unit, arrays)

    monkeypatch.setattr(shard_writer.Writer, "put", stop)


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


def test_two_threads_of_a_program_convert(make: Maker, tmp_path: Path) -> None:
    """MLX binds a stream to the thread that made it: a second thread may not get the first's."""
    source, made = str(make(llama(1))), []

    def work(number: int) -> None:
        convert(source, "5bpw", tmp_path / str(number), smoke=False)
        made.append((tmp_path / str(number) / "model.safetensors").read_bytes())

    for number in range(2):
        thread = threading.Thread(target=work, args=(number,))
        thread.start()
        thread.join()
    assert len(made) == 2 and made[0] == made[1]


def test_a_killed_run_is_resumed(make: Maker, tmp_path: Path) -> None:
    folder = str(make(qwen3_moe(1)))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, folder, str(tmp_path / "out"), "9"], check=False
    )
    assert done.returncode == -9 and not (tmp_path / "out").exists()
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
    assert len(shards) > 1 and all(
        "-of-0000" in name and name.endswith(".safetensors") for name in shards
    )


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
    assert (
        not (tmp_path / "out").exists() and not (tmp_path / "out.partial" / "config.json").exists()
    )
    convert(folder, "5bpw", tmp_path / "out", smoke=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("U", (), {"free": 1000}))
    with pytest.raises(MintError, match="are needed"):
        convert(folder, "5bpw", tmp_path / "other", smoke=False)


def test_an_existing_folder_is_replaced_only_when_told_to(make: Maker, tmp_path: Path) -> None:
    folder = str(make(llama(1)))
    convert(folder, "5bpw", tmp_path / "out", smoke=False)
    with pytest.raises(MintError, match="exists already"):
        convert(folder, "6bpw", tmp_path / "out", smoke=False)
    small = on_disk(tmp_path / "out")
    convert(folder, "6bpw", tmp_path / "out", smoke=False, force=True)
    assert on_disk(tmp_path / "out") > small
    assert {p.name for p in tmp_path.iterdir()} == {"model", "cache", "out"}


def test_a_float32_source_gets_bfloat16_scales(make: Maker, tmp_path: Path) -> None:
    folder = make(llama(1), dtype=mx.float32)
    config = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    convert(str(folder), "5bpw", tmp_path / "out", smoke=False)
    assert {a.dtype for a in tensors(tmp_path / "out").values()} == {mx.uint32, mx.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("experts", [False, True])  # rounded row by row, and whole
def test_nvfp4_does_not_turn_small_weights_into_zeros(
    make: Maker, tmp_path: Path, experts: bool
) -> None:
    small = make(qwen3_moe(1) if experts else llama(1))
    for file in small.glob("*.safetensors"):
        tensors = mx.load(str(file))
        tiny = {name: a * 0.01 if "down_proj" in name else a for name, a in tensors.items()}
        mx.save_safetensors(str(file), tiny, metadata={"format": "pt"})
    with pytest.raises(MintError, match=r"down_proj has weights too small.*down_proj=mxfp4"):
        convert(str(small), uniform="nvfp4", out=tmp_path / "out", smoke=False)
    fit = ["down_proj=mxfp4"]
    convert(
        str(small), uniform="nvfp4", out=tmp_path / "out", overrides=fit, smoke=False, force=True
    )
