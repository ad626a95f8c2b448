"""The codes of weights that lie on a grid already, taken as they are: they cost next to nothing."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ...base.quant_config import QuantConfig
from ...checkpoint.layers import Layer
from ...measure.grid import find_grids_of, grid_for
from ...measure.grid_fit import fit, nearest_errors
from . import rtn
from .codes import pack


def grid_codes(weight: mx.array, grid: QuantConfig, config: QuantConfig) -> dict[str, mx.array]:
    """A weight's groups with the codes of their grid, or of `mx.quantize` where that is no worse.

    Args:
        weight: (..., rows, columns) in the type that its scales shall have.
        grid: that it lies on.
        config: how it is stored; `grid_for` says whether it can be.

    Returns:
        `weight` (uint32, packed), `scales`, and `biases` where the mode has them.
    """
    packed = rtn.quantize(weight, config)
    fitted = fit(weight, grid)
    better = fitted.error < nearest_errors(weight, config, grid.group_size)

    # Smaller groups repeat the scale and bias of the grid's group.
    repeats = grid.group_size // config.group_size
    fresh = {
        "weight": pack(fitted.codes, config.bits),
        "scales": np.repeat(fitted.scales, repeats),
    }
    if fitted.biases is not None:
        fresh["biases"] = np.repeat(fitted.biases, repeats)

    # A group's codes fill whole words, so groups can be replaced one by one.
    for name, array in packed.items():
        by_group = array.reshape(len(better), -1)
        on_grid = mx.array(fresh[name]).reshape(len(better), -1).astype(array.dtype)
        packed[name] = mx.where(mx.array(better)[:, None], on_grid, by_group).reshape(array.shape)
    return packed


def codes_on_grid(
    layer: Layer, weight: mx.array, config: QuantConfig, grids: Sequence[QuantConfig] | None = None
) -> dict[str, mx.array] | None:
    """As `grid_codes`; None where the weight is on no grid that the configuration can store.

    Args:
        layer: one that is quantized in the source is left alone.
        weight: all of it, or some rows where `grids` says what they lie on.
        config: how it is stored.
        grids: that the layer lies on, where that is known.
    """
    if layer.stored is not None or not config.quantized:
        return None
    grid = grid_for(find_grids_of(weight) if grids is None else grids, config)
    return None if grid is None else grid_codes(weight, grid, config)
