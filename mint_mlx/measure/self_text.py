"""Tokens that a model wrote itself: the only text that mint-mlx ever sees, apart from the baselines
beside it.

A model that fits in memory is sampled from, many windows at once (`sample`). One that doesn't is
streamed: windows of random tokens are resampled by parallel passes (`resample`), each of which
draws every token anew from the model's prediction given the previous pass's tokens before it. That
is Jacobi's iteration, which Santilli et al. ("Accelerating Transformer Inference for Translation
via Parallel Decoding", 2023) use to decode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..base.errors import MintError
from ..base.report import Progress
from ..checkpoint.source import Source
from ..runtime.cpu_ops import on_cpu
from ..runtime.kvcache import cache_size
from ..runtime.memory import RESERVE, room
from ..runtime.runner import Runner, forward, load_runner
from . import resume

PASSES = 4
LENGTH = 256  # tokens a window
WINDOWS = 64  # sampled at once


def write_tokens(
    source: Source,
    vocabulary: int,
    count: int,
    start: int | None = None,
    seed: int = 0,
    length: int | None = None,
    progress: Progress = lambda *_: None,
    streamed: bool | None = None,
    place: Path | None = None,
) -> tuple[np.ndarray, str]:
    """Tokens of a model's own, int32 (windows, length), at least `count` of them, and how they were
    made.

    Args:
        source: a checkpoint whose weights are here.
        vocabulary: tokens that it knows.
        count: tokens wanted.
        start: what each window starts with; a random token where a text of this model starts with
            none.
        seed: the same seed gives the same tokens.
        length: tokens a window; None is LENGTH.
        progress: called with (what, done, total).
        streamed: as in `runner.load_runner`.
        place: beside which finished parts or passes are noted (begun.py), for a run that goes on
            from there.
    """
    length = length or LENGTH
    tokens = (
        np.random.default_rng(seed)
        .integers(0, vocabulary, (-(-count // length), length))
        .astype(np.int32)
    )
    if start is not None:
        tokens[:, 0] = start
    runner = load_runner(source.path, streamed)
    windows = WINDOWS if runner.streamed else at_once(source, runner, length)
    kind = "resampled" if runner.streamed else f"sampled-{windows}"
    tokens, done = (place and resume.read_tokens(place, kind)) or (tokens, 0)

    def keep(tokens: np.ndarray, done: int) -> None:
        if place:
            resume.write_tokens(place, kind, tokens, done)

    if not runner.streamed:
        return sample(
            runner, tokens, mx.random.key(seed), progress, done, keep, windows
        ), f"sampled, seed {seed}"
    for number in range(done, PASSES):
        progress(f"pass {number + 1}", number, PASSES)
        if number > done:
            runner = load_runner(source.path, True)
        tokens = resample(runner, tokens, mx.random.key(seed * PASSES + number))
        keep(tokens, number + 1)
    progress("", PASSES, PASSES)
    return tokens, f"resampled {PASSES} times, seed {seed}"


def at_once(source: Source, runner: Runner, length: int) -> int:
    """How many windows are sampled at once: WINDOWS, or fewer where their caches would take half of
    what is left.
    """
    try:
        each = cache_size(source.config, length).bytes * (2 if on_cpu() else 1)  # float32 on a CPU
    except MintError:  # a cache of an unknown kind
        return WINDOWS
    left = (
        room() - RESERVE - sum(array.nbytes for _, array in tree_flatten(runner.model.parameters()))
    )
    windows = WINDOWS
    while windows > 1 and windows * each > left / 2:
        windows //= 2
    return windows


def sample(
    runner: Runner,
    tokens: np.ndarray,
    key: mx.array,
    progress: Progress = lambda *_: None,
    done: int = 0,
    keep: Callable[[np.ndarray, int], None] = lambda *_: None,
    windows: int = WINDOWS,
) -> np.ndarray:
    """Every token but each window's first drawn one after the other, given all those before it.

    So many `windows` are drawn at once; `done` such parts are there already, and `keep` is called
    after each. Tokens are int32 (windows, tokens).
    """
    from mlx_lm.models.cache import make_prompt_cache

    length, fresh = tokens.shape[1], tokens.copy()
    for part, begin in enumerate(range(0, len(tokens), windows)):
        if part < done:
            for _ in range(1, length):  # what follows is drawn as if this had been
                key = mx.random.split(key)[0]
            continue
        cache = make_prompt_cache(runner.model)
        last = mx.array(tokens[begin : begin + windows, :1])
        drawn = [last]
        for position in range(1, length):
            progress("sample", begin * length + position * len(last), tokens.size)
            key, draw = mx.random.split(key)
            logits = runner.model(last, cache=cache)[:, -1].astype(mx.float32)
            last = mx.random.categorical(logits, key=draw)[:, None].astype(mx.int32)
            mx.eval(last)
            drawn.append(last)
        fresh[begin : begin + windows] = np.array(mx.concatenate(drawn, axis=1))
        keep(fresh, part + 1)
    return fresh


def resample(runner: Runner, tokens: np.ndarray, key: mx.array) -> np.ndarray:
    """Every token but each window's first drawn anew, given those before it."""
    fresh = tokens.copy()
    batch = max(1, 4096 // tokens.shape[1])
    for piece in forward(runner, tokens, batch):
        key, draw = mx.random.split(key)
        drawn = np.asarray(mx.random.categorical(piece.logits, key=draw)).astype(np.int32)
        last = min(piece.columns.stop, tokens.shape[1] - 1)
        fresh[piece.rows, piece.columns.start + 1 : last + 1] = drawn[
            :, : last - piece.columns.start
        ]
    return fresh
