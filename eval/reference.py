"""The source's own predictions: computed once, compared with any number of candidates.

For each compared position: the K most probable next tokens with their log-probabilities, the mass
of all others, and the true token's log-probability. With K below the vocabulary the KL divergence
is that of the distribution whose rare tokens are merged into one, which is a little less than the
true one; the difference is measured on positions that are stored whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..base.errors import MintError
from ..runtime.divergence import log_softmax, rest_mass
from ..runtime.forward import Routing, forward
from ..runtime.runner import Runner
from .protocol import Windows

SCHEMA = 3
FILE_BYTES = 1_000_000_000  # K is as large as a file of this size allows
LEAST_K = 128
PER_POSITION = ("ids", "best", "logp", "rest", "true")
WHOLE = 1 << 24  # probabilities in all distributions that are stored whole
Progress = Callable[[int, int], None]  # called with (windows finished, windows in all)


@dataclass(frozen=True)
class Predictions:
    """The source's predictions for one set of windows, at their n compared positions.

    Attributes:
        windows: the tokens.
        ids: int (n, K), in no order that matters.
        best: int (n,), the source's first choice.
        logp: float32 (n, K).
        rest: float32 (n,), log of the mass of all other tokens (-inf where K is the vocabulary).
        true: float32 (n,), log-probability of the token that came (no token came at a window's last
            position).
        whole: int (w,), which of the n positions are stored whole.
        whole_logp: float32 (w, vocabulary).
        routing: int (windows, tokens, k) for each layer with experts.
        control: bool (scored tokens,), whether the token that came is a control token (chat only).
    """

    windows: Windows
    ids: np.ndarray
    best: np.ndarray
    logp: np.ndarray
    rest: np.ndarray
    true: np.ndarray
    whole: np.ndarray
    whole_logp: np.ndarray
    routing: tuple[np.ndarray, ...]
    control: np.ndarray


@dataclass(frozen=True)
class About:
    """What a reference belongs to."""

    source: str
    fingerprint: str
    protocol: str
    text: str
    vocabulary: int
    tokenizer: str
    noise_floor: float | None
    device: str
    schema: int = SCHEMA


@dataclass(frozen=True)
class Reference:
    """The source's predictions for all windows of a text, one entry for each set of windows."""

    about: About
    predictions: tuple[Predictions, ...]


