"""Whether a written checkpoint holds the source's weights: some rows of each layer are compared.

What mlx-lm makes of the source is the reference. A reader that misses something that a family's
`sanitize` does (a factor, another order) would otherwise write a model that loads, and is another
one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ...base.quant_config import KEEP, QuantConfig
from ...checkpoint import mlxlm
from ...checkpoint.arrays import cast, dense
from ...checkpoint.block_path import any_block
from ...checkpoint.layer_stream import stream
from ...checkpoint.layers import MLX_DTYPES, Inventory, Layer
from ...checkpoint.row_reader import read_headers, read_rows, select_rows
from ...checkpoint.source import Source
from ...checkpoint.straight import source_parameters, straight_parameters
from ...measure.distortion import as_experts

Rows = dict[str, mx.array]  # some rows of a layer's weight, scales and biases

WHOLE = 2_000_000_000  # of a source of at most so many bytes every layer is read
EXPERTS = 4  # compared of each layer
ROWS = 4  # compared of each expert
LARGE = 1 << 22  # weights; of larger layers the compared rows are read alone
COMPARED = ("weight", "scales", "biases")
# An error is another model's, not a quantizer's, above this NMSE and this many times that of
# rounding to nearest. Error feedback and learning make larger errors in weights that are read
# little (.54 was seen in an expert of moe-22m at 3.5 bits); zeros have an NMSE of 1, other weights
# about 2.
NMSE = 0.9
TIMES_RTN = 10.0


def source_rows(
    source: Source, inventory: Inventory, modules: Collection[str]
) -> Iterator[tuple[str, Rows]]:
    """Some rows of the layers to compare among these modules, evaluated, by the layer's path.

    Args:
        source: the weights of these modules are on this machine.
        inventory: the layers.
        modules: paths.
    """
    # Rows of large layers are read alone, from the tensors that mlx-lm makes the layer of.
    straight = source_parameters(source.path, source.structure)
    by_row = {
        layer.path: straight[f"{layer.path}.weight"]
        for layer in inventory.layers
        if layer.size > LARGE and layer.stored is None and f"{layer.path}.weight" in straight
    }
    layers = {layer.path: layer for layer in inventory.layers}
    headers = read_headers(source.path, by_row.values())
    for path, tensors in by_row.items():
        if path in modules:
            weight = read_rows(source.path, headers, tensors, *_places(layers[path]))
            dtype: mx.Dtype = getattr(mx, MLX_DTYPES[layers[path].dtype])
            yield path, {"weight": cast(f"{path}.weight", weight, dtype)}

    whole = {layer.path for layer in _chosen(source, inventory) if layer.path not in by_row}
    paths = [path for path in inventory.order if path in whole and path in modules]
    for path, arrays in stream(source, inventory, paths, allow_nonfinite=True):
        rows = _drawn(layers[path], arrays)
        mx.eval(rows)
        yield path, rows


def wrong_layer(
    rows: Iterable[tuple[str, Rows]],
    folder: Path,
    choice: Mapping[str, QuantConfig],
    inventory: Inventory,
) -> str | None:
    """What differs in a written layer from the source's; None where the compared rows agree.

    Args:
        rows: those of the source, as `source_rows` gives them.
        folder: the written checkpoint.
        choice: the configuration of each layer.
        inventory: the layers.
    """
    layers = {layer.path: layer for layer in inventory.layers}
    straight = straight_parameters(folder)
    headers = read_headers(folder, straight.values())
    written: dict[str, dict[str, mx.array]] = {}
    for name, array in tree_flatten(mlxlm.build_model(folder, keep_nvfp4=True).parameters()):
        owner, _, local = name.rpartition(".")
        if owner in layers:
            written.setdefault(owner, {})[local] = array

    for path, tensors in rows:
        config, layer = choice.get(path, KEEP), layers[path]
        by_row = {
            local: read_rows(folder, headers, straight[f"{path}.{local}"], *_places(layer))
            for local in COMPARED
            if layer.size > LARGE and f"{path}.{local}" in straight
        }
        others = {n: array for n, array in written.pop(path).items() if n not in by_row}
        problem = _difference(layer, tensors, _drawn(layer, others) | by_row, config)
        if problem is not None:
            return f"{path} {problem}"
    return None


def _chosen(source: Source, inventory: Inventory) -> Iterator[Layer]:
    """The layers to compare: all, or one of each name where reading all takes long."""
    names = set[str]()
    for layer in inventory.layers:
        name = any_block(layer.path)
        if source.weight_bytes <= WHOLE or name not in names:
            yield layer
        names.add(name)


def _experts(layer: Layer) -> np.ndarray:
    """The experts of a layer that are compared."""
    experts: np.ndarray = np.unique(np.linspace(0, layer.as_experts[0] - 1, EXPERTS).astype(int))
    return experts


def _places(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """The experts of a layer that are compared (n,), and the rows of each of them (n, k)."""
    experts = _experts(layer)
    rows = np.unique(np.linspace(0, layer.as_experts[1] - 1, ROWS).astype(int))
    return experts, np.tile(rows, (len(experts), 1))


def _drawn(layer: Layer, tensors: Mapping[str, mx.array]) -> Rows:
    """The rows of a layer that are compared, of a module's tensors."""
    experts, rows = _places(layer)
    drawn = {
        name: select_rows(as_experts(tensors[name]), experts, rows)
        for name in COMPARED
        if name in tensors
    }
    if "global_scale" in tensors:
        drawn["global_scale"] = tensors["global_scale"][mx.array(experts)]
    return drawn


def _difference(layer: Layer, rows: Rows, written: Rows, config: QuantConfig) -> str | None:
    """What differs in some rows of a layer; None where they agree.

    Args:
        layer: the layer.
        rows: the source's (`_drawn`).
        written: those of the result.
        config: that it was written in.
    """
    expected = dense(layer, rows)
    stored = config if config.quantized else None
    actual = dense(replace(layer, stored=stored), dict(written))
    if not config.quantized or config.global_scale:
        same = mx.array_equal(expected, actual, equal_nan=True)
        return None if same else "was written with other values than the source's"

    rtn = mx.quantize(expected, config.group_size, config.bits, mode=config.mode)
    rounded = dense(
        replace(layer, stored=config), dict(zip(("weight", "scales", "biases"), rtn, strict=False))
    )
    nmse = _nmse(expected, actual)
    wrong = nmse > np.maximum(NMSE, TIMES_RTN * _nmse(expected, rounded))
    if not wrong.any():
        return None
    expert = f", expert {_experts(layer)[wrong.argmax()]}" if layer.kind == "experts" else ""
    return f"was written with an NMSE of {nmse[wrong.argmax()]:.3g}{expert}"


def _nmse(expected: mx.array, actual: mx.array) -> np.ndarray:
    """NMSE of each expert's rows (experts, rows, columns), float64 (experts,)."""
    exact = np.array(expected.astype(mx.float32)).astype(np.float64)
    error = ((exact - np.array(actual.astype(mx.float32))) ** 2).sum(axis=(1, 2))
    energy = (exact**2).sum(axis=(1, 2))
    ratio: np.ndarray = error / np.where(energy > 0, energy, 1)
    return ratio
