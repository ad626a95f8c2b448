"""Second moments factored: in which order columns are rounded, and what of an error remains once it
is passed on.

A column's error that those still to be rounded can't make up for is its conditional variance given
them: D of H = L D L^T (Chee et al., "QuIP", 2023). Rounding to nearest costs the trace of H, error
feedback the trace of D."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from ..checkpoint.layers import Layer

DAMPING = 0.01  # of the mean diagonal, added to it
POOL = 1.0  # rows that each expert borrows from all, per column: average ones
EXPERTS = 8  # of a layer, whose moments tell how much remains
WIDE = 4096  # columns at most that tell it


def takes_feedback(layer: Layer) -> bool:
    """Whether error feedback can know what a layer reads: linears and experts of the blocks, the
    head, embeddings.
    """
    if layer.role == "embedding":
        return layer.kind == "embedding"
    return layer.kind in ("linear", "experts") and (layer.block is not None or layer.role == "head")


def factor(moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of columns and the Cholesky factor of a damped moment.

    Args:
        moment: float32 (columns, columns), symmetric.

    Returns:
        int (columns,), columns by rising diagonal, of which the last is rounded first; and float32
        (columns, columns), the lower factor of the moment in that order.
    """
    import mlx.core as mx

    order = np.argsort(np.diagonal(moment), kind="stable")
    damped = moment.take(order, 0).take(order, 1)
    mean = float(np.trace(moment, dtype=np.float64)) / len(moment) or 1.0
    damped[np.diag_indices(len(moment))] += np.float32(DAMPING * mean)
    # MLX's is several times as fast as numpy's; LAPACK's failure is silent in it.
    lower = np.asarray(mx.linalg.cholesky(mx.array(damped), stream=mx.cpu))
    if not (np.diagonal(lower) > 0).all():
        lower = root(damped, DAMPING * mean).astype(np.float32)
    return order, lower


def root(matrix: np.ndarray, damping: float) -> np.ndarray:
    """The lower Cholesky factor, float64, of a symmetric matrix that has been damped already.

    Where one direction holds nearly everything, rounding to 16 bits leaves a matrix that has none:
    it is damped more."""
    exact, step = matrix.astype(np.float64), damping * np.eye(len(matrix))
    for more in (0, 9, 99):
        with suppress(np.linalg.LinAlgError):
            return np.asarray(np.linalg.cholesky(exact + more * step))
    return np.asarray(np.linalg.cholesky(exact + 999 * step))


def remaining(moments: list[np.ndarray]) -> float:
    """The share of an error's cost that error feedback leaves, over some moments (columns, columns)
    of one layer.
    """
    left = whole = 0.0
    for moment in moments:
        left += float(np.square(np.diagonal(factor(moment)[1]), dtype=np.float64).sum())
        whole += float(np.trace(moment, dtype=np.float64))
    return min(1.0, left / whole) if whole > 0 and np.isfinite(whole) else 1.0


def held_moments(layer: Layer) -> int:
    """Bytes of a layer's `SampledMoments`."""
    return 4 * min(EXPERTS, layer.experts) * min(WIDE, layer.shape[-1]) ** 2


@dataclass
class SampledMoments:
    """Second moments of what a layer reads, of at most WIDE columns and EXPERTS experts, row by
    weighted row.
    """

    found: dict[int, np.ndarray] = field(default_factory=dict)
    rows: int = 0

    def add(
        self, rows: np.ndarray, roots: np.ndarray, part: np.ndarray | None, experts: int
    ) -> None:
        """Add rows, float32 (rows, columns), with the roots of their weights and their experts or
        None.
        """
        rows = rows[:, :: -(-rows.shape[1] // WIDE)]
        for expert in range(0, experts, -(-experts // EXPERTS)):
            chosen = slice(None) if part is None else part == expert
            mine = rows[chosen] * roots[chosen, None]
            if expert not in self.found:
                self.found[expert] = np.zeros((rows.shape[1],) * 2, dtype=np.float32)
            if len(mine):
                self.found[expert] += mine.T @ mine
                self.rows += len(mine)

    def remaining(self) -> float:
        """The share of an error's cost that error feedback leaves; experts borrow from each other
        as in inputs.py.
        """
        moments = list(self.found.values())
        if len(moments) > 1 and self.rows:
            pool = POOL * len(moments[0]) / self.rows * sum(moments[1:], moments[0])
            moments = [moment + pool for moment in moments]
        return remaining(moments)
