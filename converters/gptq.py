"""Error feedback: each column's rounding error is passed on to the columns that are not rounded yet.

GPTQ (Frantar et al., 2022), with the model's own weighting: what is minimised is the error at the layer's output
times how much the model minds it, so the second moment of the inputs is `E[|g|^2 x x^T]`, with x and the output
gradient g from tokens that the model wrote itself. Columns go by falling diagonal, on the grids that rounding to
nearest has, which allows any bit width and group size. The experts of a layer are treated apart; one that was rarely
chosen borrows from all.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..quant import QuantConfig
from . import rtn
from .pack import Codes

DAMPING = 0.01  # of the mean diagonal, added to it
ROWS = 8192  # treated at once
BLOCK = 128  # columns between two updates of all that follow


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
    return find_codes(weight, config, moments).packed()


def find_codes(weight: mx.array, config: QuantConfig, moments: np.ndarray) -> Codes:
    """As `quantize`, for an affine configuration, before packing."""
    shape = weight.shape
    exact = np.array(weight.astype(mx.float32)).reshape(len(moments), -1, shape[-1])
    plain = rtn.quantize(weight, config)  # its grids are kept
    scales, biases = (
        np.array(plain[name].astype(mx.float32)).reshape(*exact.shape[:2], -1) for name in ("scales", "biases")
    )
    codes = [feed_back(*parts, config) for parts in zip(exact, moments, scales, biases, strict=True)]
    return Codes(config, np.stack(codes).reshape(shape), plain["scales"], plain["biases"])


def feed_back(
    weight: np.ndarray, moment: np.ndarray, scales: np.ndarray, biases: np.ndarray, config: QuantConfig
) -> np.ndarray:
    """Codes uint8 (rows, columns) of one matrix on fixed grids, columns by falling diagonal of the second moment."""
    order = np.argsort(-np.diagonal(moment), kind="stable")
    upper = _inverse_root(moment[np.ix_(order, order)])
    parts = range(0, len(weight), ROWS)  # rows don't depend on each other: a vocabulary's are treated in parts
    pieces = [
        _feed_back(weight[i : i + ROWS], order, upper, scales[i : i + ROWS], biases[i : i + ROWS], config)
        for i in parts
    ]
    return np.concatenate(pieces)


def _feed_back(
    weight: np.ndarray,
    order: np.ndarray,
    upper: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
    config: QuantConfig,
) -> np.ndarray:
    top = 2**config.bits - 1
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
