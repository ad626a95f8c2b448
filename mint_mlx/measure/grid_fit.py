"""Scales and biases for weights that lie on a grid, and what is lost with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..base.quant_config import QuantConfig
from .columns import rounder
from .grid import grid_for
from .group_codes import affine_codes, as_numbers, in_chunks, least_squares, mx_codes

WORKERS = 8  # threads at most
PIECE = 1 << 21  # weights of a layer whose errors are measured at once
SHIFTS = 16  # codes may begin this far above zero, for the sake of a bias that 16 bits can hold
OPTIONS = 4  # ways to write a group's grid that are computed, of those that should lose least
MOST_OPTIONS = 24  # the same where most groups are restored exactly


@dataclass(frozen=True)
class Fitted:
    """Groups on a grid, as a configuration stores them.

    Attributes:
        codes: uint8 (groups, weights).
        scales: of affine modes float32 (groups,), numbers of the type that they are stored in; of
            mx modes uint8.
        biases: float32 (groups,), as the scales; None in the mx modes.
        error: float64 (groups,), squared; infinite where a group isn't on the grid.
    """

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray | None
    error: np.ndarray


def grid_errors(
    weight: mx.array, grids: Sequence[QuantConfig], configs: Sequence[QuantConfig]
) -> tuple[np.ndarray, np.ndarray]:
    """What configurations lose that store a grid's codes, by expert.

    Args:
        weight: (experts, rows, columns) in the type that it will be written in.
        grids: of the layer.
        configs: each of which stores one of them.

    Returns:
        Squared errors, float64 (configs, experts); sums of squares, float64 (experts,).
    """
    errors = np.zeros((len(configs), weight.shape[0]))
    energy = np.zeros(weight.shape[0])
    rows = max(1, PIECE // weight.shape[-1])
    for expert in range(weight.shape[0]):
        for start in range(0, weight.shape[1], rows):
            piece = weight[expert, start : start + rows]
            energy[expert] += np.square(as_numbers(piece), dtype=np.float64).sum()

            # A grid's codes are the same in configurations of more bits and smaller groups.
            fitted: dict[QuantConfig, Fitted] = {}
            for index, config in enumerate(configs):
                grid = grid_for(grids, config)
                assert grid is not None
                if grid not in fitted:
                    fitted[grid] = fit(piece, grid)
                nearest = nearest_errors(piece, config, grid.group_size)
                errors[index, expert] += np.minimum(fitted[grid].error, nearest).sum()
    return errors, energy


def nearest_errors(weight: mx.array, config: QuantConfig, group: int) -> np.ndarray:
    """The squared error of `mx.quantize` in each so many weights: float64 (groups,)."""
    size = config.group_size
    packed = mx.quantize(weight, size, config.bits, mode=config.mode)
    nearest = mx.dequantize(*packed, group_size=size, bits=config.bits, mode=config.mode)
    difference = as_numbers(nearest).reshape(-1, group) - as_numbers(weight).reshape(-1, group)
    return np.asarray(np.square(difference, dtype=np.float64).sum(axis=1))


def fit(weight: mx.array, grid: QuantConfig) -> Fitted:
    """A weight's groups on a grid.

    Args:
        weight: (..., columns) in the type that its scales shall have.
        grid: that it lies on.
    """

    def fit_some(groups: np.ndarray) -> Fitted:
        if grid.mode == "affine":
            return _fit_affine(groups, grid.bits, dtype)
        codes, scales, fits = mx_codes(groups, grid)
        return Fitted(codes, scales, None, np.where(fits, 0.0, np.inf))

    dtype = weight.dtype
    groups = as_numbers(weight).reshape(-1, grid.group_size)
    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        pieces = list(pool.map(fit_some, in_chunks(groups)))
    biases = [piece.biases for piece in pieces if piece.biases is not None]
    return Fitted(
        np.concatenate([piece.codes for piece in pieces]),
        np.concatenate([piece.scales for piece in pieces]),
        np.concatenate(biases) if biases else None,
        np.concatenate([piece.error for piece in pieces]),
    )


def _fit_affine(groups: np.ndarray, bits: int, dtype: mx.Dtype) -> Fitted:
    """Codes, scales and biases whose product in 16 bits comes closest to the weights.

    Scales and biases are rounded to 16 bits, so of all ways to write a grid (which code is the
    least, whether the scale is negative) the one is taken that loses least.

    Args:
        groups: float32 (groups, weights).
        bits: of the grid.
        dtype: of scales and biases.
    """
    codes, fits = affine_codes(groups, bits)
    rounded = rounder(dtype)
    rising = codes.astype(np.float32)
    spread = np.square(rising - rising.mean(axis=1, keepdims=True)).sum(axis=1)
    scale, _ = least_squares(rising, groups)
    top = rising.max(axis=1, keepdims=True)
    shift = np.arange(min(SHIFTS, 2**bits))

    # Each scale and each first code asks for another bias, and some are closer to 16-bit numbers.
    options = []
    for nearby in _neighbours(rounded(scale[:, 0]), dtype):
        for sign in (1, -1):
            signed = (sign * nearby)[:, None]
            bias = _bias(groups, _turned(rising, top, signed), signed) - signed * shift
            lost = np.square(rounded(bias) - bias) * groups.shape[1]
            lost += (np.square(nearby - scale[:, 0]) * spread)[:, None]
            lost[shift + top > 2**bits - 1] = np.inf
            options.append((np.broadcast_to(signed, bias.shape), bias, lost))
    scales, biases, lost = (np.concatenate(arrays, axis=1) for arrays in zip(*options, strict=True))

    # What the rounding of the product adds is known once it is computed, for the few best options.
    best_biases = rounded(groups[:, 0])
    zeros = np.zeros(len(groups), dtype=np.float32)
    best = Fitted(codes, zeros, best_biases, np.full(len(groups), np.inf))
    for number, option in enumerate(np.argsort(lost, axis=1, kind="stable")[:, :MOST_OPTIONS].T):
        some = np.flatnonzero(fits & (best.error > 0))
        # Where most groups are restored exactly, the others can be as well.
        if number >= OPTIONS and len(some) > len(groups) / 4:
            break
        option = option[some]
        signed = scales[some, option][:, None]
        bias = rounded(biases[some, option][:, None])
        shifted = _turned(rising[some], top[some], signed)
        shifted += shift[option % len(shift)][:, None]
        error = _error(groups[some], shifted * signed, bias, rounded)

        better = np.isfinite(lost[some, option]) & (error < best.error[some])
        index = some[better]
        best.codes[index] = shifted[better].astype(np.uint8)
        best.scales[index] = signed[better, 0]
        best_biases[index] = bias[better, 0]
        best.error[index] = error[better]
    return best


def _error(
    groups: np.ndarray,
    product: np.ndarray,
    bias: np.ndarray,
    rounded: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """The squared error of each group under code x scale + bias.

    Weights that were restored on a GPU were rounded once, on a CPU twice.
    """
    once = np.square(rounded(product + bias) - groups).sum(axis=1)
    twice = np.square(rounded(rounded(product) + bias) - groups).sum(axis=1)
    return np.minimum(once, twice)


def _turned(codes: np.ndarray, top: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Codes that fall with rising weights where the scale is negative; the least stays 0."""
    return np.where(scale < 0, top - codes, codes).astype(np.float32)


def _bias(groups: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The bias (groups, 1) that brings codes on this scale closest to the weights."""
    mean = groups.mean(axis=1, keepdims=True)
    return np.asarray(mean - scale * codes.mean(axis=1, keepdims=True))


def _neighbours(scale: np.ndarray, dtype: mx.Dtype) -> Iterator[np.ndarray]:
    """Scales of a type and the next numbers of that type above and below; zero stays zero."""
    yield scale
    if dtype == mx.float32:
        return
    for step in (1, -1):
        if dtype == mx.bfloat16:
            moved = (scale.view(np.uint32) + np.uint32(step * 0x10000 % 2**32)).view(np.float32)
        else:
            half = scale.astype(np.float16).view(np.uint16) + np.uint16(step % 2**16)
            moved = half.view(np.float16).astype(np.float32)
        yield np.where(scale > 0, moved, scale)
