"""The quantizers by name: same plan, same bytes, other codes. To add one, write its file and enter it here."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..errors import MintError
from ..quant import QuantConfig
from . import gptq, rtn

Quantizer = Callable[[mx.array, QuantConfig, "np.ndarray | None"], dict[str, mx.array]]

QUANTIZERS: dict[str, Quantizer] = {"rtn": rtn.quantize, "gptq": gptq.quantize}
NEEDS_INPUTS = ("gptq",)


def find_quantizer(name: str) -> Quantizer:
    """A quantizer by name.

    Raises:
        MintError: there is none of that name.
    """
    if name not in QUANTIZERS:
        raise MintError(f"no quantizer is called {name!r}: there are {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]
