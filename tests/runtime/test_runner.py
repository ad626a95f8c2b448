"""A stock model, loaded for measuring: its trunk and head alone give what the whole gives."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import TOKENS, Maker, llama, qwen3_moe

from mint_mlx.jobs.convert import convert
from mint_mlx.runtime import runner
from mint_mlx.runtime.cpu_ops import dense_products
from mint_mlx.runtime.device import on_cpu
from mint_mlx.runtime.runner import load_runner, logits_of, trunk_output, trunk_output_from

IDS = mx.array(TOKENS)


def near(actual: mx.array, expected: mx.array) -> None:
    rough = 1e-5 if on_cpu() else 0.05
    np.testing.assert_allclose(np.array(actual), np.array(expected), rtol=rough, atol=rough)


def test_trunk_and_head_are_the_model(make: Maker) -> None:
    loaded = load_runner(make(qwen3_moe(2)))
    assert (loaded.trunk is loaded.model.model, loaded.block_list) == (True, "layers")
    top = trunk_output(loaded, IDS)
    near(top, loaded.model.model(IDS))
    near(logits_of(loaded, IDS, top), loaded.model(IDS).astype(mx.float32))


def test_after_the_last_block_comes_the_norm_alone(make: Maker) -> None:
    loaded = load_runner(make(llama(2)))
    hidden = mx.random.normal((*TOKENS.shape, 128), key=mx.random.key(0))
    near(trunk_output_from(loaded, IDS, hidden), loaded.model.model.norm(hidden))


def test_a_model_is_streamed_where_it_does_not_fit(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(llama(1))
    assert runner.fits(folder)
    assert not load_runner(folder).streamed
    monkeypatch.setattr(runner, "fits_here", lambda size: False)
    assert not runner.fits(folder)
    assert load_runner(folder).streamed


def test_quantized_layers_stay_packed_where_the_model_fits_only_so(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = convert(str(make(qwen3_moe(1))), uniform="4bit-g64", out=tmp_path / "q", smoke=False).path
    whole = load_runner(out, packed=True)
    size = (out / "model.safetensors").stat().st_size
    monkeypatch.setattr(runner, "fits_here", lambda needed: needed < 2 * size)
    assert runner.fits(out, packed=True)
    assert runner.fits(out) == (not on_cpu())

    loaded = load_runner(out, packed=True)
    assert not loaded.streamed
    experts = loaded.blocks[0].mlp.switch_mlp.up_proj
    assert type(experts).__name__ == "QuantizedSwitchLinear"
    with dense_products():
        near(loaded.model(IDS), whole.model(IDS))
    monkeypatch.setattr(runner, "fits_here", lambda needed: False)
    assert load_runner(out, packed=True).streamed


def test_a_streamed_block_is_read_and_dropped(make: Maker) -> None:
    loaded = load_runner(make(llama(2)), streamed=True)
    block = loaded.blocks[0]
    runner.load_block(loaded, block)
    whole = load_runner(loaded.folder, streamed=False)
    near(block.mlp.up_proj.weight, whole.blocks[0].mlp.up_proj.weight)
    runner.release_block(loaded, block)
    assert "weight" not in block.mlp.up_proj


def test_quantized_layers_become_dense_where_that_is_asked_for(make: Maker, tmp_path: Path) -> None:
    result = convert(str(make(llama(1))), uniform="4bit-g64", out=tmp_path / "q", smoke=False)
    path = "model.layers.0.mlp.up_proj"
    stored = mx.load(str(result.path / "model.safetensors"))
    packed = [stored[f"{path}.{name}"] for name in ("weight", "scales", "biases")]
    expected = mx.dequantize(*packed, group_size=64, bits=4)
    dense = runner.make_dense(load_runner(result.path), [path])
    assert list(dense) == [path]
    near(dense[path].weight.astype(mx.float32), expected.astype(mx.float32))
