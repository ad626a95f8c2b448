"""Quantizes layers row by row, from the source's file to the result's.

No layer is ever whole in memory. That is possible for every layer whose rows can be read alone
(row_reader.py), where the quantizer's entry says `row_wise`. The result is the same to the byte.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import mlx.core as mx

from ...base.errors import NOT_FINITE, MintError
from ...base.quant_config import QuantConfig
from ...base.threads import side_by_side
from ...checkpoint.arrays import all_finite
from ...checkpoint.layers import Layer
from ...checkpoint.layout import TensorSpec
from ...checkpoint.row_reader import Straight
from ...checkpoint.source import Source
from ...runtime.device import on_cpu
from ..quantizers import rtn
from ..quantizers.protocol import Quantizer

CHUNK = 1 << 22  # weights at once
WORKERS = 8  # threads at most


def is_possible(layer: Layer, specs: tuple[TensorSpec, ...]) -> bool:
    """Whether a module is nothing but this layer's weight, or what it is quantized to."""
    names = {spec.name.rpartition(".")[2] for spec in specs}
    return layer.stored is None and names <= {"weight", "scales", "biases"} and not layer.extras


def quantized_pieces(
    source: Source,
    rows: Straight,
    layer: Layer,
    config: QuantConfig,
    quantize: Quantizer,
    allow_nonfinite: bool = False,
) -> Iterator[dict[str, mx.array]]:
    """A layer's tensors under a configuration, cut along their rows; each piece is evaluated.

    On a CPU each of several threads reads, quantizes and checks pieces of its own. While a GPU
    quantizes, the next rows are read.

    Raises:
        MintError: weights aren't finite, or would not be as codes.
    """

    def start(chunk: slice) -> dict[str, mx.array]:
        weight = rows.load(source, layer, chunk)
        if not allow_nonfinite and not all_finite(weight):
            raise MintError(f"{layer.path}.weight {NOT_FINITE}")
        piece = quantize(layer, weight, config) if config.quantized else {"weight": weight}
        # (Some rows alone may be those of an expert that does nothing.)
        if config.quantized and (config.mode == "nvfp4" or layer.kind != "experts"):
            rtn.check_scales(layer.path, weight, piece, config)
        return piece

    def finish(piece: dict[str, mx.array]) -> dict[str, mx.array]:
        mx.eval(piece)
        if not allow_nonfinite:
            rtn.check_finite(layer.path, piece, config)
        return piece

    chunks = rows.chunks(CHUNK)
    if on_cpu():
        yield from side_by_side(lambda chunk: finish(start(chunk)), zip(chunks), WORKERS)
        return
    started = deque[dict[str, mx.array]]()
    for chunk in chunks:
        started.append(start(chunk))
        mx.async_eval(started[-1])
        if len(started) > 1:
            yield finish(started.popleft())
    yield from map(finish, started)
