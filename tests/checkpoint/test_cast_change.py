"""`--dtype`: everything in another 16-bit type, how much that changes, and what doesn't fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import TOKENS, Maker, Notes, edit_config, kl, llama, spoil_weight

from mint_mlx.base.errors import MintError
from mint_mlx.base.hf_config import stated_dtype, with_stated_dtype
from mint_mlx.checkpoint.cast_change import CastChange, cast_change
from mint_mlx.checkpoint.layer_stream import written_dtypes
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.model import prepare
from mint_mlx.jobs.request import Request, check_request
from mint_mlx.measure import cache
from mint_mlx.runtime.cast_divergence import cast_divergence


def change(folder: Path, code: str) -> CastChange | None:
    job = prepare(str(folder))
    return cast_change(job.source, job.inventory, code, lambda *_: None)


def test_the_change_is_that_of_the_numbers_themselves(make: Maker) -> None:
    folder = make(llama(1), dtype=mx.float32)
    spoil_weight(folder, "lm_head.weight", 1e-9)
    weights: dict[str, mx.array] = mx.load(str(folder / "model.safetensors"))  # type: ignore[assignment]
    for code, dtype in (("F16", mx.float16), ("BF16", mx.bfloat16)):
        relative = {}
        for name, array in weights.items():
            exact, cast = np.array(array), np.array(array.astype(dtype).astype(mx.float32))
            relative[name] = np.linalg.norm(cast - exact) / np.linalg.norm(exact)
        found = change(folder, code)
        assert found is not None
        assert found.relative == pytest.approx(max(relative.values()), rel=1e-3)
        assert found.name == max(relative, key=lambda name: relative[name])
        assert found.zeros == (code == "F16")


def test_weights_of_that_type_and_16_bit_ones_are_counted_exactly(make: Maker) -> None:
    folder = make(llama(1))
    assert change(folder, "BF16") is None
    spoil_weight(folder, "lm_head.weight", 1e-9)
    found = change(folder, "F16")
    assert found is not None
    assert found.zeros == 1
    assert 0 < found.relative < 1e-6


def test_what_float16_cannot_hold_is_refused_by_name(make: Maker, tmp_path: Path) -> None:
    folder = make(llama(1))
    spoil_weight(folder, "model.layers.0.mlp.up_proj.weight", 1e5)
    with pytest.raises(MintError, match=r"up_proj.weight .*float16 cannot hold.*--dtype bfloat16"):
        convert(str(folder), "5bpw", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    with pytest.raises(MintError, match="--dtype must be float16 or bfloat16"):
        check_request(Request(str(folder), "5bpw", dtype="float32"))


def test_all_16_bit_tensors_are_written_in_it(make: Maker, tmp_path: Path) -> None:
    folder, notes = make(llama(1)), Notes()
    out = tmp_path / "out"
    convert(str(folder), uniform="8bit-g32", out=out, dtype="float16", smoke=False, report=notes)
    weights: dict[str, mx.array] = mx.load(str(out / "model.safetensors"))  # type: ignore[assignment]
    assert {array.dtype for array in weights.values()} == {mx.float16, mx.uint32}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"
    assert any("--dtype float16 changes" in note for note in notes.said)
    assert kl(folder, out, TOKENS) < 1e-3


def test_a_model_that_overflows_float16_is_written_in_bfloat16(make: Maker, tmp_path: Path) -> None:
    folder = make(llama(1), dtype=mx.float16)
    edit_config(folder, torch_dtype="float16")
    out = tmp_path / "out"
    convert(str(folder), out=out, dequantize=True, dtype="bfloat16", smoke=False)
    weights: dict[str, mx.array] = mx.load(str(out / "model.safetensors"))  # type: ignore[assignment]
    assert {array.dtype for array in weights.values()} == {mx.bfloat16}


def test_the_divergence_of_a_cast_is_that_of_the_cast_checkpoint(
    make: Maker, tmp_path: Path
) -> None:
    folder, notes = make(llama(1), dtype=mx.float16), Notes()
    out = tmp_path / "out"
    options: dict[str, Any] = {"dtype": "bfloat16", "smoke": False, "report": notes}
    convert(str(folder), out=out, dequantize=True, **options)
    inventory = prepare(str(folder), dtype="bfloat16").inventory
    written = written_dtypes(inventory)
    divergence = cast_divergence(folder, "bfloat16", written, TOKENS)
    assert divergence == pytest.approx(kl(folder, out, TOKENS[:2]), rel=0.02)
    assert divergence > 1e-7
    assert cast_divergence(folder, "float16", dict.fromkeys(written, "F16"), TOKENS) == 0

    # It is told, on a short text also where nothing else needs one.
    assert any("the cast to bfloat16 costs a KL of" in note for note in notes.said)
    assert "divergence of the cast" in notes.expected
    notes.said.clear()
    plan: dict[str, Any] = {"effort": "balanced", "budget": "6bpw", "out": tmp_path / "mixed"}
    convert(str(folder), **plan, **options)
    assert any("the cast to bfloat16 costs a KL of" in note for note in notes.said)
    assert "divergence of the cast" in notes.expected


def test_a_cast_that_takes_long_to_measure_names_the_command(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mint_mlx.jobs.stages.QUICK", 0)
    monkeypatch.setattr("mint_mlx.jobs.stages.fits_here", lambda size: False)
    folder, notes = make(llama(1), dtype=mx.float16), Notes()
    convert(str(folder), "6bpw", tmp_path / "out", dtype="bfloat16", smoke=False, report=notes)
    (note,) = [note for note in notes.said if "costs in KL was not measured" in note]
    assert f"convert {folder} --dequantize --dtype bfloat16" in note
    assert "divergence of the cast" not in notes.expected


def test_a_type_is_stated_wherever_the_config_states_one() -> None:
    nested = {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "x": 1}}
    assert with_stated_dtype(nested, "float16") == {
        "dtype": "float16",
        "text_config": {"torch_dtype": "float16", "x": 1},
    }
    assert stated_dtype(with_stated_dtype({}, "float16")) == "F16"


def test_a_sensitivity_serves_both_types_and_a_profile_one(make: Maker) -> None:
    folder = str(make(llama(1)))
    sources = [prepare(folder, dtype=dtype).source for dtype in (None, "float16", "bfloat16")]
    assert len({cache.sensitivity_path(source, 1024) for source in sources}) == 1
    assert len({cache.profile_path(source, {}, "1.0") for source in sources}) == 3
    assert len({source.identity for source in sources}) == 3
