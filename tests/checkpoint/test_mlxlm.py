"""Stock mlx-lm, as far as mint-mlx loads and runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers import Maker, Notes, edit_weights, llama, qwen3_moe
from released import RELEASED

from mint_mlx.base.errors import MintError
from mint_mlx.checkpoint import mlxlm
from mint_mlx.jobs.convert import convert

NORM = "model.layers.0.input_layernorm.weight"


def test_a_result_that_cannot_generate_gets_no_name(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlx_lm

    def fail(*args: Any, **kwargs: Any) -> str:
        raise TypeError("unsupported operand")

    monkeypatch.setattr(mlx_lm, "stream_generate", fail)
    with pytest.raises(MintError, match="cannot generate"):
        convert(str(make(qwen3_moe(1))), "5bpw", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_result_that_stock_mlx_lm_cannot_load_gets_no_name(make: Maker, tmp_path: Path) -> None:
    folder = make(qwen3_moe(1))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2.0}')
    with pytest.raises(MintError, match=r"cannot load the result .* eos_token_id"):
        convert(str(folder), "5bpw", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_result_that_computes_no_numbers_gets_no_name(make: Maker, tmp_path: Path) -> None:
    folder = make(llama(1))
    edit_weights(folder, lambda w: w | {NORM: mx.full(w[NORM].shape, 3e38, dtype=mx.bfloat16)})
    with pytest.raises(MintError, match=r"computes no numbers \(NaN\): the source's weights"):
        convert(str(folder), uniform="4bit-g32", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_result_that_writes_nothing_is_told(make: Maker, tmp_path: Path) -> None:
    folder = make(llama(1))
    edit_weights(folder, lambda w: {name: mx.zeros_like(array) for name, array in w.items()})
    notes = Notes()
    convert(str(folder), uniform="4bit-g32", out=tmp_path / "out", report=notes)
    assert any("wrote nothing after its prompt" in said for said in notes.said)


def test_configs_are_adapted_only_while_a_split_model_is_loaded() -> None:
    from mlx_lm import utils

    folder = RELEASED / "t5" / "llama"
    stock = utils.load_config
    with mlxlm._adapted_configs():
        adapted = utils.load_config(folder)
    assert adapted["rope_theta"] == adapted["rope_parameters"]["rope_theta"] != 10000
    assert utils.load_config is stock
    assert "rope_theta" not in utils.load_config(folder)
