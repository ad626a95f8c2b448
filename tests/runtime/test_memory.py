"""What a Mac has room for: its limit, less a cache and a workspace."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from helpers import Maker, llama, qwen3_moe
from released import RELEASED

from mint_mlx.checkpoint import mlxlm
from mint_mlx.checkpoint.layers import list_layers
from mint_mlx.cli import tables
from mint_mlx.jobs import convert
from mint_mlx.jobs.model import prepare
from mint_mlx.runtime import memory
from mint_mlx.runtime.kvcache import PREFILL
from mint_mlx.runtime.machine import parse_machine
from mint_mlx.runtime.memory import (
    GIB,
    RESERVE,
    Needs,
    fit,
    gpu_limit,
    needs,
    smallest_mac,
    workspace,
)


def test_scores_count_where_attention_is_not_fused() -> None:
    long = 32_768
    config = json.loads((RELEASED / "llama" / "config.json").read_text()) | {"head_dim": 64}
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
    # Two of four experts a token: their outputs, and their inputs gathered (a third for each of
    # three layers).
    experts = 2 * (64 + 64 + 128) + 2 * (2 * 128 // 3) + 2 * 64 // 3
    assert workspace(sparse, 10) == 2 * 10 * (attention + 4 + experts + 2 * 2 * 128)


def test_the_limits_of_macs() -> None:
    assert gpu_limit(24 * GIB) == 16 * GIB
    assert gpu_limit(64 * GIB) == 48 * GIB
    beside = Needs(8192, None, cache=GIB, workspace=GIB)
    assert smallest_mac(13 * GIB, beside) == 24
    assert smallest_mac(13 * GIB + 1, beside) == 32
    assert smallest_mac(400 * GIB, beside) is None


def test_a_fit_is_a_sum(make: Maker, tmp_path: Path) -> None:
    job = prepare(str(make(qwen3_moe(2))))
    beside = needs(job.source.config, job.inventory, 1000)
    small_mac = fit(parse_machine("16GiB"), beside)
    assert small_mac.budget == 16 * GIB * 2 // 3 - RESERVE - beside.cache - beside.workspace
    columns, rows = tables.fit_lines(small_mac)
    assert len(columns) == 2
    assert len(rows) == 5

    # A machine that leaves 150 KB for weights.
    least = -(-(RESERVE + beside.cache + beside.workspace + 150_000) * 3 // 2)
    more = {"fit": f"{least}B", "context": 1000, "smoke": False}
    result = convert.convert(str(tmp_path / "model"), out=tmp_path / "out", **more)
    assert 140_000 < result.bytes <= 150_001
    assert "fit" in (result.plan.budget or "")


def test_this_mac_is_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Needs(8192, None, GIB, GIB)
    monkeypatch.setattr(memory, "machine_memory", lambda: 64 * GIB)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert fit(parse_machine("this-mac"), beside).limit == 48 * GIB
    assert not fit(parse_machine("this-mac"), beside).measured
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 50 * GIB})
    assert fit(parse_machine("this-mac"), beside).limit == 50 * GIB
    assert fit(parse_machine("this-mac"), beside).measured


def test_a_container_has_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, without = tmp_path / "memory.max", tmp_path / "none"
    whole = memory.machine_memory()
    monkeypatch.setattr(memory, "CONTAINER", (str(without), str(limit)))
    for text, most in (("max\n", whole), (f"{GIB}\n", min(GIB, whole)), (f"{2**63}\n", whole)):
        limit.write_text(text)
        assert memory.machine_memory() == most
