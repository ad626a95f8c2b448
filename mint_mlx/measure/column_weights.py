"""Weights of the columns of a layer: how large its inputs are, as far as the file says it.

An error in a column costs as much as what it is multiplied by, squared. A norm before the layer
multiplies its columns by a gain, and gains of released models differ by factors of ten to a hundred
within one norm: where a gain is small, training lets the column's weights grow, and their sum of
squares says nothing. So the squared gain is the weight of a column. The inputs of an MLP's last
projection are proportional to the outputs of `up`, and its columns have the sums of squares of that
layer's rows for weights, where these differ much (SPREAD): else they say little, and reading them
takes as long as reading the layer.

No text is read. What comes before a layer is learned from the stock model
(runtime/input_scales.py); a layer whose inputs are unknown has no weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..base.checksum import warn
from ..base.errors import is_passing
from ..base.streams import reading
from ..base.threads import side_by_side
from ..checkpoint import hub
from ..checkpoint.layers import Inventory, Layer
from ..checkpoint.row_reader import Straight, straight_layers
from ..checkpoint.source import Source, open_model
from ..checkpoint.straight import source_parameters
from ..runtime.input_scales import Scales, gain, trace
from .distortion import CHUNK, WORKERS

SAMPLE = 64  # rows of an expert, and experts, that tell whether rows differ
SPREAD = 1.0  # standard deviation of rows' sums of squares over their mean; .1 to .5 is usual


def column_weights(source: Source, inventory: Inventory) -> dict[str, np.ndarray]:
    """The weights of columns by layer path, float32 (1 or experts, columns), of mean one.

    Layers of equal weights are left out. Of a source whose shards come one by one only the norms
    are read.
    """
    model = open_model(source, reading())
    try:
        scales = trace(model)
    except Exception as error:  # the model's own code: its weights can be rounded all the same
        if is_passing(error):
            raise
        warn(
            f"{source.name} cannot be run here ({error}): the gains of its norms are not taken "
            "into account"
        )
        return {}

    gains = _gains(source, model, inventory, scales)
    weights = {path: np.square(values)[None] for path, values in gains.items()}
    if source.has_weights:
        weights |= _row_sums(source, inventory, scales, weights)
    means = {path: values.mean(axis=1, keepdims=True) for path, values in weights.items()}
    return {
        path: (values / np.where(means[path] > 0, means[path], 1)).astype(np.float32)
        for path, values in weights.items()
        if np.isfinite(means[path]).all() and (values != values[:, :1]).any()
    }


def _gains(
    source: Source, model: nn.Module, inventory: Inventory, scales: Scales
) -> dict[str, np.ndarray]:
    """The gain of the norm before each layer that has one, float32 (columns,), by layer path."""
    modules = dict(model.named_modules())
    wanted = {path: norm for path, norm in scales.norms.items() if norm in modules}
    if not source.has_weights:
        _fetch(source, set(wanted.values()))

    gains: dict[str, np.ndarray] = {}
    for layer in inventory.layers:
        if layer.path in wanted and layer.shape[-1] % 2 == 0:
            norm = modules[wanted[layer.path]]
            mx.eval(norm.parameters())
            gains[layer.path] = gain(norm, layer.shape[-1])
    return gains


def _fetch(source: Source, norms: Collection[str]) -> None:
    """Download the weights of norms into the sparse files of a source whose shards come later.

    What `sanitize` computes of a tensor is left out: such norms read as zeros, and all their gains
    as equal.
    """
    ranges: dict[str, list[tuple[int, int]]] = {}
    for name, tensors in source_parameters(source.path, source.structure).items():
        if name.rpartition(".")[0] in norms:
            for file, tensor, _ in tensors:
                info = source.headers[file][tensor]
                ranges.setdefault(file, []).append((info.start, info.end))
    for file, parts in ranges.items():
        hub.fetch_ranges(source.name, source.revision, file, parts, source.path)


def _row_sums(
    source: Source, inventory: Inventory, scales: Scales, weights: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The sums of squares of `up`'s rows, (experts, rows), by the path of the layer after it.

    Only of layers whose rows can be read alone, and differ.

    Args:
        source: the checkpoint, with its weights.
        inventory: its layers.
        scales: which layers these are.
        weights: of the columns of these, where they have any.
    """
    layers = {layer.path: layer for layer in inventory.layers}
    factors = {
        path: layers[factor]
        for path, factor in scales.factors.items()
        if path in layers
        and factor in layers
        and layers[factor].as_experts[:2] == layers[path].as_experts[::2]
    }
    straight = straight_layers(source, list(factors.values())) if factors else {}
    sums: dict[str, np.ndarray] = {}
    for path, up in factors.items():
        rows = straight.get(up.path)
        if rows is None:
            continue
        columns = weights.get(up.path, np.ones((1, up.shape[-1])))
        if _differ(source, up, rows, columns):
            sums[path] = _all_squares(source, up, rows, columns).reshape(up.as_experts[:2])
    return sums


def _all_squares(source: Source, layer: Layer, rows: Straight, columns: np.ndarray) -> np.ndarray:
    """`_squares` of all rows of a layer, float64 (experts x rows,)."""

    def squares(chunk: slice) -> np.ndarray:
        return _squares(rows.load(source, layer, chunk), columns)

    return np.concatenate(list(side_by_side(squares, zip(rows.chunks(CHUNK)), WORKERS)))


def _differ(source: Source, layer: Layer, rows: Straight, columns: np.ndarray) -> bool:
    """Whether the rows of some expert differ by more than SPREAD, judged by some of them."""
    experts, count, _ = layer.as_experts
    some = np.linspace(0, experts - 1, min(experts, SAMPLE)).astype(int)
    places = np.linspace(0, count - 1, min(count, SAMPLE)).astype(int)
    drawn = rows.read(source, layer, some, np.tile(places, (len(some), 1)))
    sums = _squares(drawn, columns)
    means = sums.mean(axis=-1)
    return bool((sums.std(axis=-1) > SPREAD * means).any())


def _squares(rows: mx.array, columns: np.ndarray) -> np.ndarray:
    """Sums of squares of rows (..., columns) times weights (1, columns), float64 (...)."""
    roots = mx.array(np.sqrt(columns[0], dtype=np.float32))
    return np.array(mx.sum(mx.square(rows.astype(mx.float32) * roots), axis=-1), dtype=np.float64)
