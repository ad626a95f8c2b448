"""What layers read: their second moments, and the weight of each row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from families import write_family
from helpers import TOKENS, Maker, qwen3_moe

from mint_mlx.converters.quantizers.inputs import Moments, block_inputs
from mint_mlx.jobs.model import prepare
from mint_mlx.measure.sensitivity import measure


def test_layers_that_no_block_follows_don_t_end_the_walk(make: Maker) -> None:
    job = prepare(str(make(qwen3_moe(2))))
    made = measure(job.source, job.inventory, TOKENS, "random", batch=2)
    moments = Moments(job.source, job.inventory, made)
    assert moments.of("model.embed_tokens") is not None
    assert moments.of("model.layers.0.mlp.switch_mlp.down_proj") is not None
    assert moments.of("model.layers.1.mlp.gate") is not None
    assert moments.of("lm_head") is not None


def test_moments_are_those_of_the_layers_inputs(make: Maker) -> None:
    job = prepare(str(make(qwen3_moe(2, experts=8))))
    made = measure(job.source, job.inventory, TOKENS, "random", batch=2)
    blocks = dict(block_inputs(job.source, job.inventory, made, batch=4))
    assert list(blocks) == [0, 1, None]
    assert list(blocks[None]) == ["lm_head"]
    found = blocks[1]["model.layers.1.mlp.switch_mlp.up_proj"]
    assert sum(len(batch.weight) for batch in found.batches) == TOKENS.size * 2
    assert found.parts == 8
    down = blocks[0]["model.layers.0.mlp.switch_mlp.down_proj"]
    trace = sum(
        np.bincount(batch.part, batch.weight * (np.array(batch.x) ** 2).sum(1), minlength=8)
        for batch in down.batches
    )
    np.testing.assert_allclose(
        trace, made.trace["model.layers.0.mlp.switch_mlp.down_proj"], rtol=1e-3
    )
    moments = Moments(job.source, job.inventory, made)
    of_rows = moments.of("model.embed_tokens")
    assert of_rows is not None
    assert of_rows.shape == (1, 128, 128)
    assert np.trace(of_rows[0]) == pytest.approx(made.trace["model.embed_tokens"].sum(), rel=2e-3)
    q = moments.of("model.layers.1.self_attn.q_proj")
    assert q is not None
    assert q[:].shape == (1, 128, 128)
    assert np.trace(q[:][0]) == pytest.approx(
        made.trace["model.layers.1.self_attn.q_proj"].sum(), rel=1e-3
    )
    np.testing.assert_array_equal(np.concatenate([found[:3], found[3:]]), found[:])
    rows = np.concatenate([np.array(batch.x)[batch.part == 5] for batch in found.batches])
    weight = np.concatenate([batch.weight[batch.part == 5] for batch in found.batches])
    every = np.concatenate(
        [np.array(batch.x) * np.sqrt(batch.weight)[:, None] for batch in found.batches]
    )
    pooled = (
        every.T @ every * (128 / len(every))
    )  # a row a column: few rows, so all of them are looked at
    np.testing.assert_allclose(
        found[5:6][0], (rows * weight[:, None]).T @ rows + pooled, rtol=1e-3, atol=1e-6
    )


def test_error_feedback_runs_experts_as_the_sensitivity_did(tmp_path: Path) -> None:
    """DBRX runs its experts token by token once it isn't trained: every row then had the first
    token's weight.
    """
    job = prepare(str(write_family(tmp_path / "model", "dbrx")))
    tokens = np.random.default_rng(0).integers(0, 96, (2, 16))
    made = measure(job.source, job.inventory, tokens, "random")
    block, seen = next(block_inputs(job.source, job.inventory, made))
    weights = np.concatenate(
        [batch.weight for batch in seen["transformer.blocks.0.ffn.experts.0.w1"].batches]
    )
    assert block == 0
    assert len(set(weights.tolist())) > 0.9 * len(weights)
