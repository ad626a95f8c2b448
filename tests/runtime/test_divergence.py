"""KL divergences with the rare tokens lumped together."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mint_mlx.runtime.divergence import mean_merged_kl


def test_the_divergence_is_that_of_all_tokens() -> None:
    """Where every token is among the source's best, nothing is lumped together."""
    rng = np.random.default_rng(0)
    p, q = (mx.array(rng.normal(size=(2, 3, 8)).astype(np.float32)) for _ in range(2))
    logp, logq = (a - mx.logsumexp(a, axis=-1, keepdims=True) for a in (p, q))
    ids = mx.broadcast_to(mx.arange(8), (2, 3, 8))
    exact = float(mx.mean(mx.sum(mx.exp(logp) * (logp - logq), axis=-1)))
    assert float(mean_merged_kl(q, ids, logp)) == pytest.approx(exact, rel=1e-4)
    few = mx.argsort(-logp, axis=-1)[..., :3]
    lumped = float(mean_merged_kl(q, few, mx.take_along_axis(logp, few, axis=-1)))
    assert 0 < lumped < exact
