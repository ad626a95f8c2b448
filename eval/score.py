"""Perplexity of a checkpoint: exp of the mean negative log-likelihood over windows of a text.

The protocol is MINT's and GPTQ's: non-overlapping windows, every token but a window's first scored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import mlxlm, runner
from ..errors import MintError

DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Score:
    """Negative log-likelihoods, float64 (windows, length - 1), in nats."""

    nll: np.ndarray

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll.mean()))

    @property
    def tokens(self) -> int:
        return int(self.nll.size)


def make_windows(ids: np.ndarray, length: int, limit: int | None = None) -> np.ndarray:
    """Cut token ids into non-overlapping windows.

    Args:
        ids: int (tokens,).
        length: tokens a window.
        limit: take the first so many windows only.

    Raises:
        MintError: the text is shorter than one window.
    """
    count = len(ids) // length
    if count == 0:
        raise MintError(
            f"the text has {len(ids)} tokens, less than one window of {length}: give a longer text or --length"
        )
    return np.asarray(ids[: count * length]).reshape(count, length)[:limit]


def score(model: Any, windows: np.ndarray, batch: int, progress: Callable[[int, int], None] = lambda *_: None) -> Score:
    """Score every window with a model that `runner.prepare` made ready.

    Raises:
        MintError: the model's output isn't finite.
    """
    parts = []
    for start in range(0, len(windows), batch):
        tokens = mx.array(windows[start : start + batch])
        logits = model(tokens)[:, :-1].astype(mx.float32)
        nll = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        mx.eval(nll)
        parts.append(np.asarray(nll, dtype=np.float64))
        if not np.isfinite(parts[-1]).all():
            raise MintError("the model's logits are not finite: its weights are damaged or overflow in this type")
        progress(min(start + batch, len(windows)), len(windows))
    return Score(np.concatenate(parts))


def load_for_scoring(folder: Path) -> tuple[Any, Any]:
    """A checkpoint's model, ready for this device, and its tokenizer."""
    model = runner.prepare(mlxlm.build_model(folder))
    return model, mlxlm.load_tokenizer(folder)
