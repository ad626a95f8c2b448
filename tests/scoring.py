"""Random windows, and what checkpoints predict and score on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mint_mlx.eval.protocol import Windows
from mint_mlx.eval.reference import Predictions, predict
from mint_mlx.eval.score import Score, score
from mint_mlx.runtime.device import on_cpu
from mint_mlx.runtime.forward import Routing
from mint_mlx.runtime.runner import load_runner

RANDOM = Windows(np.random.default_rng(0).integers(0, 96, (3, 24)).astype(np.int32))
# A GPU runs a model in the type that it is stored in.
EXACT = mx.bfloat16 if on_cpu() else mx.float32


def predictions_of(
    folder: Path, windows: Windows, streamed: bool = False, scored: int = 1
) -> Predictions:
    """A source's predictions, with the experts that it chose."""
    return predict(load_runner(folder, streamed), windows, scored, batch=2, routing=Routing())


def score_of(
    folder: Path,
    windows: Windows,
    predictions: Predictions | None = None,
    streamed: bool = False,
) -> Score:
    """A checkpoint's scores."""
    return score(load_runner(folder, streamed), windows, 2, predictions)


def full_logp(folder: Path) -> np.ndarray:
    """Log-probabilities on RANDOM (windows, positions, vocabulary), in float64."""
    model = load_runner(folder).model
    logits = np.array(model(mx.array(RANDOM.tokens)).astype(mx.float32), dtype=np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_method(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A comparison's rows by method; of several sizes the last row."""
    return {row["method"]: row for row in rows}
