"""A conversion: exact bytes, the codes of mlx-lm, reload by stock mlx-lm, and nothing half-written
after a fault.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import Maker, Notes, llama, mixtral, qwen3_moe, spoil_weight
from mlx_lm import convert as mlx_lm_convert
from mlx_lm import load

from mint_mlx.base.errors import MintError
from mint_mlx.converters.output import replace_tensors
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
    config = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    convert(str(folder), "5bpw", tmp_path / "out", smoke=False)
    assert {a.dtype for a in tensors(tmp_path / "out").values()} == {mx.uint32, mx.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_plan_from_another_model_names_the_model_that_was_converted(
    make: Maker, tmp_path: Path
) -> None:
    folder = make(llama(1))
    convert(str(folder), "5bpw", tmp_path / "a", smoke=False)
    plan = (
        (tmp_path / "a" / "mint-plan.yaml").read_text().replace("name: model", "name: Qwen/Other")
    )
    (tmp_path / "plan.yaml").write_text(plan)
    convert(str(folder), plan=str(tmp_path / "plan.yaml"), out=tmp_path / "b", smoke=False)
    assert "Qwen/Other" not in (tmp_path / "b" / "README.md").read_text()
    assert "Qwen/Other" not in (tmp_path / "b" / "mint-plan.yaml").read_text()


def test_what_the_floor_forbids_costs_no_sensitivity(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mint_mlx.jobs.convert.get_sensitivity", lambda *_: pytest.fail("measured before checking")
    )
    folder = make(llama(1))
    with pytest.raises(MintError, match="safety floor of 9 dB"):
        convert(str(folder), "2.9bpw", tmp_path / "out", effort="balanced")
    spoil_weight(folder, "model.layers.0.mlp.down_proj.weight", float("nan"))
    with pytest.raises(
        MintError, match=r"down_proj\.weight holds NaN"
    ):  # by name, not as an overflow after it
        convert(str(folder), "5bpw", tmp_path / "out", effort="balanced")


def test_what_feedback_does_not_know_is_said(make: Maker, tmp_path: Path) -> None:
    folder = str(make(llama(1)))
    notes = Notes()
    more: dict[str, Any] = {"effort": "balanced", "overrides": ["up_proj=mxfp4"], "smoke": False}
    convert(folder, "6bpw", tmp_path / "out", report=notes, **more)
    assert any("mxfp4" in note and note.endswith("rounded to nearest: 1") for note in notes.said)


# in the second block, and where the head alone is left
@pytest.mark.parametrize(("effort", "units"), [("balanced", 14), ("best", 14), ("best", 99)])
def test_an_interrupted_conversion_goes_on_to_the_same_bytes(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, effort: str, units: int
) -> None:
    from mint_mlx.converters.output.shard_writer import Writer

    folder = str(make(qwen3_moe(2)))
    convert(folder, "5bpw", tmp_path / "whole", effort=effort, smoke=False)
    put = Writer.put
    left = [units]
    if units == 99:
        left = [len(prepare(folder).inventory.order) - 1]

    def stop(self: Writer, unit: str, tensors: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
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


@pytest.mark.parametrize("when", ["refining", "distilling", "rewriting", "verifying", "crashed"])
def test_an_interruption_at_the_end_of_best_loses_nothing(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    folder = str(make(qwen3_moe(2)))
    whole = distil.refine

    def gained(*args: Any, **more: Any) -> distil.Refined:
        found = whole(*args, **more)
        return distil.Refined({name: a * 1.0625 for name, a in found.tensors.items()}, 1.0, 0.5)

    monkeypatch.setattr("mint_mlx.converters.quantizers.distil.refine", gained)
    convert(folder, "5bpw", tmp_path / "whole", effort="best", smoke=False)

    looks: list[int] = []

    def stop(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    places = {
        "refining": "mint_mlx.converters.quantizers.distil.predict",
        "rewriting": "mint_mlx.converters.output.write.replace_tensors",
    }
    with monkeypatch.context() as patch:
        if when == "distilling":
            note = distil._note
            patch.setattr(
                "mint_mlx.converters.quantizers.distil._note", lambda *args: (note(*args), stop())
            )
        elif when in ("verifying", "crashed"):
            put = replace_tensors.replace_tensors
            patch.setattr(
                "mint_mlx.converters.output.write.replace_tensors",
                lambda *args: (put(*args), stop()),
            )
        else:
            patch.setattr(places[when], stop)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, "5bpw", tmp_path / "out", effort="best", smoke=False)
    if when == "crashed":  # the machine: a shard's data had not reached the disk
        shard = next((tmp_path / "out.partial").glob("model*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:1000])
    else:
        for place in ("learn_model", "learn_turns"):  # nothing is learned again
            monkeypatch.setattr(f"mint_mlx.converters.quantizers.{place}.learn", stop)
    if when == "distilling":  # nor does the source predict again, nor is the first step done again
        monkeypatch.setattr("mint_mlx.converters.quantizers.distil.predict", stop)
        monkeypatch.setattr(
            "mint_mlx.converters.quantizers.distil._note",
            lambda place, optimizer, figures, *rest: looks.append(figures[0]),
        )
    convert(folder, "5bpw", tmp_path / "out", effort="best", smoke=False)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]
    assert looks == [2] * (when == "distilling")
    assert not list((tmp_path / "out").glob("scratch-*"))
