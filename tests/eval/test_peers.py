"""mlx-lm's quantizers as peers: their sizes, their types, and what can't run."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from helpers import OLD_MLX_LM, Maker, Notes, llama, qwen3_moe
from scoring import by_method

from mint_mlx.eval import peer_methods, peers, report
from mint_mlx.eval.compare import compare
from mint_mlx.eval.methods import check_methods, peer_tasks
from mint_mlx.eval.settings import Settings
from mint_mlx.jobs.model import prepare


def test_recipes_are_built_near_the_budget_only(make: Maker, settings: Settings) -> None:
    folder = str(make(qwen3_moe(2)))
    notes = Notes()
    methods = ["mixed_2_6", "mixed_4_6"]
    (row,) = compare(folder, ["4.8bpw"], methods, settings=settings, speed=False, report=notes).rows
    job = prepare(folder)
    size = peers.recipe_size(job.source, job.inventory, "mixed_4_6")
    assert row["bytes"] == pytest.approx(size, rel=0.03)
    assert any("mixed_2_6 has no size near" in said for said in notes.said)


@pytest.mark.skipif(OLD_MLX_LM, reason="mlx-lm 0.31's own gptq fails on MoEs")
def test_calibrated_peers_run_and_what_cannot_run_says_why(
    make: Maker, tmp_path: Path, settings: Settings
) -> None:
    folder = str(make(qwen3_moe(1, experts=8)))
    methods = ["balanced", "gptq", "gptq-guarded", "feedback", "awq", "dynamic_quant"]
    text = str(tmp_path / "baseline.txt")
    comparison = compare(folder, ["5bpw"], methods, (), text, settings, speed=False)
    rows = by_method(comparison.rows)
    assert "qwen3_moe" in rows["awq"]["reason"]
    assert "kl" not in rows["awq"]
    for method in ("gptq", "gptq-guarded", "feedback", "dynamic_quant"):
        assert rows[method]["sees_text"]
        assert rows[method]["kl"] > 0
    assert not rows["balanced"]["sees_text"]
    assert rows["balanced"]["kl"] > 0

    table = report.markdown(comparison, "x")
    assert "awq" in table.split("Not run:")[1]
    assert "| balanced | own text |" in table
    assert "| gptq | text |" in table

    # Scales are of 16 bits; only the guarded one's router has 8 bits.
    folders = (tmp_path / "cache").rglob("checkpoint")
    checkpoints = {path.parent.name.rpartition("-")[0]: path for path in folders}
    for method, bits in (("gptq", 4), ("gptq-guarded", 8)):
        tensors = mx.load(str(checkpoints[method] / "model.safetensors"))
        scales = {array.dtype for name, array in tensors.items() if "scales" in name}
        assert scales == {mx.bfloat16}
        inventory = prepare(str(checkpoints[method])).inventory
        stored = {layer.role: layer.stored for layer in inventory.layers}
        assert stored["router"] is not None
        assert stored["router"].bits == bits


@pytest.mark.skipif(OLD_MLX_LM, reason="mlx-lm 0.31's own dwq fails")
def test_dwq_runs(
    make: Maker, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_methods, "DWQ_RATES", (1e-4,))
    text = tmp_path / "baseline.txt"
    text.write_text("jackdaws love my big sphinx of quartz " * 60)
    folder = str(make(qwen3_moe(1)))
    methods = ["nmse", "dwq"]
    comparison = compare(folder, ["5bpw"], methods, (), str(text), settings, speed=False)
    assert by_method(comparison.rows)["dwq"]["kl"] > 0


def test_a_float32_source_gives_no_peer_float32_scales(
    make: Maker, tmp_path: Path, settings: Settings
) -> None:
    folder = make(llama(1), dtype=mx.float32)
    config = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    compare(str(folder), ["5bpw"], ["uniform-g64", "mixed_4_6"], settings=settings, speed=False)
    for checkpoint in (tmp_path / "cache").rglob("checkpoint"):
        tensors = mx.load(str(checkpoint / "model.safetensors"))
        assert mx.float32 not in {array.dtype for array in tensors.values()}


def test_without_a_baseline_text_calibrated_peers_are_listed(make: Maker) -> None:
    job = prepare(str(make(llama(1))))
    tasks = list(peer_tasks(job, check_methods(None, None), [200_000], None, Notes()))
    refused = {task.method for task in tasks if task.reason}
    assert refused == set(peers.CALIBRATED)