def choose_k(scored: int, vocabulary: int) -> int:
    """As many tokens as the file's size allows, at least LEAST_K; all where they fit."""
    item = 4 + (2 if vocabulary <= 1 << 16 else 4)
    return int(min(vocabulary, max(LEAST_K, FILE_BYTES // (scored * item))))


def predict(
    runner: Runner,
    windows: Windows,
    scored: int,
    batch: int,
    control: np.ndarray | None = None,
    progress: Progress = lambda *_: None,
    routing: Routing | None = None,
) -> Predictions:
    """Run the source over windows and collect its predictions.

    Args:
        runner: the source.
        windows: what to run it on.
        scored: tokens scored in all sets of windows together, from which K follows.
        batch: windows at once.
        control: which of the scored tokens are control tokens.
        progress: called with (windows finished, windows in all).
        routing: receives the choice of experts, which is then stored as well.

    Raises:
        MintError: its logits aren't finite.
    """
    count = len(windows.tokens)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*PER_POSITION, "whole")}
    order: list[np.ndarray] = []
    whole_order: list[np.ndarray] = []

    for piece in forward(runner, windows.tokens, batch, routing):
        compared = compared_slices(piece.columns, windows)
        if compared is None:
            continue
        inside, positions = compared
        logp = log_softmax(piece.logits[:, inside])

        # A few positions, evenly spread over all of them, are stored whole.
        indices = position_indices(piece.rows, positions, windows)
        whole_rows = np.flatnonzero(
            np.isin(indices, _whole_positions(count * windows.per_window, logp.shape[-1]))
        )

        following = windows.following[piece.rows, positions]
        arrays = _summarize(logp, following, whole_rows, choose_k(scored, logp.shape[-1]))
        if not np.isfinite(arrays["true"]).all():
            raise MintError(
                "the source's logits are not finite: its activations overflow, or a weight is "
                "damaged, which `mint-mlx profile` would name"
            )
        for name, array in arrays.items():
            columns[name].append(array)
        order.append(indices)
        whole_order.append(indices[whole_rows])
        progress(piece.rows.start, count)
    progress(count, count)

    # Pieces come batch by batch and, within a batch, by columns: back to the order of the text.
    back = np.argsort(np.concatenate(order), kind="stable")
    stacked = {name: np.concatenate(columns[name])[back] for name in PER_POSITION}
    experts = [] if routing is None else routing.arrays(windows.tokens.shape)
    return Predictions(
        windows,
        **stacked,
        whole=np.concatenate(whole_order),
        whole_logp=np.concatenate(columns["whole"]),
        routing=tuple(map(_smallest_type, experts)),
        control=np.zeros(windows.scored, dtype=bool) if control is None else control,
    )


def _whole_positions(total: int, vocabulary: int) -> np.ndarray:
    """Which of all compared positions are stored whole, int (w,)."""
    count = min(max(1, WHOLE // vocabulary), total)
    return np.linspace(0, total - 1, count).astype(np.int64)


def _summarize(
    logp: mx.array, following: np.ndarray, whole_rows: np.ndarray, k: int
) -> dict[str, np.ndarray]:
    """What is stored of one piece, by the names of PER_POSITION and `whole`.

    Args:
        logp: float32 (windows, positions, vocabulary).
        following: int (windows, positions), the tokens that came.
        whole_rows: int (w,), which of the windows x positions are stored whole.
        k: most likely tokens to store.
    """
    vocabulary = logp.shape[-1]
    flat = logp.reshape(-1, vocabulary)
    if k < vocabulary:
        ids = mx.argpartition(-flat, k - 1, axis=-1)[:, :k]
    else:
        ids = mx.broadcast_to(mx.arange(k), (flat.shape[0], k))
    top = mx.take_along_axis(flat, ids, axis=-1)
    rest = rest_mass(top) if k < vocabulary else mx.full((flat.shape[0],), -mx.inf)
    best = mx.argmax(flat, axis=-1)
    true = mx.take_along_axis(logp, mx.array(following)[..., None], axis=-1)
    whole = flat[mx.array(whole_rows)] if len(whole_rows) else mx.zeros((0, vocabulary))
    mx.eval(ids, best, top, rest, true, whole)

    small = np.uint16 if vocabulary <= 1 << 16 else np.uint32
    return {
        "ids": np.asarray(ids).astype(small),
        "best": np.asarray(best).astype(small),
        "logp": np.asarray(top),
        "rest": np.asarray(rest),
        "true": np.asarray(true).reshape(-1),
        "whole": np.asarray(whole),
    }


def compared_slices(columns: slice, windows: Windows) -> tuple[slice, slice] | None:
    """Of a piece's columns those that are compared, or None.

    Returns:
        They as a slice into the piece, and as a slice of the window's positions.
    """
    start = max(columns.start, windows.positions.start)
    stop = min(columns.stop, windows.positions.stop)
    if start >= stop:
        return None
    return slice(start - columns.start, stop - columns.start), slice(start, stop)


def position_indices(rows: slice, positions: slice, windows: Windows) -> np.ndarray:
    """The numbers of these positions among all n that are compared; int (rows x positions,)."""
    start = np.arange(rows.start, rows.stop)[:, None] * windows.per_window - windows.positions.start
    return (start + np.arange(positions.start, positions.stop)).reshape(-1)


def _smallest_type(experts: np.ndarray) -> np.ndarray:
    return experts.astype(np.uint8 if experts.max(initial=0) < 256 else np.uint16)


def text_hash(text: list[Windows]) -> str:
    """A hash of the tokens that are scored, whatever file they came from."""
    digest = hashlib.blake2b(digest_size=8)
    for windows in text:
        digest.update(f"{windows.tokens.shape} {windows.first}".encode())
        digest.update(windows.tokens.astype("<i4").tobytes())
    return digest.hexdigest()
