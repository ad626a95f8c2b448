"""The quantizers by name: same plan, same bytes, other codes. To add one, write its file and enter it here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import MintError
from ..layers import Inventory, Layer
from ..load import Source
from ..quant import QuantConfig
from ..sensitivity import Sensitivity
from . import gptq, rtn

SCRATCH = "scratch-"  # how the names of files begin that a quantizer keeps in the work folder
Own = tuple[np.ndarray, Sensitivity]  # the model's own tokens, int32 (windows, tokens), and its sensitivity on them


@dataclass(frozen=True)
class Work:
    """What a quantizer may look at besides the layer in hand.

    Attributes:
        source, inventory: the checkpoint and its layers.
        choice: the configuration of every layer.
        folder: where it may keep what makes its work resumable; files named SCRATCH are deleted in the end.
        own: None where the quantizer needs no inputs.
    """

    source: Source
    inventory: Inventory
    choice: Mapping[str, QuantConfig]
    folder: Path
    own: Own | None


Quantizer = Callable[[Layer, mx.array, QuantConfig], dict[str, mx.array]]


def _rtn(_: Work) -> Quantizer:
    return lambda layer, weight, config: rtn.quantize(weight, config)


def _gptq(work: Work) -> Quantizer:
    from ..inputs import Moments  # (it brings all that runs a model)

    assert work.own is not None
    moments = Moments(work.source, work.inventory, *work.own)
    return lambda layer, weight, config: gptq.quantize(weight, config, moments.of(layer.path))


def _learn(work: Work) -> Quantizer:
    from .learner import Learner

    return Learner(work)


QUANTIZERS: dict[str, Callable[[Work], Quantizer]] = {"rtn": _rtn, "gptq": _gptq, "learn": _learn}
NEEDS_INPUTS = ("gptq", "learn")


def find_quantizer(name: str) -> Callable[[Work], Quantizer]:
    """A quantizer by name; it is asked for layers in the model's order.

    Raises:
        MintError: there is none of that name.
    """
    if name not in QUANTIZERS:
        raise MintError(f"no quantizer is called {name!r}: there are {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]
