"""Scores a checkpoint on windows of a text: negative log-likelihoods, and with a reference the
divergences from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..base.errors import MintError
from ..runtime.divergence import scored_kl
from ..runtime.fast_math import exp, logsumexp
from ..runtime.runner import Routing, Runner, forward
from .protocol import Windows
from .reference import Part, Progress, places, take

ABSURD = 10_000.0  # nats for one token
PER_TOKEN = ("nll", "kl", "top1", "dp")


@dataclass
class Score:
    """What was measured, per scored token in the order of the text, for the windows that were
    finished.

    Attributes:
        nll: float64 (windows, tokens): -log of the true token's probability, in nats.
        kl: float64 (windows, positions): the source's distribution against the model's, in nats.
            There is one position more than there are tokens: the window's last one, whose token
            isn't in it.
        top1: (windows, positions): whether both put the same token first.
        dp: (windows, tokens): the true token's probability, model minus source.
        whole: float64 (w, 2): exact and merged KL at the positions kept whole.
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
    part: Part | None = None,
    progress: Progress = lambda *_: None,
) -> Score:
    """Score every window; an interruption (Ctrl-C) ends it early with the windows that are
    finished.

    Args:
        runner: a loaded model.
        windows: what to score.
        batch: windows at once.
        part: the source's predictions for the same windows.
        progress: called with (windows finished, windows in all).

    Raises:
        MintError: the logits aren't finite, or the vocabulary is smaller than the source's.
        KeyboardInterrupt: before the first window was finished.
    """
    arrays = {name: np.zeros((len(windows.tokens), windows.per_window)) for name in PER_TOKEN}
    most = int(windows.tokens.max(initial=0))
    routing, whole, finished = Routing(), np.zeros((0, 2)), 0
    try:
        for piece in forward(
            runner, windows.tokens, batch, routing if part is not None and part.routing else None
        ):
            if most >= piece.logits.shape[-1]:
                raise MintError(
                    f"the tokenizer knows the token {most}, the model does not: they don't belong "
                    "together"
                )
            taken = take(piece.columns, windows)
            if taken is not None:
                inside, positions = taken
                columns = slice(
                    positions.start - windows.positions.start,
                    positions.stop - windows.positions.start,
                )
                values, exact = _measure(
                    piece.logits[:, inside], windows, piece.rows, positions, part
                )
                for name, value in values.items():
                    arrays[name][piece.rows, columns] = value
                whole = np.concatenate([whole, exact])
            if piece.columns.stop == windows.tokens.shape[1]:
                finished = piece.rows.stop
                progress(finished, len(windows.tokens))
    except KeyboardInterrupt:
        if not finished:
            raise
    done = {name: array[:finished] for name, array in arrays.items()}
    done["nll"], done["dp"] = (
        done["nll"][:, :-1],
        done["dp"][:, :-1],
    )  # no token came at the last position
    if part is None:
        return Score(done["nll"], finished=finished)
    chosen = [r[:finished] for r in _whole_windows(routing, windows)]
    if [r.shape[-1] for r in chosen] != [r.shape[-1] for r in part.routing]:
        raise MintError(
            "the model has other expert layers than the source: they are not the same model"
        )
    return Score(done["nll"], done["kl"], done["top1"], done["dp"], whole, chosen, finished)


def _whole_windows(routing: Routing, windows: Windows) -> list[np.ndarray]:
    """Choices of experts by layer; a batch that an interruption cut off is dropped."""
    length = windows.tokens.shape[1]
    joined = [np.concatenate(parts) for parts in routing.layers.values()]
    return [r[: len(r) // length * length].reshape(-1, length, r.shape[-1]) for r in joined]


def _measure(
    logits: mx.array, windows: Windows, rows: slice, positions: slice, part: Part | None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Measures of one piece, each (rows, positions), and exact beside merged KL of the tokens kept
    whole.
    """
    shape = logits.shape[:2]
    norm = logsumexp(logits)
    true = (
        mx.take_along_axis(logits, mx.array(windows.following[rows, positions])[..., None], axis=-1)
        - norm
    )
    true = true[..., 0]
    if part is None:
        mx.eval(true)
        return {"nll": _finite(-np.asarray(true, dtype=np.float64))}, np.zeros((0, 2))
    place = places(rows, positions, windows)
    flat = (logits - norm).reshape(len(place), -1)
    ids, logp = mx.array(part.ids[place].astype(np.int32)), mx.array(part.logp[place])
    if part.whole_logp.shape[-1] > flat.shape[-1]:
        raise MintError(
            "the model's vocabulary is smaller than the source's: they are not the same model"
        )
    top = mx.take_along_axis(flat, ids, axis=-1)
    rest = mx.array(part.rest[place]) if np.isfinite(part.rest[place[0]]) else None
    kl = scored_kl(logp, top, rest)
    same = mx.argmax(flat, axis=-1) == mx.array(part.best[place].astype(np.int32))
    change = exp(true.reshape(-1)) - exp(mx.array(part.true[place]))
    kept = np.flatnonzero(np.isin(part.whole, place))
    exact = mx.zeros((0,))
    if len(kept):
        where = np.searchsorted(place, part.whole[kept])  # places rise within a piece
        p = mx.array(part.whole_logp[kept])
        q = flat[mx.array(where), : p.shape[-1]]
        exact = scored_kl(p, q)
    mx.eval(true, kl, same, change, exact)
    found = {
        "nll": _finite(-np.asarray(true, dtype=np.float64)),
        "kl": _finite(np.asarray(kl, dtype=np.float64).reshape(shape)),
        "top1": np.asarray(same, dtype=np.float64).reshape(shape),
        "dp": np.asarray(change, dtype=np.float64).reshape(shape),
    }
    merged = found["kl"].reshape(-1)[where] if len(kept) else np.zeros(0)
    return found, np.stack([np.asarray(exact, dtype=np.float64), merged], axis=-1)


def _finite(values: np.ndarray) -> np.ndarray:
    if not (np.isfinite(values).all() and np.abs(values).max(initial=0) < ABSURD):
        raise MintError(
            "the model's logits are not finite or absurd: its weights are damaged, or overflow in "
            "this type"
        )
    return values
