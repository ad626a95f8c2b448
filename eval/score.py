"""Scores a checkpoint on windows of a text: likelihoods, and divergences from its source."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..base.errors import MintError
from ..runtime.divergence import scored_kl
from ..runtime.fast_math import exp, logsumexp
from ..runtime.forward import Piece, Routing, forward
from ..runtime.runner import Runner
from .protocol import Windows
from .reference import Predictions, Progress, compared_slices, position_indices

ABSURD = 10_000.0  # nats for one token
ROUNDING = 5e-3  # nats that a divergence of one position may fall below zero; their mean 1e-4
PER_TOKEN = ("nll", "kl", "top1", "dp")


@dataclass
class Score:
    """Measures of each scored token, in the order of the text, for the windows that were finished.

    Attributes:
        nll: float64 (windows, tokens): -log of the true token's probability, in nats.
        kl: float64 (windows, positions): the source's distribution against the model's, in nats.
            There is one position more than there are tokens: the window's last one, whose token
            isn't in it.
        top1: (windows, positions): whether both put the same token first.
        dp: (windows, tokens): the true token's probability, model minus source.
        whole: float64 (w, 2): exact and merged KL at the positions stored whole.
        routing: the experts chosen, by layer: int (windows, tokens, k).
        finished: windows finished.
    """

    nll: np.ndarray
    kl: np.ndarray | None = None
    top1: np.ndarray | None = None
    dp: np.ndarray | None = None
    whole: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    routing: list[np.ndarray] = field(default_factory=list)
    finished: int = 0


def score(
    runner: Runner,
    windows: Windows,
    batch: int,
    predictions: Predictions | None = None,
    progress: Progress = lambda *_: None,
) -> Score:
    """Score every window; Ctrl-C ends it early with the windows that are finished.

    Args:
        runner: a loaded model.
        windows: what to score.
        batch: windows at once.
        predictions: the source's for the same windows; None measures likelihoods alone.
        progress: called with (windows finished, windows in all).

    Raises:
        MintError: the logits aren't finite, the vocabulary is smaller than the source's, or a
            divergence is below zero.
        KeyboardInterrupt: before the first window was finished.
    """
    count, length = windows.tokens.shape
    arrays = {name: np.zeros((count, windows.per_window)) for name in PER_TOKEN}
    whole = np.zeros((0, 2))
    routing = Routing()
    recorded = routing if predictions is not None and predictions.routing else None
    highest = int(windows.tokens.max(initial=0))

    finished = 0
    try:
        for piece in forward(runner, windows.tokens, batch, recorded):
            if highest >= piece.logits.shape[-1]:
                raise MintError(
                    f"the tokenizer has the token {highest}, which the model doesn't know, so they "
                    "don't belong together: download the model again"
                )
            compared = compared_slices(piece.columns, windows)
            if compared is not None:
                inside, positions = compared
                first = windows.positions.start
                columns = slice(positions.start - first, positions.stop - first)
                values, exact = _measure(piece, inside, positions, windows, predictions)
                for name, value in values.items():
                    arrays[name][piece.rows, columns] = value
                whole = np.concatenate([whole, exact])
            if piece.columns.stop == length:
                finished = piece.rows.stop
                progress(finished, count)
    except KeyboardInterrupt:
        if not finished:
            raise

    # No token came at a window's last position.
    nll = arrays["nll"][:finished, :-1]
    dp = arrays["dp"][:finished, :-1]
    if predictions is None:
        return Score(nll, finished=finished)

    experts = [chosen[:finished] for chosen in _by_window(routing, length)]
    if [e.shape[-1] for e in experts] != [e.shape[-1] for e in predictions.routing]:
        raise MintError(
            "the model has other expert layers than the source, so they are not the same model: "
            "give the source that it was made from"
        )
    kl = arrays["kl"][:finished]
    if kl.size and (kl.min() < -ROUNDING or kl.mean() < -ROUNDING / 50):
        raise MintError(
            f"a divergence of {min(kl.min(), kl.mean()):.3g} nats is below zero, so the source's "
            "predictions are no probabilities: make the reference anew with --save-reference"
        )
    top1 = arrays["top1"][:finished]
    return Score(nll, kl, top1, dp, whole, experts, finished)


def _by_window(routing: Routing, length: int) -> list[np.ndarray]:
    """Choices of experts by layer, int (windows, tokens, k), without a batch that was cut off."""
    joined = [np.concatenate(batches) for batches in routing.layers.values()]
    return [r[: len(r) // length * length].reshape(-1, length, r.shape[-1]) for r in joined]


def _measure(
    piece: Piece,
    inside: slice,
    positions: slice,
    windows: Windows,
    predictions: Predictions | None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Measures of one piece.

    Args:
        piece: logits of some windows and columns.
        inside: its columns that are compared.
        positions: the same as positions of the window.
        windows: all windows.
        predictions: the source's for them.

    Returns:
        Arrays (rows, positions) by the names of PER_TOKEN, and float64 (w, 2): exact and merged KL
        of the positions stored whole.
    """
    logits = piece.logits[:, inside]
    shape = logits.shape[:2]
    norm = logsumexp(logits)
    following = mx.array(windows.following[piece.rows, positions])[..., None]
    true = (mx.take_along_axis(logits, following, axis=-1) - norm)[..., 0]
    if predictions is None:
        mx.eval(true)
        return {"nll": _finite(-np.asarray(true, dtype=np.float64))}, np.zeros((0, 2))

    # All positions of the piece in one row, as the source's predictions are stored.
    indices = position_indices(piece.rows, positions, windows)
    logq = (logits - norm).reshape(len(indices), -1)
    if predictions.whole_logp.shape[-1] > logq.shape[-1]:
        raise MintError(
            "the model's vocabulary is smaller than the source's, so they are not the same model: "
            "give the source that it was made from"
        )
    ids = mx.array(predictions.ids[indices].astype(np.int32))
    logp = mx.array(predictions.logp[indices])
    merged = np.isfinite(predictions.rest[indices[0]])
    rest = mx.array(predictions.rest[indices]) if merged else None
    kl = scored_kl(logp, mx.take_along_axis(logq, ids, axis=-1), rest)
    same = mx.argmax(logq, axis=-1) == mx.array(predictions.best[indices].astype(np.int32))
    change = exp(true.reshape(-1)) - exp(mx.array(predictions.true[indices]))

    # The exact divergence, where the source's whole distribution is stored; indices rise.
    stored = np.flatnonzero(np.isin(predictions.whole, indices))
    rows = np.searchsorted(indices, predictions.whole[stored])
    exact = mx.zeros((0,))
    if len(stored):
        p = mx.array(predictions.whole_logp[stored])
        exact = scored_kl(p, logq[mx.array(rows), : p.shape[-1]])

    mx.eval(true, kl, same, change, exact)
    values = {
        "nll": _finite(-np.asarray(true, dtype=np.float64)),
        "kl": _finite(np.asarray(kl, dtype=np.float64).reshape(shape)),
        "top1": np.asarray(same, dtype=np.float64).reshape(shape),
        "dp": np.asarray(change, dtype=np.float64).reshape(shape),
    }
    both = [np.asarray(exact, dtype=np.float64), values["kl"].reshape(-1)[rows]]
    return values, np.stack(both, axis=-1)


def _finite(values: np.ndarray) -> np.ndarray:
    """The values.

    Raises:
        MintError: one isn't finite, or beyond ABSURD.
    """
    if not (np.isfinite(values).all() and np.abs(values).max(initial=0) < ABSURD):
        raise MintError(
            "the model's logits are not finite or absurdly large: its activations overflow (in "
            "float16 as a rule, where bfloat16 would not), or its weights are damaged: convert it "
            "again"
        )
    return values
