"""What a Mac has room for: caches as mlx-lm grows them, the sum line by line, warnings and
refusals.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import TOKENS, VOCAB, Maker, Notes, llama, qwen3_moe
from mlx_lm.models.cache import make_prompt_cache
from released import RELEASED, known

from mint_mlx.base.errors import MintError
from mint_mlx.base.quant_config import KEEP
from mint_mlx.checkpoint import mlxlm
from mint_mlx.checkpoint.layers import list_layers
from mint_mlx.cli import tables
from mint_mlx.converters.quantizers import distil, memory_estimate
from mint_mlx.converters.quantizers.inputs import block_inputs
from mint_mlx.converters.quantizers.registry import QUANTIZERS
from mint_mlx.eval.bench.shapes import COMMON, qwen3_30b
from mint_mlx.jobs import convert, steps
from mint_mlx.jobs.model import prepare
from mint_mlx.jobs.request import Request, place_order
from mint_mlx.measure.sensitivity import measure
from mint_mlx.runtime import memory
from mint_mlx.runtime.kvcache import PREFILL, cache_size
from mint_mlx.runtime.memory import (
    GIB,
    RESERVE,
    Fit,
    Needs,
    fit,
    gpu_limit,
    needs,
    smallest_mac,
    workspace,
)

CONTEXT = PREFILL + 700
# full attention, sliding windows, chunks, latents, states of a linear attention
FAMILIES = [
    "llama",
    "gemma3_text",
    "gpt_oss_bf16",
    "llama4",
    "deepseek_v3",
    "qwen3_next",
    "qwen3_moe",
]


def config_of(family: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((RELEASED / family / "config.json").read_text())
    config.pop("quantization_config", None)
    for table in (config, config.get("text_config") or {}):
        if "sliding_window" in table:
            table["sliding_window"] = 900
    return config


def cached(config: dict[str, Any], context: int, kv_bits: int | None = None) -> int:
    return cache_size(config, context, kv_bits).bytes


@pytest.mark.parametrize("family", [f for f in FAMILIES if known(f)])
def test_the_cache_is_as_large_as_mlx_lm_makes_it(family: str) -> None:
    config = config_of(family)
    model = mlxlm.bare_model(config)
    model.eval()
    caches = make_prompt_cache(model)  # float32: MLX's CPU backend runs experts in no other type
    tokens = mx.array(np.random.default_rng(0).integers(0, VOCAB, (1, CONTEXT)))
    sizes = []
    for start in range(0, CONTEXT, PREFILL):
        model(tokens[:, start : start + PREFILL], cache=caches)
        mx.eval([c.state for c in caches])
        sizes.append(sum(c.nbytes for c in caches))
    predicted = 2 * cached(config, CONTEXT)
    # The windows are dropped to their size after a piece: what stands there between is less than
    # the most there is.
    assert 0.75 * predicted <= max(sizes) <= predicted
    if family in ("llama", "qwen3_moe", "deepseek_v3"):
        assert max(sizes) == predicted


def test_windows_stop_growing_and_full_attention_does_not() -> None:
    gemma, plain = config_of("gemma3_text"), config_of("llama")
    sliding = cached(gemma, 100_000) - cached(gemma, 50_000)
    full = cached(plain, 100_000) - cached(plain, 50_000)
    assert (
        cached(plain, 256) == 2 * 2 * 2 * 16 * 2 * 256
    )  # blocks, keys and values, heads, dimensions, bytes
    assert abs(sliding - full // 2) < full // 100  # one of its two blocks has a window


def test_a_quantized_cache_costs_its_bits_and_two_numbers_a_group() -> None:
    config = config_of("llama") | {"head_dim": 64}
    whole, eight = cached(config, 4096), cached(config, 4096, kv_bits=8)
    assert eight == whole * (8 + 32 / 64) / 16


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3", "gemma2"])
def test_a_quantized_cache_that_mlx_lm_cannot_run_is_refused(family: str) -> None:
    with pytest.raises(
        MintError, match="leave --kv-bits out"
    ):  # heads of 16 dimensions, windows, latents, soft caps
        cached(
            config_of(family) | ({"head_dim": 64} if family == "gemma2" else {}), 4096, kv_bits=8
        )


def test_scores_count_where_attention_is_not_fused() -> None:
    long, config = (
        32_768,
        json.loads((RELEASED / "llama" / "config.json").read_text()) | {"head_dim": 64},
    )
    inventory = list_layers(mlxlm.bare_model(config), config)
    fused = needs(config, inventory, long)
    assert fused.workspace == workspace(inventory, PREFILL)
    scores = 2 * 2 * config["num_attention_heads"] * PREFILL * long
    assert needs(config, inventory, long, kv_bits=8).workspace == fused.workspace + scores
    odd = config | {"head_dim": 48}
    inventory = list_layers(mlxlm.bare_model(odd), odd)
    assert needs(odd, inventory, long).workspace == workspace(inventory, PREFILL) + scores


def test_workspace_counts_each_tokens_experts(make: Maker) -> None:
    dense = prepare(str(make(llama(2), "dense"))).inventory
    sparse = prepare(str(make(qwen3_moe(2), "sparse"))).inventory
    attention = 128 + 64 + 64 + 128
    assert workspace(dense, 10) == 2 * 10 * (attention + 2 * 192 + 128 + 2 * 192)
    # two of four experts a token: their outputs, and their inputs gathered (a third for each of
    # three layers)
    experts = 2 * (64 + 64 + 128) + 2 * (2 * 128 // 3) + 2 * 64 // 3
    assert workspace(sparse, 10) == 2 * 10 * (attention + 4 + experts + 2 * 2 * 128)


def test_the_limits_of_macs() -> None:
    assert gpu_limit(24 * GIB) == 16 * GIB and gpu_limit(64 * GIB) == 48 * GIB
    beside = Needs(8192, None, cache=GIB, workspace=GIB)
    assert smallest_mac(13 * GIB, beside) == 24 and smallest_mac(13 * GIB + 1, beside) == 32
    assert smallest_mac(400 * GIB, beside) is None


def test_a_fit_is_a_sum(make: Maker, tmp_path: Path) -> None:
    job = prepare(str(make(qwen3_moe(2))))
    beside = needs(job.source.config, job.inventory, 1000)
    found = fit("16GiB", beside)
    assert found.budget == 16 * GIB * 2 // 3 - RESERVE - beside.cache - beside.workspace
    columns, rows = tables.fit_rows(found)
    assert len(columns) == 2 and len(rows) == 5
    # a machine that leaves 150 KB for weights
    least = -(-(RESERVE + beside.cache + beside.workspace + 150_000) * 3 // 2)
    result = convert.convert(
        str(tmp_path / "model"), smoke=False, fit=f"{least}B", context=1000, out=tmp_path / "out"
    )
    assert 140_000 < result.bytes <= 150_001 and "fit" in (result.plan.budget or "")


def test_this_mac_is_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Needs(8192, None, GIB, GIB)
    monkeypatch.setattr(memory, "machine_memory", lambda: 64 * GIB)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert fit("this-mac", beside).limit == 48 * GIB and not fit("this-mac", beside).measured
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 50 * GIB})
    assert fit("this-mac", beside).limit == 50 * GIB and fit("this-mac", beside).measured


def test_the_wired_limit_is_mentioned_where_it_helps(make: Maker) -> None:
    model = str(make(llama(2)))
    request = Request(model, fit="64GiB")
    assert tables.raise_hint(place_order(request)) is None  # all of it fits anyway
    job = prepare(model)
    beside = needs(job.source.config, job.inventory)
    order = place_order(Request(model, budget="100MB"))
    tight = Fit(64 * GIB, beside.total + 50_000, True, beside)
    hint = tables.raise_hint(replace(order, fit=tight))
    assert hint and "iogpu.wired_limit_mb=57344" in hint and "restart" in hint


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"fit": "huge"}, "--fit huge is no machine"),
        ({"fit": "4.5bpw"}, "is no machine"),
        ({"fit": "1GiB"}, "nothing is left for the weights"),
        ({"fit": "32GiB", "context": 0}, "a context of 0 tokens"),
        ({"fit": "32GiB", "kv_bits": 7}, "--kv-bits 7 is unknown"),
        ({"fit": "32GiB", "budget": "1GB"}, "exactly one of"),
    ],
)
def test_fits_that_cannot_be(make: Maker, more: dict[str, Any], message: str) -> None:
    with pytest.raises(MintError, match=message):
        convert.convert(str(make(llama(1))), **more)


def test_a_budget_beyond_this_machine_is_said(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Notes()
    request = Request(str(make(llama(1))), budget="100MB")
    place_order(request, notes)
    assert notes.said == []
    monkeypatch.setattr(memory, "machine_memory", lambda: 1000)
    place_order(request, notes)
    assert any("more than this machine can run" in note for note in notes.said)


def test_what_takes_more_memory_than_there_is_is_refused_before_it_starts(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_estimate, "machine_memory", lambda: 700_000_000)
    model, out = str(make(llama(1))), tmp_path / "out"
    with pytest.raises(
        MintError,
        match=r"this takes 1\.3.* GB .*this machine has 700.00 MB .*--effort fast, which takes 50",
    ):
        convert.convert(model, "5bpw", out, effort="balanced")
    with pytest.raises(MintError, match="larger machine"):
        steps.write_sensitivity(model, tmp_path / "s.npz")
    assert not out.exists()
    assert convert.convert(model, "5bpw", out, effort="fast", smoke=False).path == out


def test_the_peak_follows_from_one_block_and_not_from_the_depth() -> None:
    """Measured on two streamed layers of Qwen3-30B-A3B (eval/bench): 7.8 GB for a sensitivity, 8.4
    with feedback.
    """
    config = qwen3_30b(48)[0] | COMMON
    inventory = list_layers(mlxlm.bare_model(config), config)
    assert 7e9 < QUANTIZERS["rtn"].memory(inventory, 4096, True) < 11e9
    assert 8e9 < QUANTIZERS["gptq"].memory(inventory, 4096, True) < 11e9
    deeper = list_layers(mlxlm.bare_model(config | {"num_hidden_layers": 60}), config)
    assert QUANTIZERS["gptq"].memory(deeper, 4096, True) == QUANTIZERS["gptq"].memory(
        inventory, 4096, True
    )
    assert QUANTIZERS["rtn"].memory(inventory, 4096, False) < 3e9


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
    made = measure(job.source, job.inventory, TOKENS, "random")
    block = [layer for layer in job.inventory.layers if layer.block == 1]
    inputs = dict(block_inputs(job.source, job.inventory, made, batch=4))[1]
    arrays = [np.asarray(batch.x) for found in inputs.values() for batch in found.batches]
    held = {array.ctypes.data: array.size for array in arrays}  # several layers read the same
    assert (
        sum(held.values()) <= TOKENS.size * memory_estimate._read(block) <= 1.3 * sum(held.values())
    )


def test_a_gpu_holds_weights_as_they_are_stored(
    make: Maker, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_estimate, "WINDOWS", 0)  # no activations
    source = prepare(str(make(llama(2)))).inventory
    convert.convert(str(make(llama(2))), None, tmp_path / "q", uniform="4bit-g64", smoke=False)
    quantized = prepare(str(tmp_path / "q")).inventory
    on_a_cpu = [QUANTIZERS["rtn"].memory(one, 4096, True) for one in (source, quantized)]
    request.getfixturevalue("like_a_gpu")
    on_a_gpu = [QUANTIZERS["rtn"].memory(one, 4096, True) for one in (source, quantized)]
    size = sum(layer.size for layer in source.layers)
    assert on_a_cpu[0] == on_a_cpu[1] and on_a_cpu[0] - on_a_gpu[0] == pytest.approx(
        2 * size, rel=0.1
    )
    assert on_a_gpu[0] - on_a_gpu[1] == pytest.approx((2 - 4.5 / 8) * size, rel=0.1)
    monkeypatch.setattr(memory, "machine_limit", lambda: (6 * GIB, True))
    assert memory.room() == 6 * GIB


def test_what_refining_holds_is_all_counted(demo_model: Path, tmp_path: Path) -> None:
    convert.convert(str(demo_model), uniform="4bit-g64", out=tmp_path / "made", smoke=False)
    inventory = prepare(str(tmp_path / "made")).inventory
    estimate = distil.refining(
        inventory, {layer.path: layer.stored or KEEP for layer in inventory.layers}
    )
    tokens = np.random.default_rng(0).integers(0, 256, (16, 256)).astype(np.int32)
    ids = np.broadcast_to(np.arange(256, dtype=np.int32), (*tokens.shape, 256))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    distil.refine(
        tmp_path / "made",
        distil.Targets(tokens, ids, np.full(ids.shape, -np.log(256), np.float32)),
        steps=1,
    )
    held = mx.get_peak_memory() - before
    assert 0.5 * estimate < held < estimate


def test_a_model_without_blocks_has_a_peak(make: Maker) -> None:
    inventory = prepare(str(make(llama(1)))).inventory
    ends = replace(
        inventory, layers=tuple(layer for layer in inventory.layers if layer.block is None)
    )
    assert QUANTIZERS["learn"].memory(ends, 4096, True) > QUANTIZERS["rtn"].memory(
        ends, 4096, False
    )


def test_experts_are_learned_in_as_few_turns_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = qwen3_30b(48)[0] | COMMON
    inventory = list_layers(mlxlm.bare_model(config), config)
    found = {}
    for gib in (16, 20, 24, 36):
        monkeypatch.setattr(memory_estimate, "room", lambda gib=gib: gib * 2**30)
        found[gib] = (
            memory_estimate.turns(inventory, 65_536),
            QUANTIZERS["learn"].memory(inventory, 65_536, True),
        )
    assert [turns for turns, _ in found.values()] == [4, 4, 2, 1]
    assert all(needed <= gib * 2**30 for gib, (_, needed) in found.items() if gib > 16)
    assert found[16][1] > 16 * 2**30  # refused: one expert after the other would take as much


def test_a_quantized_cache_that_leaves_less_is_told_of(demo_model: Path) -> None:
    """Its scores are written out, which the fused attention does without."""
    notes = Notes()
    for bits, told in ((None, 0), (8, 1)):
        order = place_order(
            Request(str(demo_model), fit="8GiB", context=32768, kv_bits=bits), notes
        )
        assert sum("without --kv-bits" in note for note in notes.said) == told
        assert order.fit is not None


def test_a_container_has_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, without = tmp_path / "memory.max", tmp_path / "none"
    whole = memory.machine_memory()
    monkeypatch.setattr(memory, "CONTAINER", (str(without), str(limit)))
    for text, most in (("max\n", whole), (f"{GIB}\n", min(GIB, whole)), (f"{2**63}\n", whole)):
        limit.write_text(text)
        assert memory.machine_memory() == most
