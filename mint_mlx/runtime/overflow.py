"""Whether a model's activations fit into float16, where that is the type that it states.

On a GPU a model is run in its own type. On a CPU all of mint-mlx runs in float32, where a model
whose activations overflow float16 looks sound; so they are looked at.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import patching
from .forward import forward
from .runner import Runner
from .taps import KINDS

LARGEST = 65504.0  # the largest number of float16
WINDOWS = 8  # that are run, of at most so many tokens
LENGTH = 256
BATCH = 8


def overflow(runner: Runner, tokens: np.ndarray) -> str | None:
    """The activations that float16 cannot hold, in words; None where all fit.

    Args:
        runner: a loaded model; a streamed one has dropped its blocks afterwards.
        tokens: int (windows, tokens), of which some are run.
    """
    largest, path = largest_activation(runner, tokens[:WINDOWS, :LENGTH])
    if largest <= LARGEST:
        return None
    size = f"reach {largest:.2g}" if math.isfinite(largest) else "are not finite"
    return f"activations {size} at {path}, where float16 ends at {LARGEST:.0f}"


def largest_activation(runner: Runner, tokens: np.ndarray) -> tuple[float, str]:
    """The largest absolute value that a layer or a norm reads or returns, and its path.

    Norms read the sum that goes from block to block.

    Args:
        runner: a loaded model.
        tokens: int (windows, tokens).

    Returns:
        Infinity where one is NaN or infinite, at the first of them.
    """
    largest, path = 0.0, ""

    def record(module: nn.Module, out: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal largest, path
        for array in (x, out):
            peak = _peak(array) if math.isfinite(largest) else 0.0
            if peak > largest:
                # Ids change when a block is loaded, so that names are looked up now.
                names = {id(m): name for name, m in runner.model.named_modules()}
                largest, path = peak, names.get(id(module), type(module).__name__)
        return out

    norms = {type(m) for m in runner.model.modules() if "Norm" in type(m).__name__}
    with patching.outputs_changed({*KINDS, *norms}, record):
        for piece in forward(runner, tokens, BATCH):
            mx.eval(piece.logits)
    return largest, path


def _peak(value: Any) -> float:
    """The largest absolute number of an array of floats; infinity where one isn't finite."""
    if not isinstance(value, mx.array) or not mx.issubdtype(value.dtype, mx.floating):
        return 0.0
    peak = float(mx.max(mx.abs(value.astype(mx.float32)))) if value.size else 0.0
    return peak if math.isfinite(peak) else math.inf
