"""Quantizes the layers of a plan one by one, and hands them to the shards' writer.

Layers that can be quantized row by row are never whole in memory; all others come whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count

import mlx.core as mx

from ...base.distributed import ranks
from ...base.quant_config import QuantConfig
from ...checkpoint.arrays import dense
from ...checkpoint.layer_stream import stream
from ...checkpoint.layers import MLX_DTYPES, Layer
from ...checkpoint.layout import TensorSpec
from ...checkpoint.row_reader import Straight, straight_layers
from ...measure.grid import find_grids, grid_for
from ..quantizers import rtn
from ..quantizers.grid_codes import codes_on_grid
from ..quantizers.protocol import Quantizer, Work
from ..quantizers.registry import find_quantizer
from ..sources.restore import rounded
from . import rowwise
from .conversion import Conversion
from .row_file import store_rows
from .shard_writer import Writer
from .verify_values import source_rows


def write_layers(conversion: Conversion, writer: Writer) -> None:
    """Quantize and write what of this rank's share isn't written yet."""
    source, inventory, plan = conversion.source, conversion.inventory, conversion.plan
    report = conversion.report
    todo = _share(conversion, writer)
    if not todo:
        return
    quantize = find_quantizer(plan.quantizer).make(
        Work(
            source,
            inventory,
            plan.choice,
            conversion.work,
            conversion.sensitivity,
            report.detail,
            conversion.grids,
        )
    )
    layers = {layer.path: layer for layer in inventory.layers}
    step = count()
    for wave in conversion.waves(todo):
        if not source.has_weights:  # its shards are dropped before the result is verified
            store_rows(conversion.work, ranks().rank, source_rows(source, inventory, wave))

        # Layers that can be quantized row by row are never whole in memory.
        wave_layers = [layers[name] for name in wave if name in layers]
        by_row = _by_row(conversion, wave_layers, writer.units)
        for name, place in by_row.items():
            report.step(name, next(step), len(todo))
            pieces = rowwise.quantized_pieces(
                source,
                place,
                layers[name],
                plan.choice[name],
                _row_quantizer(conversion, place, layers[name], quantize),
                conversion.allow_nonfinite,
            )
            writer.put(name, pieces)
            mx.clear_cache()

        # All others come whole, one after the other.
        others = [name for name in wave if name not in by_row]
        for name, tensors in stream(source, inventory, others, conversion.allow_nonfinite):
            report.step(name, next(step), len(todo))
            config = plan.choice.get(name)
            if config is not None and config != layers[name].stored:
                tensors = _requantized(layers[name], tensors, config, quantize, conversion.grids)
                if not conversion.allow_nonfinite:
                    rtn.check_finite(name, tensors, config)
            elif config is not None and "biases" in tensors:
                tensors |= _rounded(layers[name], tensors)
            writer.put(name, [tensors])
    report.step("", len(todo), len(todo))


def _share(conversion: Conversion, writer: Writer) -> list[str]:
    """The modules that this rank has to write, in the model's order."""
    todo = [path for path in conversion.inventory.order if path not in writer.done]
    sizes = {path: sum(spec.nbytes for spec in writer.units[path]) for path in todo}
    share = ranks().share(sizes)
    return [path for path in todo if path in share]


def _by_row(
    conversion: Conversion, layers: Sequence[Layer], units: Mapping[str, tuple[TensorSpec, ...]]
) -> dict[str, Straight]:
    """The layers that can be quantized row by row, with where their rows lie."""
    if not find_quantizer(conversion.plan.quantizer).row_wise or not layers:
        return {}
    possible = [layer for layer in layers if rowwise.is_possible(layer, units[layer.path])]
    places = straight_layers(conversion.source, possible)
    return {layer.path: places[layer.path] for layer in layers if layer.path in places}


def _row_quantizer(
    conversion: Conversion, place: Straight, layer: Layer, quantize: Quantizer
) -> Quantizer:
    """What quantizes a layer's rows: its grid's own codes, or the plan's quantizer."""
    config = conversion.plan.choice[layer.path]
    if not conversion.grids or not config.quantized:
        return quantize
    grids = find_grids(partial(place.read, conversion.source, layer), layer.as_experts)
    if grid_for(grids, config) is None:
        return quantize

    def take_codes(layer: Layer, weight: mx.array, config: QuantConfig) -> dict[str, mx.array]:
        return codes_on_grid(layer, weight, config, grids) or quantize(layer, weight, config)

    return take_codes


def _requantized(
    layer: Layer,
    tensors: dict[str, mx.array],
    config: QuantConfig,
    quantize: Quantizer,
    grids: bool = True,
) -> dict[str, mx.array]:
    """A layer's tensors under another configuration than the source's."""
    weight = dense(layer, tensors)
    packed = {"weight": weight}
    if config.quantized:
        on_grid = codes_on_grid(layer, weight, config) if grids else None
        packed = on_grid or quantize(layer, weight, config)
    if config.quantized:
        rtn.check_scales(layer.path, weight, packed, config)
    replaced = ("weight", "scales", "biases", "global_scale")
    return {name: array for name, array in tensors.items() if name not in replaced} | packed


def _rounded(layer: Layer, tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """The scales and biases of a layer that stays as it is, in the type that they are written in.

    Those of foreign formats come in float32.
    """
    dtype: mx.Dtype = getattr(mx, MLX_DTYPES[layer.dtype])
    return rounded(tensors["scales"], tensors["biases"], dtype)
