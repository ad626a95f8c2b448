"""Error feedback: each column's rounding error is passed on to the columns that are not rounded yet.

GPTQ (Frantar et al., 2022), with the model's own weighting: what is minimised is the error at the layer's output
times how much the model minds it, so the second moment of the inputs is `E[|g|^2 x x^T]`, with x and the output
gradient g from tokens that the model wrote itself. Columns go by falling diagonal, on grids that are fixed before,
which allows any bit width and group size. The experts of a layer are treated apart; one that was rarely chosen
borrows from all.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..quant import QuantConfig
from . import rtn
from .pack import pack

DAMPING = 0.01  # of the mean diagonal, added to it
BLOCK = 128  # columns between two updates of all that follow
SHRINKS = np.linspace(1.0, 0.7, 7)  # ranges tried for each group, as shares of the whole


def quantize(weight: mx.array, config: QuantConfig, moments: np.ndarray | None = None) -> dict[str, mx.array]:
    """Quantize one layer.

    Args:
        weight: (..., rows, columns) in the type that its scales shall have.
        config: a quantized configuration whose group divides the columns.
        moments: float32 (experts, columns, columns), the weighted second moment of each expert's inputs; None where
            there is none (an embedding), which is rounded to nearest, as the mx modes are.

    Returns:
        `weight` (uint32, packed), `scales`, and `biases` where the mode has them.
    """
    if moments is None or config.mode != "affine":
        return rtn.quantize(weight, config)
    shape = weight.shape
    exact = np.array(weight.astype(mx.float32)).reshape(len(moments), -1, shape[-1])
    parts = [_expert(w, h, weight.dtype, config) for w, h in zip(exact, moments, strict=True)]
    codes, scales, biases = (np.concatenate([part[i] for part in parts]) for i in range(3))
    groups = (*shape[:-1], -1)
    return {
        "weight": mx.array(pack(codes, config.bits).reshape(groups)),
        "scales": mx.array(scales.reshape(groups)).astype(weight.dtype),
        "biases": mx.array(biases.reshape(groups)).astype(weight.dtype),
    }


def _expert(
    weight: np.ndarray, moment: np.ndarray, dtype: mx.Dtype, config: QuantConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and biases of one expert."""
    scales, biases = fit_grid(weight, np.diagonal(moment), dtype, config)
    return feed_back(weight, moment, scales, biases, config), scales, biases


def fit_grid(
    weight: np.ndarray, importance: np.ndarray, dtype: mx.Dtype, config: QuantConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias of each group: of several ranges the one with the least error, weighted by column.

    Args:
        weight: float32 (rows, columns).
        importance: (columns,), the diagonal of the inputs' second moment.
        dtype: that scales and biases are rounded to.

    Returns:
        float32 (rows, groups) each.
    """
    groups = weight.reshape(len(weight), -1, config.group_size)
    weights = importance.reshape(1, -1, config.group_size)
    packed = mx.quantize(mx.array(weight).astype(dtype), config.group_size, config.bits)
    scale, bias = (np.array(a.astype(mx.float32)) for a in packed[1:])
    top = 2**config.bits - 1
    middle = bias + scale * (top / 2)
    best = np.full(scale.shape, np.inf, dtype=np.float32)
    found = np.empty_like(scale), np.empty_like(bias)
    for shrink in SHRINKS:
        s = _rounded(scale * shrink, dtype)
        b = bias if shrink == 1 else _rounded(middle - s * (top / 2), dtype)
        codes = np.clip(np.rint((groups - b[..., None]) / s[..., None]), 0, top)
        error = (np.square(codes * s[..., None] + b[..., None] - groups) * weights).sum(-1)
        better = error < best
        best[better] = error[better]
        found[0][better], found[1][better] = s[better], b[better]
    return found


def _rounded(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    return np.array(mx.array(values).astype(dtype).astype(mx.float32))


def feed_back(
    weight: np.ndarray, moment: np.ndarray, scales: np.ndarray, biases: np.ndarray, config: QuantConfig
) -> np.ndarray:
    """Codes uint8 (rows, columns) of one matrix on fixed grids, columns by falling diagonal of the second moment."""
    top = 2**config.bits - 1
    order = np.argsort(-np.diagonal(moment), kind="stable")
    upper = _inverse_root(moment[np.ix_(order, order)])
    rest = weight[:, order].copy()
    group = order // config.group_size
    scale, bias = scales[:, group], biases[:, group]
    codes = np.empty(weight.shape, dtype=np.uint8)
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        errors = np.empty((len(weight), stop - start), dtype=np.float32)
        for j in range(start, stop):
            code = np.clip(np.rint((rest[:, j] - bias[:, j]) / scale[:, j]), 0, top)
            codes[:, order[j]] = code
            error = (rest[:, j] - (code * scale[:, j] + bias[:, j])) / upper[j, j]
            rest[:, j + 1 : stop] -= np.outer(error, upper[j, j + 1 : stop])
            errors[:, j - start] = error
        rest[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes


def _inverse_root(moment: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of the inverse of a (damped) second moment, float32."""
    size = len(moment)
    damped = moment.astype(np.float64)
    mean = float(np.trace(damped)) / size or 1.0
    damped[np.diag_indices(size)] += DAMPING * mean
    return np.asarray(np.linalg.cholesky(np.linalg.inv(damped)).T, dtype=np.float32)
