"""Tokens that a model wrote itself: the only text that mint-mlx ever sees, apart from the baselines beside it.

Windows of random tokens are resampled a few times by parallel passes of the model: each pass draws every token anew
from the model's prediction given the previous pass's tokens before it. This is Jacobi's iteration, which Santilli et
al. ("Accelerating Transformer Inference for Translation via Parallel Decoding", 2023) use to decode. It needs no
cache and runs on a model that is streamed from disk.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from .load import Source
from .runner import Runner, forward, load_runner

PASSES = 4
LENGTH = 256  # tokens a window
Progress = Callable[[str, int, int], None]


def write_tokens(
    source: Source,
    vocabulary: int,
    count: int,
    seed: int = 0,
    passes: int = PASSES,
    length: int = LENGTH,
    progress: Progress = lambda *_: None,
    streamed: bool | None = None,
) -> np.ndarray:
    """Tokens of a model's own, int32 (windows, length), at least `count` of them.

    Args:
        source: a checkpoint whose weights are here.
        vocabulary: tokens that it knows; the first draw is uniform over them.
        count: tokens wanted.
        seed: the same seed gives the same tokens.
        passes: over all windows.
        length: tokens a window.
        progress: called with (what, done, total).
        streamed: as in `runner.load_runner`.
    """
    windows = -(-count // length)
    tokens = np.random.default_rng(seed).integers(0, vocabulary, (windows, length)).astype(np.int32)
    runner: Runner | None = None
    for number in range(passes):
        progress(f"pass {number + 1}", number, passes)
        if runner is None or runner.streamed:
            runner = load_runner(source.path, streamed)
        key = mx.random.key(seed * passes + number)
        tokens = resample(runner, tokens, key)
    progress("", passes, passes)
    return tokens


def resample(runner: Runner, tokens: np.ndarray, key: mx.array) -> np.ndarray:
    """Every token but each window's first drawn anew, given those before it."""
    fresh = tokens.copy()
    batch = max(1, 4096 // tokens.shape[1])
    for piece in forward(runner, tokens, batch):
        key, draw = mx.random.split(key)
        drawn = np.asarray(mx.random.categorical(piece.logits, key=draw)).astype(np.int32)
        last = min(piece.columns.stop, tokens.shape[1] - 1)
        fresh[piece.rows, piece.columns.start + 1 : last + 1] = drawn[:, : last - piece.columns.start]
    return fresh
