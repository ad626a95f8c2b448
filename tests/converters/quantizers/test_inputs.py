"""What layers read: their second moments, and the weight of each row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from families import write_family
from helpers import TOKENS, Maker, qwen3_moe

from mint_mlx.converters.quantizers.inputs import EMBEDDING_DAMPING, Moments, block_inputs
from mint_mlx.jobs.model import prepare
from mint_mlx.measure.fisher import measure
from mint_mlx.measure.moments import add_ridge, effective_rows
from mint_mlx.measure.text import Text


def test_layers_that_no_block_follows_don_t_end_the_walk(make: Maker) -> None:
    job = prepare(str(make(qwen3_moe(2))))
    sensitivity = measure(job.source, job.inventory, Text(TOKENS, "random"), batch=2)
    moments = Moments(job.source, job.inventory, sensitivity)
    for path in (
        "model.embed_tokens",
        "model.layers.0.mlp.switch_mlp.down_proj",
        "model.layers.1.mlp.gate",
        "lm_head",
    ):
        assert moments.of(path) is not None, path


def test_moments_are_those_of_the_layers_inputs(make: Maker) -> None:
    job = prepare(str(make(qwen3_moe(2, experts=8))))
    sensitivity = measure(job.source, job.inventory, Text(TOKENS, "random"), batch=2)
    blocks = dict(block_inputs(job.source, job.inventory, sensitivity, batch=4))
    assert list(blocks) == [0, 1, None]
    assert list(blocks[None]) == ["lm_head"]

    # Each token goes to two of eight experts; the rows' weights are those of the sensitivity.
    up = blocks[1]["model.layers.1.mlp.switch_mlp.up_proj"]
    assert sum(len(batch.weight) for batch in up.batches) == TOKENS.size * 2
    assert up.experts == 8
    path = "model.layers.0.mlp.switch_mlp.down_proj"
    trace = sum(
        np.bincount(batch.expert, batch.weight**2 * (np.array(batch.x) ** 2).sum(1), minlength=8)
        for batch in blocks[0][path].batches
    )
    np.testing.assert_allclose(trace, sensitivity.trace[path], rtol=1e-3)

    # So the trace of an embedding's second moment, but for damping, is that of the sensitivity.
    moments = Moments(job.source, job.inventory, sensitivity)
    embedding = moments.of("model.embed_tokens")
    query = moments.of("model.layers.1.self_attn.q_proj")
    assert embedding is not None
    assert query is not None
    assert embedding[:].shape == query[:].shape == (1, 128, 128)
    expected = (1 + EMBEDDING_DAMPING) * sensitivity.trace["model.embed_tokens"].sum()
    assert np.trace(embedding[:][0]) == pytest.approx(expected, rel=2e-3)

    # An expert's are those of its rows and, where all read the same, of as many average ones as
    # there are columns, with a ridge.
    np.testing.assert_array_equal(np.concatenate([up[:3], up[3:]]), up[:])
    rows = np.concatenate([np.array(batch.x)[batch.expert == 5] for batch in up.batches])
    weight = np.concatenate([batch.weight[batch.expert == 5] for batch in up.batches])
    every = np.concatenate(
        [np.array(batch.x) * np.sqrt(batch.weight)[:, None] for batch in up.batches]
    )
    pooled = every.T @ every * (128 / len(every))  # a row a column
    expected = (rows * weight[:, None]).T @ rows + pooled
    add_ridge(expected, effective_rows(np.concatenate([batch.weight for batch in up.batches])))
    np.testing.assert_allclose(up[5:6][0], expected, rtol=1e-3, atol=1e-6)

    down = blocks[1]["model.layers.1.mlp.switch_mlp.down_proj"]
    rows = np.concatenate([np.array(batch.x)[batch.expert == 5] for batch in down.batches])
    weight = np.concatenate([batch.weight[batch.expert == 5] for batch in down.batches])
    expected = (rows * weight[:, None]).T @ rows
    add_ridge(expected, effective_rows(weight))
    np.testing.assert_allclose(down[5:6][0], expected, rtol=1e-3, atol=1e-6)


def test_error_feedback_runs_experts_as_the_sensitivity_did(tmp_path: Path) -> None:
    """DBRX runs its experts token by token where it isn't trained: one weight for every row."""
    job = prepare(str(write_family(tmp_path / "model", "dbrx")))
    tokens = np.random.default_rng(0).integers(0, 96, (2, 16))
    sensitivity = measure(job.source, job.inventory, Text(tokens, "random"))
    block, seen = next(block_inputs(job.source, job.inventory, sensitivity))
    expert = seen["transformer.blocks.0.ffn.experts.0.w1"]
    weights = np.concatenate([batch.weight for batch in expert.batches])
    assert block == 0
    assert len(set(weights.tolist())) > 0.9 * len(weights)
