"""Reads the rows of a table of tokens with those of tokens that training never met left out.

Rows of tokens that no text had stay near one common vector (Land and Bartolo, Fishing for
Magikarp, 2024). What rounding does to them changes no prediction, but where they are many, as in a
vocabulary that is larger than the text was rich, their errors are most of what a mean over all rows
tells. In their place other rows that are read with them stand.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .row_sampling import Read

NEAR = 0.2  # distance from the common vector, relative to its length, of an untrained row
FEWEST = 8  # rows near each other, at least
SHARE = 0.05  # of the rows that are read first, at least
COMPARED = 512  # rows that are compared with each other, about
PIECE = 1 << 12  # rows that are looked at together


def of_trained_rows(read: Read) -> Read:
    """A function that reads other, trained rows in place of untrained ones.

    A row is replaced by the same one whenever it is read again, as its errors and its squares are
    read apart.

    Args:
        read: reads rows of a layer without experts.
    """
    common: list[np.ndarray | None] = []
    replaced: dict[int, int] = {}

    def read_trained(experts: np.ndarray, rows: np.ndarray) -> mx.array:
        wanted = np.array([[replaced.get(row, row) for row in rows[0].tolist()]])
        weights = read(experts, wanted)
        if not common:
            common.append(common_vector(_spread_out(weights[0])))
        vector = common[0]
        if vector is None:
            return weights

        # Trained rows stand in for untrained ones in turn.
        pieces = range(0, weights.shape[1], PIECE)
        untrained = np.concatenate(
            [near(_float32(weights[0, i : i + PIECE]), vector) for i in pieces]
        )
        trained = np.flatnonzero(~untrained)
        if not untrained.any() or not len(trained):
            return weights
        order = np.arange(len(untrained))
        order[untrained] = np.resize(trained, int(untrained.sum()))
        for place in np.flatnonzero(untrained).tolist():
            replaced[int(rows[0, place])] = int(wanted[0, order[place]])
        return weights[:, mx.array(order)]

    return read_trained


def _spread_out(weights: mx.array) -> np.ndarray:
    """Some rows from all over a weight, float32 (rows, columns)."""
    return _float32(weights[:: max(1, len(weights) // COMPARED)])


def _float32(weights: mx.array) -> np.ndarray:
    return np.array(weights.astype(mx.float32))


def common_vector(some: np.ndarray) -> np.ndarray | None:
    """What many rows are near to, or None where there is no such vector.

    Args:
        some: float32 (rows, columns).
    """
    squares = (some.astype(np.float64) ** 2).sum(axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        distances = squares[:, None] + squares - 2 * (some @ some.T)
        neighbours = (distances <= NEAR**2 * squares[:, None]) & (squares[:, None] > 0)
    counts = neighbours.sum(axis=1)
    best = int(counts.argmax())
    if counts[best] < max(FEWEST, SHARE * len(some)):
        return None
    return np.asarray(some[neighbours[best]].mean(axis=0))


def near(values: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Which rows are as near to a vector as untrained ones, bool (rows,)."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(np.linalg.norm(values - vector, axis=1) <= NEAR * np.linalg.norm(vector))
