"""A conversion: exact bytes, mlx-lm's codes, and the same bytes after any interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import Maker, Notes, edit_config, llama, mixtral, qwen3_moe, spoil_weight
from mlx_lm import convert as mlx_lm_convert
from mlx_lm import load

from mint_mlx.allocation.plan_file import read_plan
from mint_mlx.base.errors import MintError
from mint_mlx.checkpoint.source import load_source
from mint_mlx.converters.output.replace_tensors import replace_tensors
from mint_mlx.converters.output.shard_writer import Writer
from mint_mlx.converters.quantizers import distil
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.model import prepare


def tensors(folder: Path) -> dict[str, mx.array]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in mx.load(str(f)).items()}


def on_disk(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    "model",
    [llama(2), llama(1, tied=True), qwen3_moe(2), mixtral(1)],
    ids=["llama", "tied", "qwen3_moe", "mixtral"],
)
def test_the_result_loads_in_stock_mlx_lm_within_the_budget(
    make: Maker, tmp_path: Path, model: Any
) -> None:
    notes = Notes()
    result = convert(str(make(model)), "5bpw", tmp_path / "out", report=notes)
    assert notes.begun == notes.expected == ["profile", "convert", "verify", "generate"]
    assert result.sentence
    assert result.bytes == on_disk(tmp_path / "out") <= 5 * result.inventory.parameters / 8

    loaded, tokenizer = load(str(tmp_path / "out"))
    loaded.set_dtype(mx.float32)
    logits = loaded(mx.array([tokenizer.encode("abc")]))
    assert np.isfinite(np.array(logits)).all()

    # config.json says of each layer what the plan says.
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    for path, config in result.plan.choice.items():
        assert quantization.get(path) == (config.as_mlx() if config.quantized else None)
    assert {"group_size", "bits", "mode"} <= quantization.keys()


@pytest.mark.parametrize("model", [llama(2), qwen3_moe(2)], ids=["llama", "qwen3_moe"])
@pytest.mark.parametrize("config", ["4bit-g64", "3bit-g32", "6bit-g128"])
def test_uniform_is_bit_identical_to_mlx_lm(
    make: Maker, tmp_path: Path, model: Any, config: str
) -> None:
    folder = str(make(model))
    convert(folder, out=tmp_path / "ours", uniform=config, smoke=False)
    size = {"q_bits": int(config[0]), "q_group_size": int(config.partition("-g")[2])}
    mlx_lm_convert(folder, str(tmp_path / "theirs"), quantize=True, **size)

    # A router of four outputs stays unquantized in ours; all else is the same.
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    guarded = {name for name in theirs if ".mlp.gate." in name}
    assert ours.keys() - theirs.keys() <= guarded | {n for n in ours if ".mlp.gate." in n}
    for name in theirs.keys() - guarded:
        assert ours[name].dtype == theirs[name].dtype, name
        assert mx.array_equal(ours[name], theirs[name]), name


def test_the_plan_that_is_kept_makes_the_same_bytes(make: Maker, tmp_path: Path) -> None:
    folder = make(qwen3_moe(1))
    convert(str(folder), "5bpw", tmp_path / "a", smoke=False)
    convert(str(folder), plan=tmp_path / "a" / "mint-plan.yaml", out=tmp_path / "b", smoke=False)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_a_float32_source_gets_bfloat16_scales(make: Maker, tmp_path: Path) -> None:
    folder = make(llama(1), dtype=mx.float32)
    edit_config(folder, torch_dtype="float32")
    convert(str(folder), "5bpw", tmp_path / "out", smoke=False)
    assert {a.dtype for a in tensors(tmp_path / "out").values()} == {mx.uint32, mx.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_plan_from_another_model_names_the_model_that_was_converted(
    make: Maker, tmp_path: Path
) -> None:
    folder = str(make(llama(1)))
    convert(folder, "5bpw", tmp_path / "a", smoke=False)
    text = (tmp_path / "a" / "mint-plan.yaml").read_text()
    plan = tmp_path / "plan.yaml"
    content = load_source(folder).origin.content
    plan.write_text(text.replace("name: model", "name: Qwen/Other").replace(content, "0" * 16))
    result = convert(folder, plan=str(plan), out=tmp_path / "b", smoke=False)
    assert (result.plan.loss, result.plan.gap, result.plan.errors) == (None, None, {})
    assert read_plan(tmp_path / "b" / "mint-plan.yaml").loss is None
    assert "Qwen/Other" not in (tmp_path / "b" / "README.md").read_text()
    assert "Qwen/Other" not in (tmp_path / "b" / "mint-plan.yaml").read_text()


def test_what_the_floor_forbids_costs_no_sensitivity(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = partial(pytest.fail, "measured before checking")
    monkeypatch.setattr("mint_mlx.jobs.convert.get_sensitivity", lambda *_: refuse())
    folder = make(llama(1))
    with pytest.raises(MintError, match="safety floor of 9 dB"):
        convert(str(folder), "2.9bpw", tmp_path / "out", effort="balanced")

    # A damaged weight is refused by its name, not as an overflow after it.
    spoil_weight(folder, "model.layers.0.mlp.down_proj.weight", float("nan"))
    with pytest.raises(MintError, match=r"down_proj\.weight holds NaN"):
        convert(str(folder), "5bpw", tmp_path / "out", effort="balanced")


def test_what_feedback_does_not_know_is_said(make: Maker, tmp_path: Path) -> None:
    folder = str(make(llama(1)))
    notes = Notes()
    more: dict[str, Any] = {"effort": "balanced", "overrides": ["up_proj=mxfp4"], "smoke": False}
    convert(folder, "6bpw", tmp_path / "out", report=notes, **more)
    assert any("mxfp4" in note and note.endswith("rounded to nearest: 1") for note in notes.said)


# In the second block, and where only the head is still to be written.
@pytest.mark.parametrize(("effort", "units"), [("balanced", 14), ("best", 14), ("best", -1)])
def test_an_interrupted_conversion_goes_on_to_the_same_bytes(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, effort: str, units: int
) -> None:
    folder = str(make(qwen3_moe(2)))
    convert(folder, "5bpw", tmp_path / "whole", effort=effort, smoke=False)
    put = Writer.put
    total = units % len(prepare(folder).inventory.order)
    written: list[str] = []

    def stop(self: Writer, unit: str, tensors: Any) -> None:
        if len(written) == total:
            raise KeyboardInterrupt
        written.append(unit)
        put(self, unit, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "put", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, "5bpw", tmp_path / "out", effort=effort, smoke=False)
    assert (tmp_path / "out.partial").is_dir()

    convert(folder, "5bpw", tmp_path / "out", effort=effort, smoke=False)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]
    assert not list((tmp_path / "out").glob("scratch-*"))


QUANTIZERS = "mint_mlx.converters.quantizers"
DISTIL = f"{QUANTIZERS}.distil"
REPLACE = "mint_mlx.converters.output.write.replace_tensors"


def stop(*args: Any, **more: Any) -> None:
    raise KeyboardInterrupt


def then_stop(function: Callable[..., Any]) -> Callable[..., None]:
    def call(*args: Any) -> None:
        function(*args)
        stop()

    return call


# What is replaced, and by what: stopped before or after it.
INTERRUPTIONS = {
    "refining": (f"{QUANTIZERS}.predictions.predict", stop),
    "distilling": (f"{DISTIL}.write_note", then_stop(distil.write_note)),
    "rewriting": (REPLACE, stop),
    "verifying": (REPLACE, then_stop(replace_tensors)),
    "crashed": (REPLACE, then_stop(replace_tensors)),
}


@pytest.mark.parametrize("when", INTERRUPTIONS)
def test_an_interruption_at_the_end_of_best_loses_nothing(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    folder = str(make(qwen3_moe(2)))
    refine = distil.refine

    def gained(*args: Any, **more: Any) -> distil.Refined:
        tensors = refine(*args, **more).tensors
        return distil.Refined({name: a * 1.0625 for name, a in tensors.items()}, 1.0, 0.5)

    monkeypatch.setattr(f"{DISTIL}.refine", gained)
    convert(folder, "5bpw", tmp_path / "whole", effort="best", smoke=False)
    with monkeypatch.context() as patch:
        patch.setattr(*INTERRUPTIONS[when])
        with pytest.raises(KeyboardInterrupt):
            convert(folder, "5bpw", tmp_path / "out", effort="best", smoke=False)

    # Nothing is learned again, but where the machine crashed before a shard reached the disk.
    if when == "crashed":
        shard = next((tmp_path / "out.partial").glob("model*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:1000])
    else:
        monkeypatch.setattr(f"{QUANTIZERS}.learn_model.learn", stop)
        monkeypatch.setattr(f"{QUANTIZERS}.learn_turns.learn", stop)

    # Where a step was noted, the source doesn't predict again, and that step isn't taken again.
    steps: list[int] = []

    def record(place: Path, optimizer: Any, figures: Any, *rest: Any) -> None:
        steps.append(figures[0])

    if when == "distilling":
        monkeypatch.setattr(f"{DISTIL}.predict", stop)
        monkeypatch.setattr(f"{DISTIL}.write_note", record)

    convert(folder, "5bpw", tmp_path / "out", effort="best", smoke=False)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]
    assert steps == ([2] if when == "distilling" else [])
    assert not list((tmp_path / "out").glob("scratch-*"))
