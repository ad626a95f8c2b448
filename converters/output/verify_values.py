"""Whether a written checkpoint holds the source's weights: finite numbers, and rows that agree.

What mlx-lm makes of the source is the reference. A reader that misses something that a family's
`sanitize` does (a factor, another order) would otherwise write a model that loads, and is another
one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ...base.quant_config import KEEP, QuantConfig
from ...base.safetensors_header import TensorInfo, read_header
from ...checkpoint import mlxlm
from ...checkpoint.arrays import FLOATS, INFINITY, dense
from ...checkpoint.block_path import any_block
from ...checkpoint.layer_stream import stream
from ...checkpoint.layers import MLX_DTYPES, Inventory, Layer
from ...checkpoint.layout import Layout
from ...checkpoint.row_reader import select_rows
from ...checkpoint.source import Source
from ...measure.distortion import as_experts
from ..quantizers.rtn import is_finite

Rows = dict[str, mx.array]  # some rows of a layer's weight, scales and biases

WHOLE = 2_000_000_000  # of a source of at most so many bytes every layer is checked
EXPERTS = 4  # compared of each layer
ROWS = 4  # compared of each expert
CHUNK = 1 << 24  # bytes checked at once
# An error is another model's, not a quantizer's, above this NMSE and this many times that of
# rounding to nearest. Error feedback and learning make larger errors in weights that are read
# little (.54 was seen in an expert of moe-22m at 3.5 bits); zeros have an NMSE of 1, other weights
# about 2.
NMSE = 0.9
TIMES_RTN = 10.0


def broken_tensor(folder: Path, layout: Layout) -> str | None:
    """The name of a written tensor that holds NaN or infinity; None where all are finite."""
    for file in layout.names:
        header, start = read_header(folder / file)
        for name, info in header.items():
            if info.dtype in FLOATS and not _is_finite(folder / file, start, info):
                return name
    return None


def broken_codes(folder: Path, layout: Layout, choice: Mapping[str, QuantConfig]) -> str | None:
    """The path of a written layer whose codes stand for weights that aren't finite; else None."""
    arrays: dict[str, dict[str, mx.array]] = {}
    for file in layout.names:
        loaded: Any = mx.load(str(folder / file))
        for name, array in loaded.items():
            owner, _, local = name.rpartition(".")
            if local in ("scales", "biases"):
                arrays.setdefault(owner, {})[local] = array
    for path, config in choice.items():
        packed = arrays.pop(path, {})
        if config.quantized and "scales" in packed and not is_finite(packed, config):
            return path
    return None


def _is_finite(path: Path, data: int, info: TensorInfo) -> bool:
    """Whether a tensor of floats in a file is finite; `data` is where the file's data begins."""
    bits = np.dtype(np.uint32 if info.dtype == "F32" else np.uint16)
    infinity = INFINITY[getattr(mx, MLX_DTYPES[info.dtype])]
    without_sign = bits.type(np.iinfo(bits).max >> 1)
    for start in range(info.start, info.end, CHUNK):
        count = min(CHUNK, info.end - start) // bits.itemsize
        values = np.fromfile(path, dtype=bits, count=count, offset=data + start)
        if int((values & without_sign).max(initial=0)) >= infinity:
            return False
    return True


def source_rows(
    source: Source, inventory: Inventory, modules: Collection[str]
) -> Iterator[tuple[str, Rows]]:
    """Some rows of the layers to compare among these modules, evaluated, by the layer's path.

    Args:
        source: the weights of these modules are on this machine.
        inventory: the layers.
        modules: paths.
    """
    layers = {layer.path: layer for layer in _chosen(source, inventory)}
    paths = [path for path in inventory.order if path in layers and path in modules]
    for path, tensors in stream(source, inventory, paths, allow_nonfinite=True):
        rows = _drawn(layers[path], tensors)
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
    written: dict[str, dict[str, mx.array]] = {}
    for name, array in tree_flatten(mlxlm.build_model(folder, keep_nvfp4=True).parameters()):
        owner, _, local = name.rpartition(".")
        if owner in layers:
            written.setdefault(owner, {})[local] = array

    for path, tensors in rows:
        config = choice.get(path, KEEP)
        problem = _difference(layers[path], tensors, written.pop(path), config)
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


def _drawn(layer: Layer, tensors: Mapping[str, mx.array]) -> Rows:
    """The rows of a layer that are compared, of a module's tensors."""
    experts = _experts(layer)
    rows = np.unique(np.linspace(0, layer.as_experts[1] - 1, ROWS).astype(int))
    grid = np.broadcast_to(rows, (len(experts), len(rows)))
    packed = {n: tensors[n] for n in ("weight", "scales", "biases") if n in tensors}
    drawn = {n: select_rows(as_experts(array), experts, grid) for n, array in packed.items()}
    if "global_scale" in tensors:
        drawn["global_scale"] = tensors["global_scale"][mx.array(experts)]
    return drawn


def _difference(
    layer: Layer, rows: Rows, written: Mapping[str, mx.array], config: QuantConfig
) -> str | None:
    """What differs in some rows of a layer; None where they agree.

    Args:
        layer: the layer.
        rows: the source's (`_drawn`).
        written: the module's tensors, of the result.
        config: that it was written in.
    """
    expected = dense(layer, rows)
    stored = config if config.quantized else None
    actual = dense(replace(layer, stored=stored), _drawn(layer, written))
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
