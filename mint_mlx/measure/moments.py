"""Second moments of what layers read, factored: what error feedback needs and what it will gain.

A column's error that those still to be rounded can't make up for is its conditional variance given
them: D of H = L D L^T (Chee et al., "QuIP", 2023). Rounding to nearest costs the trace of H, error
feedback the trace of D.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..base.threads import in_threads, single_blas
from ..checkpoint.layers import Layer

DAMPING = 0.01  # of the mean diagonal, added to it
POOL = 1.0  # rows that each expert borrows from all, per column: average ones
EXPERTS = 8  # of a layer, whose moments tell how much remains
WIDE = 4096  # columns at most that tell it
NARROW = 512  # columns below which one thread multiplies


def takes_feedback(layer: Layer) -> bool:
    """Whether error feedback can know what a layer reads.

    It does of linears and experts of the blocks, of the head and of embeddings.
    """
    if layer.role == "embedding":
        return layer.kind == "embedding"
    return layer.kind in ("linear", "experts") and (layer.block is not None or layer.role == "head")


def gram(rows: np.ndarray) -> np.ndarray:
    """rows.T @ rows, float32 (columns, columns), of float32 (rows, columns).

    In threads of one each: a BLAS of several waits for its threads at every product.
    """
    columns = rows.shape[1]
    out = np.empty((columns, columns), dtype=np.float32)
    middle = columns // 2 if columns >= NARROW else columns
    halves = slice(0, middle), slice(middle, columns)

    def work(above: slice, below: slice) -> None:
        np.matmul(rows[:, above].T, rows[:, below], out=out[above, below])

    pieces = [(half, half) for half in halves if half.start < half.stop]
    pieces += [halves] if len(pieces) > 1 else []
    with single_blas():
        if len(pieces) == 1:
            work(*pieces[0])
        else:
            in_threads(work, pieces, len(pieces))
            out[halves[1], halves[0]] = out[halves[0], halves[1]].T
    return out


def factor(moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of columns and the Cholesky factor of a damped moment.

    Args:
        moment: float32 (columns, columns), symmetric.

    Returns:
        int (columns,), columns by rising diagonal, of which the last is rounded first; and float32
        (columns, columns), the lower factor of the moment in that order.
    """
    column_order = np.argsort(np.diagonal(moment), kind="stable")
    damped = moment.take(column_order, 0).take(column_order, 1)
    mean = float(np.trace(moment, dtype=np.float64)) / len(moment) or 1.0
    damped[np.diag_indices(len(moment))] += np.float32(DAMPING * mean)

    # MLX's is several times as fast as numpy's; LAPACK's failure is silent in it.
    lower = np.asarray(mx.linalg.cholesky(mx.array(damped), stream=mx.cpu))
    if not (np.diagonal(lower) > 0).all():
        lower = root(damped, DAMPING * mean).astype(np.float32)
    return column_order, lower


def root(matrix: np.ndarray, damping: float) -> np.ndarray:
    """The lower Cholesky factor, float64, of a symmetric matrix that has been damped already.

    A matrix of which one direction holds nearly everything has no factor once it is rounded to 16
    bits: it is damped more.
    """
    exact = matrix.astype(np.float64)
    step = damping * np.eye(len(matrix))
    for more in (0, 9, 99):
        with suppress(np.linalg.LinAlgError):
            return np.asarray(np.linalg.cholesky(exact + more * step))
    return np.asarray(np.linalg.cholesky(exact + 999 * step))


def remaining(moments: list[np.ndarray]) -> float:
    """The share of an error's cost that error feedback leaves.

    Args:
        moments: of one layer's experts, (columns, columns) each.
    """
    with_feedback = 0.0
    to_nearest = 0.0
    for moment in moments:
        _, lower = factor(moment)
        with_feedback += float(np.square(np.diagonal(lower), dtype=np.float64).sum())
        to_nearest += float(np.trace(moment, dtype=np.float64))
    if to_nearest > 0 and np.isfinite(to_nearest):
        return min(1.0, with_feedback / to_nearest)
    return 1.0


def held_moments(layer: Layer) -> int:
    """Bytes of a layer's `SampledMoments`."""
    return 4 * min(EXPERTS, layer.experts) * min(WIDE, layer.shape[-1]) ** 2


@dataclass
class SampledMoments:
    """Second moments of what a layer reads, of at most WIDE columns and EXPERTS experts.

    Attributes:
        by_expert: float32 (columns, columns), by the expert's index.
        rows: how many were added.
    """

    by_expert: dict[int, np.ndarray] = field(default_factory=dict)
    rows: int = 0

    def add(
        self, rows: np.ndarray, roots: np.ndarray, expert: np.ndarray | None, experts: int
    ) -> None:
        """Add some of what the layer reads.

        Args:
            rows: float32 (rows, columns).
            roots: float32 (rows,), the square roots of their weights.
            expert: int (rows,), the expert of each; None for a layer without.
            experts: how many there are.
        """
        rows = rows[:, :: -(-rows.shape[1] // WIDE)]
        for index in range(0, experts, -(-experts // EXPERTS)):
            chosen = slice(None) if expert is None else np.flatnonzero(expert == index)
            weighted = rows[chosen] * roots[chosen, None]
            if index not in self.by_expert:
                self.by_expert[index] = np.zeros((rows.shape[1],) * 2, dtype=np.float32)
            if len(weighted):
                self.by_expert[index] += gram(weighted)
                self.rows += len(weighted)

    def remaining(self) -> float:
        """The share of an error's cost that error feedback leaves.

        Experts borrow from each other as they do for error feedback (converters/quantizers/
        inputs.py).
        """
        moments = list(self.by_expert.values())
        if len(moments) > 1 and self.rows:
            pool = POOL * len(moments[0]) / self.rows * sum(moments[1:], moments[0])
            moments = [moment + pool for moment in moments]
        return remaining(moments)
