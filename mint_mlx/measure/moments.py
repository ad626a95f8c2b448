"""Second moments of what layers read, factored: what error feedback needs and what it will gain.

A column's error that those still to be rounded can't make up for is its conditional variance given
them: D of H = L D L^T (Chee et al., "QuIP", 2023). Rounding to nearest costs the trace of H, error
feedback the trace of D, on the rows that H is of. On others it costs more, and more than rounding
where there are few rows for many columns: chance looks like a correlation. So the diagonal is
raised by as much as there are columns for a row (`add_ridge`), and what feedback leaves is measured
on rows that H is not of.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..base.threads import in_threads, single_blas
from ..checkpoint.layers import Layer
from ..checkpoint.roles import WRITES

DAMPING = 0.01  # of the mean diagonal, added to it whatever the rows
POOL = 1.0  # rows that an expert borrows from all, per column: average ones
EXPERTS = 8  # of a layer, whose moments tell how much remains
WIDE = 4096  # columns at most that tell it
NARROW = 512  # columns below which one thread multiplies
RUN = 256  # tokens that follow each other and are used alike
HELD_OUT = 4  # of so many runs the last tells what remains
TOLD_BY = 2048  # rows at most that tell it
LARGEST = 2.0  # share that is reported


def takes_feedback(layer: Layer) -> bool:
    """Whether error feedback can know what a layer reads.

    It does of linears and experts of the blocks, of the head and of embeddings.
    """
    if layer.role == "embedding":
        return layer.kind == "embedding"
    return layer.kind in ("linear", "experts") and (layer.block is not None or layer.role == "head")


def borrows(path: str) -> bool:
    """Whether a layer's experts read the same thing, so that one can borrow rows from all.

    What experts write back from is each one's own: its columns mean nothing to others.
    """
    return not path.endswith(WRITES)


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
    added = damp(damped, DAMPING)

    # MLX's is several times as fast as numpy's; LAPACK's failure is silent in it.
    lower = np.asarray(mx.linalg.cholesky(mx.array(damped), stream=mx.cpu))
    if not (np.diagonal(lower) > 0).all():
        lower = root(damped, added).astype(np.float32)
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


def damp(moment: np.ndarray, share: float) -> float:
    """Add a share of its mean diagonal to the diagonal of a moment, in place; of 1 where all is 0.

    Returns:
        What was added.
    """
    columns = len(moment)
    added = share * (float(np.trace(moment, dtype=np.float64)) / columns or 1.0)
    moment[np.diag_indices(columns)] += np.float32(added)
    return added


def effective_rows(weight: np.ndarray) -> float:
    """How many rows of one weight tell as much as these (Kish, "Survey Sampling", 1965).

    Args:
        weight: float32 (rows,).
    """
    exact = weight.astype(np.float64)
    squares = float(np.square(exact).sum())
    return float(exact.sum()) ** 2 / squares if squares else 0.0


def add_ridge(moment: np.ndarray, rows: float) -> None:
    """Raise the diagonal of a second moment, in place, against what is chance in it.

    By the mean diagonal times columns over rows: the share of the identity in the best estimate of
    a covariance falls like that (Ledoit and Wolf, "A well-conditioned estimator for
    large-dimensional covariance matrices", 2004).

    Args:
        moment: float32 (columns, columns), the sum over rows.
        rows: how many those were, of one weight.
    """
    damp(moment, len(moment) / max(rows, 1))


def remaining(moments: list[np.ndarray]) -> float:
    """The share of an error's cost that error feedback leaves on the rows that moments are of.

    Args:
        moments: of one layer's experts, (columns, columns) each.
    """
    with_feedback = 0.0
    to_nearest = 0.0
    for moment in moments:
        _, lower = factor(moment)
        with_feedback += float(np.square(np.diagonal(lower), dtype=np.float64).sum())
        to_nearest += float(np.trace(moment, dtype=np.float64))
    return _share(with_feedback, to_nearest)


def remaining_on(rows: np.ndarray, moment: np.ndarray) -> float:
    """The share of an error's cost that error feedback by a moment leaves on other rows.

    Args:
        rows: float32 (rows, columns), weighted.
        moment: (columns, columns).
    """
    column_order, lower = factor(moment)

    # An error E = R L^-1 comes of columns that were rounded by R, and costs |L^-1 x|^2.
    inverse = mx.linalg.tri_inv(mx.array(lower / np.diagonal(lower)), stream=mx.cpu)
    passed = np.asarray(inverse) @ rows.T[column_order]
    with_feedback = float(np.square(passed, dtype=np.float64).sum())
    return _share(with_feedback, float(np.square(rows, dtype=np.float64).sum()))


def _share(with_feedback: float, to_nearest: float) -> float:
    """Of one cost in another, at most LARGEST; 1 where there is none."""
    if to_nearest > 0 and np.isfinite(to_nearest):
        return min(LARGEST, with_feedback / to_nearest)
    return 1.0


def held_moments(layer: Layer) -> int:
    """Bytes of a layer's `SampledMoments`."""
    columns = min(WIDE, layer.shape[-1])
    told_by = TOLD_BY if layer.experts == 1 else 0
    return 4 * columns * (min(EXPERTS, layer.experts) * columns + told_by)


@dataclass
class SampledMoments:
    """Second moments of what a layer reads, of at most WIDE columns and EXPERTS experts.

    Attributes:
        by_expert: float32 (columns, columns), by the expert's index.
        weights: float32 (rows,) each, of the rows that they are of.
        held_out: float32 (rows, columns) each: rows of a layer without experts that its moment is
            not of. (An expert has too few rows to spare some.)
    """

    by_expert: dict[int, np.ndarray] = field(default_factory=dict)
    weights: list[np.ndarray] = field(default_factory=list)
    held_out: list[np.ndarray] = field(default_factory=list)

    def add(
        self,
        rows: np.ndarray,
        gradient: np.ndarray,
        token: np.ndarray,
        expert: np.ndarray | None,
        experts: int,
    ) -> None:
        """Add some of what the layer reads.

        Args:
            rows: float32 (rows, columns).
            gradient: float32 (rows,), |g| at the layer's output.
            token: int (rows,), the token of each, counted over all windows.
            expert: int (rows,), the expert of each; None for a layer without.
            experts: how many there are.
        """
        rows = rows[:, :: -(-rows.shape[1] // WIDE)]
        scale = gradient
        if expert is None:
            is_held_out = token // RUN % HELD_OUT == HELD_OUT - 1
            telling = np.flatnonzero(is_held_out)[: TOLD_BY - sum(map(len, self.held_out))]
            self.held_out.append(rows[telling] * gradient[telling, None])

            # Error feedback goes by |g|, what is lost by its square (converters/quantizers/inputs).
            scale = np.sqrt(gradient)
            expert = np.where(is_held_out, -1, 0)

        for index in range(0, experts, -(-experts // EXPERTS)):
            chosen = np.flatnonzero(expert == index)
            if index not in self.by_expert:
                self.by_expert[index] = np.zeros((rows.shape[1],) * 2, dtype=np.float32)
            if len(chosen):
                self.by_expert[index] += gram(rows[chosen] * scale[chosen, None])
                self.weights.append(gradient[chosen])

    def remaining(self) -> float:
        """The share of an error's cost that error feedback leaves.

        Without experts it is the share on rows held out, of which a short text may have none. Of
        experts it is that on the rows themselves, with as much borrowed as rows are few: plans by
        what is left under |g| and a ridge were worse (docs/research-log.md).
        """
        moments = list(self.by_expert.values())
        weights = np.concatenate([np.empty(0, dtype=np.float32), *self.weights])
        if len(moments) > 1 and len(weights):
            pool = POOL * len(moments[0]) / len(weights) * sum(moments[1:], moments[0])
            return remaining([moment + pool for moment in moments])
        if len(moments) != 1 or not len(weights):
            return remaining(moments)

        moment = moments[0].copy()
        add_ridge(moment, effective_rows(weights))
        held_out = np.concatenate([moment[:0], *self.held_out])
        return remaining_on(held_out, moment) if len(held_out) else remaining([moment])
