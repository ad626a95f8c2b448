"""Finds weights that lie on a grid already: those of models that were quantized before.

Quantization-aware training and the 16-bit copies of quantized models leave weights that take at
most 2^b equidistant values in each group. `mx.quantize` misses that grid, as it follows from the
range of a group alone; the grid's own codes lose next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from ..base.quant_config import AFFINE_BITS, AFFINE_GROUPS, QuantConfig, mx_mode
from ..checkpoint.row_reader import select_rows
from .distortion import as_experts
from .group_codes import affine_codes, as_numbers, in_chunks, mx_codes, varies

# As row_sampling.Read: experts (n,) and rows (n, k) -> their weights (n, k, columns).
Read = Callable[[np.ndarray, np.ndarray], mx.array]

FEW_GROUPS = 4  # of one row, that rule a grid out
GLANCE = 2048  # weights of one row that suggest one
SUGGESTS = 0.9  # the share of these groups that must fit
FITS = 0.99  # the share of a layer's groups that must fit
VARIES = 1 / 16  # the share of groups that must hold more than one value, to tell anything
SAMPLE = 1 << 18  # weights of a layer that are held against a grid
FEWEST = 4  # rows of each expert that are, at least
MX_GRIDS = ("mxfp4", "nvfp4")


def describe(grid: QuantConfig) -> str:
    """A grid in words, such as `on a 4-bit grid of 32`."""
    if grid.mode != "affine":
        return f"on the grid of {grid}"
    return f"on {'an' if grid.bits == 8 else 'a'} {grid.bits}-bit grid of {grid.group_size}"


def grid_for(grids: Sequence[QuantConfig], config: QuantConfig) -> QuantConfig | None:
    """The grid whose weights a configuration can store, or None.

    An affine one takes any affine grid of no more bits in the same or larger groups.
    """

    def stores(grid: QuantConfig) -> bool:
        if grid.mode != "affine" or config.mode != "affine":
            return grid == config
        return grid.bits <= config.bits and grid.group_size % config.group_size == 0

    return next((grid for grid in grids if stores(grid)), None)


def find_grids(read: Read, shape: tuple[int, int, int]) -> tuple[QuantConfig, ...]:
    """The grids that a layer's weights lie on; of those with fewest bits first.

    Args:
        read: reads rows of the layer, in the type that they will be written in.
        shape: experts, rows and columns.
    """
    experts, _, columns = shape
    if columns % min(AFFINE_GROUPS):
        return ()

    # A few groups of one row rule out nearly every layer that is on no grid.
    row = _telling_row(read, shape)
    groups = row.reshape(-1, min(AFFINE_GROUPS))
    few = groups[varies(groups)][:FEW_GROUPS]
    widest = (QuantConfig(max(AFFINE_BITS), groups.shape[1]), *map(mx_mode, MX_GRIDS))
    if not any(_share_on(few, grid) >= SUGGESTS for grid in widest):
        return ()

    # The rest of the row suggests which ones it may be on, and a sample of rows decides.
    suggested = _matching(row[:, : GLANCE if columns > GLANCE else None], SUGGESTS)
    if not suggested:
        return ()

    sample = sample_rows(shape)
    weights = as_numbers(read(np.arange(experts), np.tile(sample, (experts, 1))))
    return _matching(weights, FITS, suggested)


def find_grids_of(weight: mx.array) -> tuple[QuantConfig, ...]:
    """As `find_grids`, for a weight (..., rows, columns) in memory."""
    stacked = as_experts(weight)
    experts, rows, columns = stacked.shape
    return find_grids(partial(select_rows, stacked), (experts, rows, columns))


def _telling_row(read: Read, shape: tuple[int, int, int]) -> np.ndarray:
    """A row of more than one value, float32 (1, columns), where one of three rows is."""
    experts, rows, columns = shape
    for expert, row in ((experts // 2, rows // 2), (0, 0), (experts - 1, rows - 1)):
        weights = as_numbers(read(np.array([expert]), np.array([[row]]))).reshape(1, columns)
        if varies(weights).any():
            break
    return weights


def sample_rows(shape: tuple[int, int, int]) -> np.ndarray:
    """The rows of each expert that are held against a grid, evenly spaced: int (rows,)."""
    experts, rows, columns = shape
    count = min(rows, max(FEWEST, SAMPLE // (experts * columns)))
    return np.unique(np.linspace(0, rows - 1, count).astype(int))


def _matching(
    weights: np.ndarray, share: float, among: Sequence[QuantConfig] = ()
) -> tuple[QuantConfig, ...]:
    """The grids that at least a share of the groups fit, without those that another one implies.

    Args:
        weights: float32 (..., columns).
        share: of the groups that hold more than one value.
        among: grids that a look at fewer weights suggested: none of fewer bits, or of another mode,
            is tried. All by default.
    """
    grids: list[QuantConfig] = []
    for name in MX_GRIDS:
        grid = mx_mode(name)
        if (not among or grid in among) and _share_on(weights, grid) >= share:
            grids.append(grid)

    # What fits in a group fits in the smaller ones within it.
    bits_at_least = {grid.group_size: grid.bits for grid in among if grid.mode == "affine"}
    fewest = max(AFFINE_BITS) + 1
    for group in sorted(AFFINE_GROUPS, reverse=True):
        wider = [bits for size, bits in bits_at_least.items() if size >= group]
        if among and not any(size >= group for size in bits_at_least):
            continue
        least = bits_at_least.get(group, min(wider, default=0))
        for bits in AFFINE_BITS:
            grid = QuantConfig(bits, group)
            if least <= bits < fewest and _share_on(weights, grid) >= share:
                grids.append(grid)
                fewest = bits
                break

    # So many values come close to those of several smaller groups together.
    if any(grid.bits < 8 for grid in grids):
        grids = [grid for grid in grids if grid.bits < 8]
    return tuple(sorted(grids, key=lambda grid: (grid.bits, -grid.group_size)))


def _share_on(weights: np.ndarray, grid: QuantConfig) -> float:
    """The share of groups on a grid, of those that hold more than one value."""
    if weights.shape[-1] % grid.group_size:
        return 0.0
    varied = fitting = total = 0
    for groups in in_chunks(weights.reshape(-1, grid.group_size)):
        telling = varies(groups)
        if grid.mode == "affine":
            fits = affine_codes(groups[telling], grid.bits)[1]
        else:
            fits = mx_codes(groups[telling], grid)[2]
        total += len(groups)
        varied += len(fits)
        fitting += int(fits.sum())
        # A layer on no grid is left after its first chunk.
        if varied and fitting < 0.5 * varied:
            return 0.0
    return fitting / varied if varied > VARIES * total else 0.0
