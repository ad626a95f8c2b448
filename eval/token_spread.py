"""How a divergence is spread over the tokens of a text, and where it is worst, with context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .protocol import Windows
from .reference import Predictions
from .score import Score

EDGES = np.arange(-7.0, 2.01, 0.25)  # log10 of nats; what is below or above counts in the ends
WORST = 20
BEFORE, AFTER = 32, 8  # tokens of context


def token_spread(
    scores: Sequence[Score], predictions: Sequence[Predictions], tokenizer: Any
) -> dict[str, Any]:
    """The distribution of the KL divergence over tokens, and the worst ones.

    Args:
        scores: of a checkpoint, with its divergences.
        predictions: the source's for the same sets of windows.
        tokenizer: decodes tokens.

    Returns:
        `edges` (log10 of nats) of bins; `tokens` and `kl`, each bin's share of all tokens and of
        their KL; `half`, the share of tokens that make half of the KL; and `worst`, the positions
        of largest KL with the text around them.
    """
    pairs = [(s, p) for s, p in zip(scores, predictions, strict=True) if s.kl is not None]
    flat = np.concatenate([np.maximum(s.kl, 0.0).reshape(-1) for s, _ in pairs])  # type: ignore
    bins = np.clip(np.log10(np.maximum(flat, 1e-30)), EDGES[0], EDGES[-1] - 1e-9)
    counts, _ = np.histogram(bins, EDGES)
    weights, _ = np.histogram(bins, EDGES, weights=flat)
    total = flat.sum() or 1.0

    ordered = np.cumsum(np.sort(flat)[::-1])
    half = int(np.searchsorted(ordered, flat.sum() / 2)) + 1
    return {
        "edges": [float(edge) for edge in EDGES],
        "tokens": [float(count / len(flat)) for count in counts],
        "kl": [float(weight / total) for weight in weights],
        "half": half / len(flat),
        "worst": _worst(pairs, tokenizer),
    }


def _worst(pairs: Sequence[tuple[Score, Predictions]], tokenizer: Any) -> list[dict[str, Any]]:
    """The positions of largest KL after which a token came, largest first."""
    candidates: list[tuple[float, int, int, int]] = []  # KL, set of windows, window, column
    for number, (score, _) in enumerate(pairs):
        assert score.kl is not None
        kl = score.kl[:, :-1]
        columns = max(1, kl.shape[1])
        for index in np.argsort(kl, axis=None)[::-1][:WORST]:
            row, column = divmod(int(index), columns)
            candidates.append((float(kl[row, column]), number, row, column))
    candidates.sort(reverse=True)
    return [
        {"kl": kl} | _describe(*pairs[number], row, column, tokenizer)
        for kl, number, row, column in candidates[:WORST]
    ]


def _describe(
    score: Score, predictions: Predictions, row: int, column: int, tokenizer: Any
) -> dict[str, Any]:
    """A position in words: the text around it, and both models' probabilities of what came."""
    windows: Windows = predictions.windows
    tokens = windows.tokens[row]
    at = windows.positions.start + column + 1  # of the token that came
    index = row * windows.per_window + column

    def decode(ids: Any) -> str:
        return str(tokenizer.decode([int(token) for token in ids]))

    return {
        "before": decode(tokens[max(0, at - BEFORE) : at]),
        "token": decode(tokens[at : at + 1]),
        "after": decode(tokens[at + 1 : at + 1 + AFTER]),
        "favourite": decode(predictions.best[index : index + 1]),
        "source": float(np.exp(predictions.true[index])),
        "model": float(np.exp(-score.nll[row, column])),
    }
