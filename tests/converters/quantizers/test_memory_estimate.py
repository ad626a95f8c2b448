"""What a conversion takes of memory, estimated before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import TOKENS, Maker, llama, order_for, qwen3_moe

from mint_mlx.base.errors import MintError
from mint_mlx.base.quant_config import KEEP
from mint_mlx.checkpoint import mlxlm
from mint_mlx.checkpoint.layers import list_layers
from mint_mlx.converters.quantizers import distil, memory_estimate
from mint_mlx.converters.quantizers.inputs import block_inputs
from mint_mlx.converters.quantizers.registry import QUANTIZERS
from mint_mlx.eval.bench.shapes import COMMON, qwen3_30b
from mint_mlx.jobs import convert, steps
from mint_mlx.jobs.model import prepare
from mint_mlx.jobs.request import Request
from mint_mlx.measure.fisher import measure
from mint_mlx.measure.text import Text
from mint_mlx.runtime import memory
from mint_mlx.runtime.memory import GIB


def test_what_takes_more_memory_than_there_is_is_refused_before_it_starts(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_estimate, "machine_memory", lambda: 700_000_000)
    model = str(make(llama(1)))
    out = tmp_path / "out"
    sentence = r"takes 1\.3.* GB .*this machine has 700.00 MB .*--effort fast, which takes 50"
    with pytest.raises(MintError, match=rf"this {sentence}"):
        convert.convert(model, "5bpw", out, effort="balanced")
    with pytest.raises(MintError, match="larger machine"):
        steps.write_sensitivity(model, tmp_path / "s.npz")
    assert not out.exists()
    assert convert.convert(model, "5bpw", out, effort="fast", smoke=False).path == out


def test_a_quantizer_that_takes_less_is_named(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    order = order_for(Request(str(make(qwen3_moe(1))), budget="5bpw", effort="balanced"))
    less = QUANTIZERS["search-gptq"].memory(order.job.inventory, order.tokens, True)
    assert less < order.peak_memory
    monkeypatch.setattr(memory_estimate, "machine_memory", lambda: order.peak_memory - 1)
    with pytest.raises(MintError, match="give --quantizer search-gptq, which takes"):
        order.check_memory()


def test_the_peak_follows_from_one_block_and_not_from_the_depth() -> None:
    """Two streamed layers of Qwen3-30B-A3B took 7.8 GB, with error feedback 8.4 (eval/bench)."""
    config = qwen3_30b(48)[0] | COMMON
    inventory = list_layers(mlxlm.bare_model(config), config)
    fed = QUANTIZERS["gptq"].memory(inventory, 4096, True)
    assert 7e9 < QUANTIZERS["rtn"].memory(inventory, 4096, True) < 11e9
    assert 8e9 < fed < 11e9
    deeper = list_layers(mlxlm.bare_model(config | {"num_hidden_layers": 60}), config)
    assert QUANTIZERS["gptq"].memory(deeper, 4096, True) == fed
    assert QUANTIZERS["rtn"].memory(inventory, 4096, False) < 3e9

    # Behind quantized layers a block stays as well (12.6 GB).
    assert 11e9 < QUANTIZERS["search-gptaq"].memory(inventory, 4096, True) < 16e9


@pytest.mark.parametrize(
    ("shapes", "device"),
    [(llama(2), None), (llama(2), "like_a_gpu"), (qwen3_moe(2, experts=8), None)],
    ids=["dense", "dense_on_a_gpu", "experts"],
)
def test_what_layers_read_is_all_counted(
    make: Maker, shapes: dict[str, Any], device: str | None, request: pytest.FixtureRequest
) -> None:
    if device:
        request.getfixturevalue(device)
    job = prepare(str(make(shapes)))
    sensitivity = measure(job.source, job.inventory, Text(TOKENS, "random"))
    block = [layer for layer in job.inventory.layers if layer.block == 1]
    inputs = dict(block_inputs(job.source, job.inventory, sensitivity, batch=4))[1]

    # Several layers read the same array, which counts once.
    arrays = [np.asarray(batch.x) for layer in inputs.values() for batch in layer.batches]
    size = sum({array.ctypes.data: array.size for array in arrays}.values())
    assert size <= TOKENS.size * memory_estimate._read(block) <= 1.3 * size


def test_a_gpu_holds_weights_as_they_are_stored(
    make: Maker, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_estimate, "WINDOWS", 0)  # no activations
    source = prepare(str(make(llama(2)))).inventory
    convert.convert(str(make(llama(2))), None, tmp_path / "q", uniform="4bit-g64", smoke=False)
    quantized = prepare(str(tmp_path / "q")).inventory

    # A CPU runs both in float32, a GPU as they are stored.
    on_a_cpu = [QUANTIZERS["rtn"].memory(one, 4096, True) for one in (source, quantized)]
    request.getfixturevalue("like_a_gpu")
    on_a_gpu = [QUANTIZERS["rtn"].memory(one, 4096, True) for one in (source, quantized)]
    size = sum(layer.size for layer in source.layers)
    assert on_a_cpu[0] == on_a_cpu[1]
    assert on_a_cpu[0] - on_a_gpu[0] == pytest.approx(2 * size, rel=0.1)
    assert on_a_gpu[0] - on_a_gpu[1] == pytest.approx((2 - 4.5 / 8) * size, rel=0.1)
    monkeypatch.setattr(memory, "machine_limit", lambda: (6 * GIB, True))
    assert memory.room() == 6 * GIB


def test_what_refining_holds_is_all_counted(demo_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert.convert(str(demo_model), uniform="4bit-g64", out=out, smoke=False)
    inventory = prepare(str(out)).inventory
    choice = {layer.path: layer.stored or KEEP for layer in inventory.layers}
    estimate = distil.refining(inventory, choice)

    # One step on targets that are all alike.
    tokens = np.random.default_rng(0).integers(0, 256, (16, 256)).astype(np.int32)
    ids = np.broadcast_to(np.arange(256, dtype=np.int32), (*tokens.shape, 256))
    targets = distil.Targets(Text(tokens), ids, np.full(ids.shape, -np.log(256), np.float32))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    distil.refine(out, targets, steps=1)
    held = mx.get_peak_memory() - before
    assert 0.5 * estimate < held < estimate


def test_a_model_without_blocks_has_a_peak(make: Maker) -> None:
    inventory = prepare(str(make(llama(1)))).inventory
    layers = tuple(layer for layer in inventory.layers if layer.block is None)
    ends = replace(inventory, layers=layers)
    rounded = QUANTIZERS["rtn"].memory(ends, 4096, False)
    assert QUANTIZERS["learn"].memory(ends, 4096, True) > rounded


def test_experts_are_learned_in_as_few_turns_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = qwen3_30b(48)[0] | COMMON
    inventory = list_layers(mlxlm.bare_model(config), config)
    turns, peaks = {}, {}
    for gib in (16, 20, 24, 36):
        monkeypatch.setattr(memory_estimate, "room", lambda gib=gib: gib * 2**30)
        turns[gib] = memory_estimate.turns(inventory, 65_536)
        peaks[gib] = QUANTIZERS["learn"].memory(inventory, 65_536, True) / 2**30
    assert list(turns.values()) == [4, 4, 2, 1]
    assert all(peaks[gib] <= gib for gib in (20, 24, 36))
    assert peaks[16] > 16  # refused: one expert after the other would take as much
