"""What another 16-bit type costs a model: the divergence of the cast one from the one as stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from .divergence import kl, log_softmax
from .forward import forward
from .runner import Runner, load_runner

ROUNDING = 1e-7  # nats that rounding in float32 may make
WINDOWS, LENGTH = 2, 128  # of the model's own text; all logits are held at once


def cast_divergence(
    folder: Path, dtype: str, written: Mapping[str, str], tokens: np.ndarray
) -> float:
    """The mean KL divergence of a model from itself with its parameters cast, nats per token.

    On a CPU both run in float32, so that the weights alone differ.

    Args:
        folder: the source, whose weights are on this machine.
        dtype: the 16-bit type that it will be written in.
        written: safetensors codes by parameter (layer_stream.written_dtypes).
        tokens: int (windows, tokens), the model's own text, of which some is run.
    """
    windows = tokens[:WINDOWS, :LENGTH]
    stored = _predicted(load_runner(folder), windows)
    mx.clear_cache()
    cast = _predicted(load_runner(folder, dtype=dtype, written=written), windows)
    return max(0.0, float(mx.mean(kl(stored, cast))))


def _predicted(runner: Runner, windows: np.ndarray) -> mx.array:
    """Log-probabilities, float32 (windows, tokens, vocabulary)."""
    pieces = [log_softmax(piece.logits) for piece in forward(runner, windows, len(windows))]
    predicted = mx.concatenate(pieces, axis=1)
    mx.eval(predicted)
    return predicted
