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
from ...base.streams import working
from ...checkpoint.arrays import all_finite
from ...checkpoint.layers import Layer
from ...checkpoint.layout import TensorSpec
from ...checkpoint.row_reader import Straight
from ...checkpoint.source import Source
from ..quantizers import rtn
from ..quantizers.protocol import Quantizer

CHUNK = 1 << 22  # weights at once


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

    While the GPU or two threads quantize, the next rows are read.

    Raises:
        MintError: weights aren't finite, or would not be as codes.
    """

    def checked(piece: dict[str, mx.array]) -> dict[str, mx.array]:
        if not allow_nonfinite:
            rtn.check_finite(layer.path, piece, config)
        return piece

    streams = working()
    started = deque[dict[str, mx.array]]()
    for number, weight in enumerate(rows.chunks(source, layer, CHUNK)):
        if not allow_nonfinite and not all_finite(weight):
            raise MintError(f"{layer.path}.weight {NOT_FINITE}")
        with mx.stream(streams[number % len(streams)]):
            piece = quantize(layer, weight, config) if config.quantized else {"weight": weight}
            # (Some rows alone may be those of an expert that does nothing.)
            if config.quantized and (config.mode == "nvfp4" or layer.kind != "experts"):
                rtn.check_scales(layer.path, weight, piece, config)
        mx.async_eval(piece)
        started.append(piece)
        del weight, piece

        # One piece more than there are streams is under way, so that none of them waits.
        if len(started) > len(streams):
            yield checked(_evaluated(started))
    while started:
        yield checked(_evaluated(started))


def _evaluated(started: deque[dict[str, mx.array]]) -> dict[str, mx.array]:
    """The oldest piece, once it is computed."""
    piece = started.popleft()
    mx.eval(piece)
    return piece
