"""From per-token measures to figures with error bars.

Tokens of one window depend on each other, so a standard error is that of the windows' means
(weighted by their tokens); with fewer than two windows there is none. Intervals use Student's t.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np

from ..base.errors import MintError
from .reference import Predictions
from .score import Score

OUTLIER = 100.0  # perplexity of a window above which it counts as an outlier
TRIM = 0.1  # share of windows cut from each end of the sorted perplexities
Values = list[np.ndarray]  # one array (windows, tokens) for each set of windows
Pairs = list[tuple[Score, Predictions]]


def student(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, within 0.1 %; NaN below one degree of freedom.

    From 5 degrees on it is the expansion around the normal quantile: 26.7.5 of Abramowitz and
    Stegun, "Handbook of Mathematical Functions", 1964.
    """
    if degrees < 1:
        return math.nan
    if degrees <= 4:
        return {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}[degrees]
    z = NormalDist().inv_cdf(0.975)
    n = float(degrees)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def mean_and_se(values: Values) -> tuple[float, float | None, int]:
    """Token-weighted mean, standard error over windows, and the number of windows.

    The error is that of a ratio estimator; None with fewer than two windows.
    """
    sums = np.concatenate([v.sum(axis=1) for v in values])
    sizes = np.concatenate([np.full(len(v), v.shape[1], dtype=np.float64) for v in values])
    mean = sums.sum() / sizes.sum()
    n = len(sums)
    if n < 2:
        return float(mean), None, n
    residuals = sums - mean * sizes
    variance = (residuals**2).sum() * n / (n - 1) / sizes.sum() ** 2
    return float(mean), float(math.sqrt(variance)), n


def half_interval(error: float, count: int) -> float:
    """Half of the 95 % interval of a mean over `count` windows, from its standard error."""
    return student(count - 1) * error


def paired(ours: list[float], theirs: list[float]) -> tuple[float, list[float] | None]:
    """Mean difference of two checkpoints over the same windows, with its 95 % interval."""
    difference = np.array(ours) - np.array(theirs)
    mean = float(difference.mean())
    n = len(difference)
    if n < 2:
        return mean, None
    half = half_interval(float(difference.std(ddof=1)) / math.sqrt(n), n)
    return mean, [mean - half, mean + half]


def perplexity_figures(scores: list[Score]) -> dict[str, Any]:
    """Perplexity with its standard error, and how the windows are spread."""
    nll = [s.nll for s in scores if len(s.nll)]
    mean, se, count = mean_and_se(nll)
    if mean > 500:
        raise MintError(
            "the perplexity is beyond e^500, so the checkpoint's weights are damaged or absurdly "
            "large: download or convert it again"
        )
    windows = np.sort(np.exp(np.concatenate([v.mean(axis=1) for v in nll])))
    cut = int(TRIM * len(windows))
    return {
        "perplexity": math.exp(mean),
        "perplexity_se": None if se is None else math.exp(mean) * se,
        "median_perplexity": float(np.median(windows)),
        "trimmed_perplexity": float(windows[cut : len(windows) - cut].mean()),
        "outliers": int((windows > OUTLIER).sum()),
        "windows": count,
        "tokens": int(sum(v.size for v in nll)),
    }


def divergence_figures(scores: list[Score], predictions: list[Predictions]) -> dict[str, Any]:
    """KL divergence, agreement and the paired difference of ln perplexity from the source."""
    both = zip(scores, predictions, strict=True)
    pairs = [(s, p) for s, p in both if s.kl is not None and len(s.kl)]
    kl = [s.kl for s, _ in pairs if s.kl is not None]
    kl_mean, kl_se, _ = mean_and_se(kl)
    kl_flat = np.concatenate([v.reshape(-1) for v in kl])
    whole = np.concatenate([s.whole for s, _ in pairs])
    dp = np.concatenate([s.dp.reshape(-1) for s, _ in pairs if s.dp is not None])

    # Paired token by token: both sides scored the same ones.
    difference = [
        s.nll + p.true.reshape(len(p.windows.tokens), -1)[: len(s.nll), :-1] for s, p in pairs
    ]
    ln_ppl, ln_se, count = mean_and_se(difference)
    half = None if ln_se is None else half_interval(ln_se, count)

    figures = {
        "kl": kl_mean,
        "kl_se": kl_se,
        "kl_median": float(np.median(kl_flat)),
        "kl_p90": float(np.quantile(kl_flat, 0.9)),
        "kl_p99": float(np.quantile(kl_flat, 0.99)),
        "kl_p999": float(np.quantile(kl_flat, 0.999)),
        "kl_max": float(kl_flat.max()),
        "kl_merging_error": float((whole[:, 0] - whole[:, 1]).mean()) if len(whole) else None,
        "same_top1": mean_and_se([s.top1 for s, _ in pairs if s.top1 is not None])[0],
        "rms_dp": float(np.sqrt((dp**2).mean())),
        "ln_ppl_difference": ln_ppl,
        "ln_ppl_difference_ci95": None if half is None else [ln_ppl - half, ln_ppl + half],
    }
    return figures | _routing_figures(pairs) | _control_figures(pairs)


def _routing_figures(pairs: Pairs) -> dict[str, Any]:
    """The share of changed choices of experts, and the KL at the source's rarely used experts.

    Rarely used is the least-used tenth of a layer's experts. The KL is the mean over all (token,
    layer, expert) with an expert of that tenth, so that it means the same for shallow and deep
    models.
    """
    if not any(p.routing for _, p in pairs):
        return {}

    layers = len(pairs[0][1].routing)
    rare = [_rare_experts([p.routing[layer] for _, p in pairs]) for layer in range(layers)]
    changed = total = 0
    weighted_kl = weight = 0.0
    for score, predictions in pairs:
        rows = score.finished
        positions = predictions.windows.positions
        uses = np.zeros((rows, positions.stop - positions.start))  # of rare experts
        for layer in range(layers):
            ours = score.routing[layer][:rows]
            theirs = predictions.routing[layer][:rows].astype(np.int32)
            changed += int((ours != theirs).any(axis=-1).sum())
            total += ours.shape[0] * ours.shape[1]
            uses += np.isin(theirs[:, positions], rare[layer]).sum(axis=-1)
        assert score.kl is not None
        weighted_kl += float((uses * score.kl[:rows]).sum())
        weight += float(uses.sum())

    return {
        "router_changes": changed / total if total else None,
        "kl_rare_experts": weighted_kl / weight if weight else None,
    }


def _rare_experts(routing: list[np.ndarray]) -> np.ndarray:
    """The least-used tenth of a layer's experts, of those that were used at all; at least one.

    Args:
        routing: int (windows, tokens, k) for each set of windows.
    """
    count = 1 + max(int(experts.max(initial=0)) for experts in routing)
    uses = np.zeros(count, int)
    for experts in routing:
        uses += np.bincount(experts.reshape(-1), minlength=count)
    used = [expert for expert in np.argsort(uses, kind="stable") if uses[expert]]
    return np.array(used[: max(1, len(used) // 10)])


def _control_figures(pairs: Pairs) -> dict[str, Any]:
    """KL at control tokens (chat only)."""
    kl = [s.kl[:, :-1].reshape(-1)[p.control[: s.nll.size]] for s, p in pairs if s.kl is not None]
    at_control = np.concatenate(kl)
    if not len(at_control):
        return {}
    return {"kl_control_tokens": float(at_control.mean()), "control_tokens": len(at_control)}
