"""Error feedback: each column's rounding error is passed on to the columns that are not rounded yet.

GPTQ (Frantar et al., 2022), in the form of LDLQ (Chee et al., 2023, who show that both are the same), which needs no
inverse. With the model's own weighting: what is minimised is the error at the layer's output times how much the model
minds it, so the second moment of the inputs is `E[|g|^2 x x^T]`, with x and the output gradient g from tokens that the
model wrote itself. Columns go by falling diagonal, on the grids that rounding to nearest has, which allows any bit
width and group size. The experts of a layer are treated apart; one that was rarely chosen borrows from all.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx
import numpy as np

from ..quant import QuantConfig
from . import rtn
from .pack import Codes

DAMPING = 0.01  # of the mean diagonal, added to it
WIDE = 16_384  # rows, of one expert or of several, whose columns are rounded together
BLOCK, STRIP = 128, 16  # columns between two products with all errors before, and with those of the block


class SecondMoments(Protocol):
    """What gives second moments by expert: an array, or what makes them as they are asked for (inputs.py)."""

    def __getitem__(self, experts: slice, /) -> np.ndarray: ...


def quantize(weight: mx.array, config: QuantConfig, moments: SecondMoments | None = None) -> dict[str, mx.array]:
    """Quantize one layer.

    Args:
        weight: (..., rows, columns) in the type that its scales shall have.
        config: a quantized configuration whose group divides the columns.
        moments: gives float32 (experts, columns, columns) for a slice of experts, the weighted second moment of each
            one's inputs; None where there is none, which is rounded to nearest, as the mx modes are.

    Returns:
        `weight` (uint32, packed), `scales`, and `biases` where the mode has them.
    """
    if moments is None or config.mode != "affine":
        return rtn.quantize(weight, config)
    return find_codes(weight, config, moments).packed()


def find_codes(weight: mx.array, config: QuantConfig, moments: SecondMoments) -> Codes:
    """As `quantize`, for an affine configuration, before packing."""
    plain = rtn.quantize(weight, config)  # its grids are kept
    arrays = [a.reshape(-1, *a.shape[-2:]) for a in (weight, plain["scales"], plain["biases"])]
    experts, rows, _ = arrays[0].shape
    codes = np.empty(arrays[0].shape, dtype=np.uint8)
    together = max(1, WIDE // rows)
    for start in range(0, experts, together):
        some = slice(start, start + together)
        factors = _feedback(moments[some])
        for row in range(0, rows, WIDE):  # rows don't depend on each other
            here = some, slice(row, row + WIDE)
            exact, scales, biases = (np.array(array[here].astype(mx.float32)) for array in arrays)
            codes[here] = _feed_back(exact, *factors, scales, biases, config)
    return Codes(config, codes.reshape(weight.shape), plain["scales"], plain["biases"])


def _feedback(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In which order the columns of each expert go, and what each takes over from the errors of those before it.

    Returns:
        int (experts, columns) by falling diagonal of the moment H, and float32 (experts, columns, columns) with ones on
        the diagonal and nothing below: the factor U of the reordered, damped H = U D U^T.
    """
    orders = np.argsort(-np.diagonal(moments, axis1=1, axis2=2), axis=-1, kind="stable")
    passed = np.empty_like(moments)
    for moment, order, upper in zip(moments, orders, passed, strict=True):
        damped = moment.take(order[::-1], 0).take(order[::-1], 1)
        mean = float(np.trace(moment, dtype=np.float64)) / len(moment) or 1.0
        damped[np.diag_indices(len(moment))] += np.float32(DAMPING * mean)
        # Cholesky's factor of a matrix turned around is, turned back, an upper one. LAPACK's failure is silent in MLX.
        lower = np.asarray(mx.linalg.cholesky(mx.array(damped), stream=mx.cpu))
        if not (np.diagonal(lower) > 0).all():
            lower = np.linalg.cholesky(damped.astype(np.float64)).astype(np.float32)
        np.divide(lower[::-1, ::-1], np.diagonal(lower)[::-1], out=upper)
    return orders, passed


def _feed_back(
    weight: np.ndarray,
    order: np.ndarray,
    passed: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
    config: QuantConfig,
) -> np.ndarray:
    """Codes uint8 (experts, rows, columns) of matrices on fixed grids; `order` and `passed` of each by `_feedback`."""
    experts, rows, columns = weight.shape
    each = np.arange(experts)
    group = order // config.group_size
    by_group = [np.ascontiguousarray(array.transpose(2, 0, 1)) for array in (scales, biases)]
    errors = np.empty((columns, experts, rows), dtype=np.float32)  # columns in their order
    codes = np.empty(weight.shape, dtype=np.uint8)
    top = 2**config.bits - 1

    def taken(first: int, last: int, start: int, stop: int) -> np.ndarray:
        """What the columns from start to stop take over from the errors of the columns from first to last."""
        by_expert = np.matmul(
            passed[:, first:last, start:stop].transpose(0, 2, 1), errors[first:last].transpose(1, 0, 2)
        )
        return by_expert.transpose(1, 0, 2)

    for block in range(0, columns, BLOCK):
        end = min(block + BLOCK, columns)
        here = order[:, block:end]
        exact = np.stack([weight[e].take(here[e], axis=1).T for e in each], axis=1)
        rounded = np.empty(exact.shape, dtype=np.uint8)
        from_before = taken(0, block, block, end)
        for strip in range(block, end, STRIP):
            stop = min(strip + STRIP, end)
            shifted = from_before[strip - block : stop - block] + taken(block, strip, strip, stop)
            for j in range(strip, stop):
                scale, bias = (array[group[:, j], each] for array in by_group)
                code = exact[j - block] + shifted[j - strip]
                if j > strip:
                    code += taken(strip, j, j, j + 1)[0]
                code -= bias
                code /= scale
                np.clip(np.rint(code, out=code), 0, top, out=code)
                rounded[j - block] = code
                code *= scale
                code += bias
                np.subtract(exact[j - block], code, out=errors[j])
        for e in each:
            codes[e][:, here[e]] = rounded[:, e].T
    return codes
