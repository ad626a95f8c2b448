"""Error feedback: each column's rounding error is passed on to the columns not rounded yet.

GPTQ (Frantar et al., 2022), in the form of LDLQ (Chee et al., 2023, who show that both are the
same), which needs no inverse. With the model's own weighting: tokens count by how sensitive the
model is to an error at the layer's output, so the second moment of the inputs is `E[|g| x x^T]`,
with x and the output gradient g from tokens that the model wrote itself (inputs.py). Columns go by
falling diagonal, on the grids that rounding to nearest has, which allows any bit width and group
size. The experts of a layer are treated apart; where all read the same, each borrows from all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from ...base.quant_config import QuantConfig
from ...base.threads import cores, in_threads, single_blas
from ...checkpoint.layers import Layer
from ...measure.moments import factor
from . import rtn, search
from .codes import Codes

WIDE = 8192  # rows, of one expert or of several, whose columns are rounded together
WORKERS = 4  # threads at most: each holds the second moments and factors of WIDE rows' experts
BLOCK = 256  # columns whose share of a row's size is summed together
Place = tuple[slice, slice]  # experts and rows of a layer


class SecondMoments(Protocol):
    """Gives second moments by expert: an array, or what computes them on demand (inputs.py)."""

    def __getitem__(self, experts: slice, /) -> np.ndarray: ...


class Missing(Protocol):
    """What the inputs lack beside the source's, as weights see it (drift.py).

    Called with a slice of experts and their weights, float32 (experts, rows, columns), it gives the
    weights times the sum of |g| (x - x') x'^T, of the same shape; x are the source's inputs, x'
    those that the second moments are of.
    """

    def __call__(self, experts: slice, weight: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Factors:
    """Damped second moments H = L D L^T of some experts, in the order of their columns.

    Attributes:
        order: int (experts, columns), columns by rising diagonal of H; the last goes first.
        passed: L, float32 (experts, columns, columns), how much of an error a column passes on:
            ones on the diagonal and nothing above.
        variance: D, float32 (experts, columns), what an error of one costs, once others make up.
    """

    order: np.ndarray
    passed: np.ndarray
    variance: np.ndarray


def quantize(
    weight: mx.array,
    config: QuantConfig,
    moments: SecondMoments | None = None,
    searched: bool = False,
    missing: Missing | None = None,
) -> dict[str, mx.array]:
    """Quantize one layer.

    Args:
        weight: (..., rows, columns) in the type that its scales shall have.
        config: a quantized configuration whose group divides the columns.
        moments: gives float32 (experts, columns, columns) for a slice of experts, the weighted
            second moment of each one's inputs; None where there is none, which is rounded to
            nearest, as the mx modes are.
        searched: whether the ranges of the grids are searched, and what that shrinks is undone
            (search.py).
        missing: what the inputs lack beside the source's, which the codes are to make up for.

    Returns:
        `weight` (uint32, packed), `scales`, and `biases` where the mode has them.
    """
    if moments is None or config.mode != "affine":
        return (search if searched else rtn).quantize(weight, config)
    return find_codes(weight, config, moments, searched, missing).packed()


def find_codes(
    weight: mx.array,
    config: QuantConfig,
    moments: SecondMoments,
    searched: bool = False,
    missing: Missing | None = None,
) -> Codes:
    """As `quantize`, for an affine configuration, before packing."""
    weight_3d = weight.reshape(-1, *weight.shape[-2:])
    experts, rows, columns = weight_3d.shape
    codes = np.empty(weight_3d.shape, dtype=np.uint8)
    scales, biases = np.empty((2, experts, rows, columns // config.group_size), dtype=np.float32)

    # One factor serves all rows of a layer without experts; all threads of the BLAS compute it.
    # Otherwise what all experts share is computed before several threads ask for it.
    shared = moments[:] if experts == 1 else None
    shared_factors = _factors(shared) if shared is not None else None
    if shared is None:
        moments[:0]
    if missing is not None:
        missing(slice(0), np.empty((0, rows, columns), dtype=np.float32))

    def work(place: Place, exact: np.ndarray) -> None:
        moment = shared if shared is not None else moments[place[0]]
        grids = _grids(exact, weight.dtype, config, moment if searched else None)
        factors = shared_factors or _factors(moment)
        ordered = _ordered(exact, factors.order)
        shift = None if missing is None else _shift(missing(place[0], exact), factors)
        rounded, residuals = _feed_back(ordered, *grids, factors, config, shift)
        if searched:
            factor = _row_factors(ordered, residuals, factors, shift)
            grids = grids[0] * factor, grids[1] * factor
        codes[place] = _as_rows(rounded, factors.order)
        scales[place], biases[place] = grids

    pieces = (
        (place, np.array(weight_3d[place].astype(mx.float32))) for place in _places(experts, rows)
    )
    with single_blas():
        in_threads(work, pieces, WORKERS)
    shape = (*weight.shape[:-1], columns // config.group_size)
    return Codes(
        config,
        codes.reshape(weight.shape),
        *(mx.array(array.reshape(shape)).astype(weight.dtype) for array in (scales, biases)),
    )


def _grids(
    exact: np.ndarray, dtype: mx.Dtype, config: QuantConfig, moments: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases, float32 (experts, rows, groups), of some rows of some experts.

    Columns count by the roots of the moments' diagonal, which itself is noisy for rare experts.

    Args:
        exact: float32 (experts, rows, columns).
        dtype: that scales and biases are stored in.
        config: affine.
        moments: float32 (experts, columns, columns) to search ranges with; the grids of
            `mx.quantize` by default.
    """
    if moments is None:
        nearest = rtn.quantize(mx.array(exact).astype(dtype), config)
        scales, biases = (
            np.array(nearest[name].astype(mx.float32)) for name in ("scales", "biases")
        )
        return scales, biases

    experts, rows, columns = exact.shape
    scales, biases = np.empty((2, experts, rows, columns // config.group_size), dtype=np.float32)
    for weight, moment, scale, bias in zip(exact, moments, scales, biases, strict=True):
        importance = np.sqrt(np.maximum(np.diagonal(moment), 0))
        _, scale[:], bias[:] = search.find_grid(weight, config, dtype, importance)
    return scales, biases


def held(layer: Layer) -> int:
    """Bytes that error feedback takes while it rounds a layer."""
    rows, columns = layer.shape[-2:]
    some_experts, some_rows = _places(layer.experts, rows)[0]
    together = len(range(layer.experts)[some_experts])
    wide = len(range(rows)[some_rows])

    # A moment and a factor, or one more while that is computed; weights, shifted ones and errors.
    square = 4 * columns**2
    return cores(WORKERS) * together * (3 * square + 4 * 4 * wide * columns)


def _places(experts: int, rows: int) -> list[Place]:
    """How a layer is cut: between experts, or between the rows of the only one.

    Rows don't depend on each other. Of few small experts each thread gets some.
    """
    if experts > 1:
        together = min(WIDE // rows, -(-experts // WORKERS))
        return [(some, slice(None)) for some in _cut(experts, max(1, together))]
    return [(slice(None), some) for some in _cut(rows, max(1024, min(WIDE, -(-rows // WORKERS))))]


def _cut(count: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, count, step)]


def _factors(moments: np.ndarray) -> Factors:
    """The factors of second moments, float32 (experts, columns, columns)."""
    order = np.empty(moments.shape[:2], dtype=np.int64)
    passed = np.empty_like(moments)
    variance = np.empty(moments.shape[:2], dtype=np.float32)
    for expert, moment in enumerate(moments):
        order[expert], lower = factor(moment)
        diagonal = np.diagonal(lower)
        np.multiply(lower, 1 / diagonal, out=passed[expert])
        np.square(diagonal, out=variance[expert])
    return Factors(order, passed, variance)


def _ordered(weight: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Matrices (experts, rows, columns) as (columns, experts, rows), columns in their order."""
    ordered = np.empty((weight.shape[2], *weight.shape[:2]), dtype=weight.dtype)
    for expert, columns in enumerate(order):
        ordered[:, expert] = np.ascontiguousarray(weight[expert].T)[columns]
    return ordered


def _as_rows(ordered: np.ndarray, order: np.ndarray) -> np.ndarray:
    """What `_ordered` gives, as it was."""
    rows = np.empty((*ordered.shape[1:], len(ordered)), dtype=ordered.dtype)
    for expert, columns in enumerate(order):
        inverse = np.empty_like(columns)
        inverse[columns] = np.arange(len(columns))
        rows[expert] = ordered[:, expert][inverse].T
    return rows


def _feed_back(
    exact: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
    factors: Factors,
    config: QuantConfig,
    shift: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of matrices on fixed grids.

    Args:
        exact: float32 (columns, experts, rows), the weights, columns in their order.
        scales, biases: float32 (experts, rows, groups).
        factors: of the second moments.
        config: affine.
        shift: of `_shift`, by which columns aim elsewhere than at the weights.

    Returns:
        Codes, uint8, and what each column was rounded by once the errors of others had been passed
        on to it, float32: both (columns, experts, rows).
    """
    columns, experts, _ = exact.shape
    each = np.arange(experts)
    top = 2**config.bits - 1

    group = factors.order // config.group_size
    # A group whose range is nothing in 16 bits has a scale of zero: its bias is all.
    scales = np.where(scales == 0, np.float32(1), scales)
    scales_by_group = np.ascontiguousarray(scales.transpose(2, 0, 1))
    biases_by_group = np.ascontiguousarray(biases.transpose(2, 0, 1))
    shifted = exact.copy() if shift is None else exact + shift
    errors = np.empty_like(exact)
    rounded = np.empty(exact.shape, dtype=np.uint8)

    for start, middle, stop in _halves(0, columns):
        # Columns that were rounded pass their errors on, many at once.
        if stop - start > 1:
            passed = factors.passed[:, middle:stop, start:middle].transpose(0, 2, 1)
            product = np.matmul(passed, errors[middle:stop].transpose(1, 0, 2))
            shifted[start:middle] += product.transpose(1, 0, 2)
            continue

        # A column is rounded on its grid.
        scale = scales_by_group[group[:, start], each]
        bias = biases_by_group[group[:, start], each]
        code = shifted[start] - bias
        code /= scale
        np.clip(np.rint(code, out=code), 0, top, out=code)
        rounded[start] = code
        code *= scale
        code += bias
        np.subtract(exact[start], code, out=errors[start])
        shifted[start] -= code
    return rounded, shifted


def _shift(seen: np.ndarray, factors: Factors) -> np.ndarray:
    """By how much each column aims elsewhere, for codes that make up for what the inputs lack.

    The weights W' that lose least on the inputs x' are W + W E[(x - x') x'^T] H^-1 (Li et al.,
    "GPTAQ", 2025, who fold that into each step of GPTQ). With H = L D L^T the columns of W' L are
    what error feedback aims at, and (W' - W) L is the right side times L^-T D^-1.

    Args:
        seen: float32 (experts, rows, columns), of `Missing`.
        factors: of H, the second moments of x'.

    Returns:
        float32 (columns, experts, rows), columns in their order.
    """
    ordered = _ordered(seen, factors.order)
    solved = np.ascontiguousarray(ordered.transpose(1, 0, 2))
    for start in range(0, solved.shape[1], BLOCK):
        some = slice(start, start + BLOCK)
        if start:
            solved[:, some] -= np.matmul(factors.passed[:, some, :start], solved[:, :start])
        solved[:, some] = np.linalg.solve(factors.passed[:, some, some], solved[:, some])
    solved /= factors.variance[..., None]
    return solved.transpose(1, 0, 2)


def _row_factors(
    exact: np.ndarray, residuals: np.ndarray, factors: Factors, shift: np.ndarray | None = None
) -> np.ndarray:
    """By how much rows are too small on their grids, as their inputs see them (search.py).

    That is (w H w) / (w' H w), w' from the codes. With H = L D L^T and u = w L, w H w is the sum of
    D u^2; (w - w') L is what columns were rounded by. Where columns aim elsewhere, w is that.

    Args:
        exact, residuals: float32 (columns, experts, rows), of `_feed_back`.
        factors: of H.
        shift: of `_shift`.

    Returns:
        float32 (experts, rows, 1).
    """
    unit = search.power_of_two(np.abs(exact).max(axis=0))
    energy, lost = np.zeros((2, *unit.shape), dtype=np.float32)
    for start in range(0, len(exact), BLOCK):
        some = slice(start, start + BLOCK)
        passed = factors.passed[:, start:, some].transpose(0, 2, 1)
        product = np.matmul(passed, exact[start:].transpose(1, 0, 2))
        if shift is not None:
            product += shift[some].transpose(1, 0, 2)
        product /= unit[:, None]
        weighted = product * factors.variance[:, some, None]
        energy += np.einsum("ecr,ecr->er", weighted, product)
        lost += np.einsum("ecr,cer->er", weighted, residuals[some]) / unit
    return search.stretch(energy, energy - lost)[..., None]


def _halves(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """In which order columns are rounded: the upper half, what it passes on, then the lower half.

    Yields:
        (start, middle, stop) where the columns from middle to stop pass their errors on to those
        from start to middle; (start, start, start + 1) where a column is rounded.
    """
    middle = (start + stop) // 2
    if stop - start > 1:
        yield from _halves(middle, stop)
    yield start, middle, stop
    if stop - start > 1:
        yield from _halves(start, middle)
