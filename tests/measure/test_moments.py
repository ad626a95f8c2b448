"""What error feedback leaves of an error's cost, from second moments alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mint_mlx.base.quant_config import QuantConfig
from mint_mlx.converters.quantizers import gptq, learn_block, rtn
from mint_mlx.measure.moments import (
    EXPERTS,
    NARROW,
    WIDE,
    SampledMoments,
    add_ridge,
    effective_rows,
    factor,
    gram,
    remaining,
)
from mint_mlx.measure.sensitivity import compacted


def correlated(columns: int, fall: float, seed: int = 0) -> np.ndarray:
    """Rows whose moments' eigenvalues fall from one to the square of `fall`."""
    rng = np.random.default_rng(seed)
    mixed = np.linalg.qr(rng.normal(size=(columns, columns)))[0] * np.geomspace(1, fall, columns)
    return (rng.normal(size=(4096, columns)) @ mixed.T).astype(np.float32)


@pytest.mark.parametrize("fall", [1.0, 0.3, 0.1])
def test_the_share_is_what_error_feedback_really_leaves(fall: float) -> None:
    rows = correlated(128, fall)
    moment = rows.T @ rows
    weight = mx.array(np.random.default_rng(1).normal(size=(64, 128)).astype(np.float32))
    config = QuantConfig(6, 64)
    costs = []
    for packed in (gptq.quantize(weight, config, moment[None]), rtn.quantize(weight, config)):
        back = mx.dequantize(packed["weight"], packed["scales"], packed["biases"], 64, 6)
        error = np.array(back - weight)
        costs.append(float(np.sum((error @ moment) * error)))
    assert remaining([moment]) == pytest.approx(costs[0] / costs[1], rel=0.15)


def cost(packed: dict[str, mx.array], weight: mx.array, moment: np.ndarray) -> float:
    """What the error of 4-bit codes costs under a second moment."""
    back = mx.dequantize(packed["weight"], packed["scales"], packed["biases"], 64, 4)
    error = np.array(back - weight)
    return float(np.sum((error @ moment) * error))


def test_few_rows_for_many_columns_are_no_worse_than_rounding() -> None:
    """Correlations of chance, made up for, cost more than they save on other rows."""
    rows = correlated(256, 0.3)
    few = rows[:320]
    moment, others = few.T @ few, rows[320:].T @ rows[320:]
    weight = mx.array(np.random.default_rng(1).normal(size=(64, 256)).astype(np.float32))
    config = QuantConfig(4, 64)
    nearest = cost(rtn.quantize(weight, config), weight, others)
    assert cost(gptq.quantize(weight, config, moment[None]), weight, others) > 1.1 * nearest
    add_ridge(moment, len(few))
    assert cost(gptq.quantize(weight, config, moment[None]), weight, others) < 0.96 * nearest


def test_nothing_seen_is_the_unit_matrix() -> None:
    """An expert that no token took, and that can't borrow, is rounded as if all counted alike."""
    moment = np.zeros((64, 64), dtype=np.float32)
    add_ridge(moment, 0.0)
    weight = mx.array(np.random.default_rng(1).normal(size=(8, 64)).astype(np.float32))
    config = QuantConfig(4, 64)
    unit = np.eye(64, dtype=np.float32)
    seen, alike = (
        cost(gptq.quantize(weight, config, m[None], True), weight, unit) for m in (moment, unit)
    )
    assert seen == pytest.approx(alike, rel=1e-6)
    assert seen < 0.02 * float(mx.square(weight).sum())


def test_rows_count_by_how_evenly_they_weigh() -> None:
    assert effective_rows(np.full(7, 3.0, dtype=np.float32)) == pytest.approx(7)
    one = np.array([1, 0, 0, 1e-9], dtype=np.float32)
    assert effective_rows(one) == pytest.approx(1)
    assert effective_rows(np.zeros(3, dtype=np.float32)) == 0.0


def test_what_remains_is_told_by_rows_that_error_feedback_has_not_seen() -> None:
    rows = correlated(256, 0.3)
    few = np.arange(1024)
    moments = SampledMoments()
    moments.add(rows[few], np.ones(len(few), dtype=np.float32), few, None, 1)
    assert sum(map(len, moments.weights)) == 768

    moment, others = rows[:768].T @ rows[:768], rows[1024:].T @ rows[1024:]
    seen = remaining([moment])
    add_ridge(moment, 768)
    weight = mx.array(np.random.default_rng(1).normal(size=(64, 256)).astype(np.float32))
    config = QuantConfig(4, 64)
    fed_back = cost(gptq.quantize(weight, config, moment[None]), weight, others)
    share = fed_back / cost(rtn.quantize(weight, config), weight, others)
    assert moments.remaining() == pytest.approx(share, rel=0.1)
    assert seen < 0.85 * share


def test_the_factor_gives_the_damped_moment_back() -> None:
    rows = correlated(32, 0.5)
    moment = rows.T @ rows
    order, lower = factor(moment)
    diagonal = np.diagonal(moment)
    assert (np.diff(diagonal[order]) >= 0).all()
    damped = (moment + 0.01 * diagonal.mean() * np.eye(32))[order][:, order]
    near = 1e-2 * diagonal.mean()
    np.testing.assert_allclose(lower @ lower.T, damped, rtol=1e-3, atol=near)


def test_a_moment_that_rounding_leaves_without_a_factor() -> None:
    """As in hidden states, one direction holds nine tenths of the trace: too much for 16 bits."""
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((1024, 512)) / np.sqrt(np.arange(1, 513))
    rows = draws + 3 * rng.standard_normal(512)
    moment = compacted((rows.T @ rows).astype(np.float32))
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(moment.astype(np.float64) + 1e-4 * np.trace(moment) / 512 * np.eye(512))
    assert 0 < remaining([moment]) <= 1
    assert np.isfinite(np.array(learn_block.metric_root(moment))).all()


def test_moments_are_bounded_and_an_expert_that_nobody_chose_borrows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moments = SampledMoments()
    rows = correlated(16, 0.5)
    weights = np.ones(len(rows), dtype=np.float32)
    experts = np.zeros(len(rows), dtype=np.int64)
    moments.add(rows, weights, np.arange(len(rows)), experts, 100)
    assert len(moments.by_expert) <= EXPERTS
    assert 0 < moments.remaining() < 1
    borrowed = moments.remaining()
    monkeypatch.setattr("mint_mlx.measure.moments.POOL", 0.0)
    assert moments.remaining() != borrowed

    wide = SampledMoments()
    ones = np.ones(2, dtype=np.float32)
    wide.add(np.ones((2, 2 * WIDE + 2), dtype=np.float32), ones, np.arange(2), None, 1)
    assert len(wide.by_expert[0]) <= WIDE


def test_nothing_seen_leaves_everything() -> None:
    assert remaining([np.zeros((4, 4), dtype=np.float32)]) == 1.0
    assert SampledMoments().remaining() == 1.0


@pytest.mark.parametrize("columns", [7, NARROW + 1])
def test_a_gram_matrix_is_that_of_the_rows(columns: int) -> None:
    rows = np.random.default_rng(0).standard_normal((5, columns), dtype=np.float32)
    np.testing.assert_allclose(gram(rows), rows.T @ rows, atol=1e-5)
