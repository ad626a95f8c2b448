"""KL divergences with the rare tokens lumped together."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from mint_mlx.runtime import divergence
from mint_mlx.runtime.divergence import mean_merged_kl


def test_the_divergence_is_that_of_all_tokens() -> None:
    """Where every token is among the source's best, nothing is lumped together."""
    rng = np.random.default_rng(0)
    p, q = (mx.array(rng.normal(size=(2, 3, 8)).astype(np.float32)) for _ in range(2))
    logp, logq = (a - mx.logsumexp(a, axis=-1, keepdims=True) for a in (p, q))
    ids = mx.broadcast_to(mx.arange(8), (2, 3, 8))
    exact = float(mx.mean(mx.sum(mx.exp(logp) * (logp - logq), axis=-1)))
    every = mx.ones((2, 3), dtype=mx.bool_)
    assert float(mean_merged_kl(q, ids, logp, every)) == pytest.approx(exact, rel=1e-4)
    few = mx.argsort(-logp, axis=-1)[..., :3]
    lumped = float(mean_merged_kl(q, few, mx.take_along_axis(logp, few, axis=-1), every))
    assert 0 < lumped < exact


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("best", [None, 40, 5])
def test_a_cpu_has_the_gradient_of_mlx(best: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    logits, target = (mx.array(rng.normal(0, 3, (2, 7, 40)).astype(np.float32)) for _ in range(2))
    if best is None:
        loss = partial(divergence.mean_kl, target=target)
    else:
        logp = divergence.log_softmax(target)
        ids = mx.argsort(-logp, axis=-1)[..., :best]
        known = mx.take_along_axis(logp, ids, axis=-1)
        counted = mx.array(rng.random((2, 7)) < 0.7)
        loss = partial(divergence.mean_merged_kl, ids=ids, logp=known, counted=counted)

    monkeypatch.setattr(divergence.fast_math, "CHUNK", 100)  # several chunks
    value, slope = mx.value_and_grad(lambda logits: 3 * loss(logits))(logits)
    monkeypatch.setattr(divergence, "on_cpu", lambda: False)
    true_value, true_slope = mx.value_and_grad(lambda logits: 3 * loss(logits))(logits)
    assert float(value) == pytest.approx(float(true_value), rel=1e-5)
    np.testing.assert_allclose(np.array(slope), np.array(true_slope), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cpu", [True, False])
def test_tokens_that_do_not_count_have_no_part_in_it(
    cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "on_cpu", lambda: cpu)
    rng = np.random.default_rng(0)
    logits, target = (mx.array(rng.normal(0, 3, (1, 6, 9)).astype(np.float32)) for _ in range(2))
    logp = divergence.log_softmax(target)
    ids = mx.argsort(-logp, axis=-1)[..., :4]
    known = mx.take_along_axis(logp, ids, axis=-1)

    def loss(logits: mx.array, some: slice, counted: mx.array) -> mx.array:
        return mean_merged_kl(logits[:, some], ids[:, some], known[:, some], counted)

    last = mx.arange(6)[None] >= 2
    value, slope = mx.value_and_grad(lambda x: loss(x, slice(6), last))(logits)
    every = mx.ones((1, 4), dtype=mx.bool_)
    alone, slope_alone = mx.value_and_grad(lambda x: loss(x, slice(2, 6), every))(logits)
    assert float(value) == pytest.approx(float(alone), rel=1e-5)
    np.testing.assert_allclose(np.array(slope), np.array(slope_alone), rtol=1e-4, atol=1e-7)
    assert not np.array(slope)[:, :2].any()
