"""Tokens that a model wrote itself: the only text that mint-mlx uses, apart from the baselines.

A model that fits in memory is sampled from, many windows at once (`sample`). One that doesn't is
streamed: windows of random tokens are resampled by parallel passes (`resample`), each of which
draws every token anew from the model's prediction given the previous pass's tokens before it. That
is Jacobi's iteration, which Santilli et al. ("Accelerating Transformer Inference for Translation
via Parallel Decoding", 2023) use to decode.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from ..base.errors import MintError
from ..base.report import Progress
from ..checkpoint.source import Source
from ..runtime.cpu_ops import dense_products, whole_experts
from ..runtime.device import on_cpu
from ..runtime.draws import draw, uniform_numbers
from ..runtime.fast_math import decoding_attention, fast_math
from ..runtime.forward import forward
from ..runtime.kvcache import cache_size
from ..runtime.memory import RESERVE, room
from ..runtime.runner import Runner, load_runner
from . import resume
from .conversations import in_words

PASSES = 4
LENGTH = 256  # tokens a window
WINDOWS = 256  # sampled at once at most


def random_windows(
    vocabulary: int,
    count: int,
    start: int | None = None,
    seed: int = 0,
    length: int | None = None,
) -> np.ndarray:
    """Random tokens, int32 (windows, length), that a model's own text begins from.

    Args:
        vocabulary: tokens that the model knows.
        count: tokens at least, in whole windows.
        start: what each window starts with; a random token where a text of this model starts with
            none.
        seed: the same seed gives the same tokens.
        length: tokens a window; None is LENGTH.
    """
    length = length or LENGTH
    shape = -(-count // length), length
    tokens = np.random.default_rng(seed).integers(0, vocabulary, shape).astype(np.int32)
    if start is not None:
        tokens[:, 0] = start
    return tokens


def write_tokens(
    source: Source,
    tokens: np.ndarray,
    seed: int = 0,
    progress: Progress = lambda *_: None,
    streamed: bool | None = None,
    resume_file: Path | None = None,
    packed: bool = False,
    given: np.ndarray | None = None,
) -> tuple[np.ndarray, str]:
    """Tokens of a model's own, int32 (windows, length), and how they were written, in words.

    Args:
        source: a checkpoint whose weights are on this machine.
        tokens: of `random_windows`, or of `conversations.begin_with`.
        seed: the same seed gives the same tokens.
        progress: called with (what, done, total).
        streamed: as in `runner.load_runner`.
        resume_file: beside which finished batches or passes are noted (resume.py), for a run that
            goes on from there.
        packed: as in `runner.load_runner`.
        given: int (windows,), how many tokens at the start of each window stay; one by default.
    """
    given = np.ones(len(tokens), dtype=np.int64) if given is None else given
    runner = load_runner(source.path, streamed, source.dtype, packed=packed)
    length = tokens.shape[1]
    windows = WINDOWS if runner.streamed else at_once(source, runner, length)
    kind = "resampled" if runner.streamed else f"sampled-{windows}"
    kind += f"-{source.stamp}" if source.sampled else ""
    done = 0
    if resume_file is not None:
        tokens, done = resume.read_tokens(resume_file, kind, tokens, given) or (tokens, 0)

    def note(tokens: np.ndarray, done: int) -> None:
        if resume_file is not None:
            resume.write_tokens(resume_file, kind, tokens, done)

    if not runner.streamed:
        uniform = uniform_numbers("text", seed, tokens.shape)
        tokens = sample(runner, tokens, given, uniform, progress, done, note, windows)
        return tokens, f"sampled, seed {seed}{in_words(given)}"

    for number in range(done, PASSES):
        progress(f"pass {number + 1}", number, PASSES)
        if number > done:  # a streamed model has dropped its blocks
            runner = load_runner(source.path, True, source.dtype)
        uniform = uniform_numbers(f"pass {number}", seed, tokens.shape)
        tokens = resample(runner, tokens, uniform, given)
        note(tokens, number + 1)
    progress("", PASSES, PASSES)
    return tokens, f"resampled {PASSES} times, seed {seed}{in_words(given)}"


def at_once(source: Source, runner: Runner, length: int) -> int:
    """How many windows are sampled at once.

    WINDOWS, or fewer where their caches would take half of the memory that the model leaves.
    """
    cache = window_cache(source.config, length)
    if cache is None:
        return WINDOWS
    weights = sum(array.nbytes for _, array in tree_flatten(runner.model.parameters()))
    free = room() - RESERVE - weights

    windows = WINDOWS
    while windows > 1 and windows * cache > free / 2:
        windows //= 2
    return windows


def window_cache(config: dict[str, Any], length: int) -> int | None:
    """Bytes of the cache of one window that is sampled; None for a cache of an unknown kind."""
    try:
        cache = cache_size(config, length).bytes
    except MintError:
        return None
    return cache * 2 if on_cpu() else cache  # float32


def room_beside(config: dict[str, Any], tokens: int) -> int:
    """Bytes that weights may take beside the caches of so many tokens, sampled all at once.

    A negative number where there is no room for these.
    """
    windows = min(WINDOWS, -(-tokens // LENGTH))
    return room() - RESERVE - 2 * windows * (window_cache(config, LENGTH) or 0)


def sample(
    runner: Runner,
    tokens: np.ndarray,
    given: np.ndarray,
    uniform: np.ndarray,
    progress: Progress = lambda *_: None,
    done: int = 0,
    note: Callable[[np.ndarray, int], None] = lambda *_: None,
    windows: int = WINDOWS,
) -> np.ndarray:
    """Every token that isn't given drawn one after the other, from all those before it.

    Args:
        runner: a loaded model.
        tokens: int32 (windows, length).
        given: int (windows,), how many tokens at the start of each window stay.
        uniform: float64 (windows, length), from 0 to 1, which decide the draws.
        progress: called with (what, tokens done, tokens in all).
        done: batches of windows that are drawn already.
        note: called after each batch with the tokens so far and the batches done.
        windows: in a batch, drawn at once.
    """
    length = tokens.shape[1]
    written = tokens.copy()
    for batch, start in enumerate(range(0, len(tokens), windows)):
        if batch < done:
            continue
        some = slice(start, min(start + windows, len(tokens)))

        def report(position: int, some: slice = some) -> None:
            drawn = some.start * length + position * (some.stop - some.start)
            progress("sample", drawn, tokens.size)

        written[some] = continued(runner, tokens[some], given[some], uniform[some], report)
        note(written, batch + 1)
    return written


def continued(
    runner: Runner,
    tokens: np.ndarray,
    given: np.ndarray,
    uniform: np.ndarray,
    report: Callable[[int], None],
) -> np.ndarray:
    """Windows whose given tokens stay and whose others are drawn, int32 (windows, length).

    Args:
        runner: a loaded model.
        tokens: int32 (windows, length).
        given: int (windows,), how many tokens at the start of each window stay.
        uniform: float64 (windows, length), from 0 to 1, which decide the draws.
        report: called with each position before it is drawn.
    """
    cache = make_prompt_cache(runner.model)
    written = tokens.copy()
    with (
        fast_math(runner.model),
        whole_experts(),
        dense_products(),
        decoding_attention(),
    ):
        for position in range(1, tokens.shape[1]):
            report(position)
            last = mx.array(written[:, position - 1 : position])
            logits = runner.model(last, cache=cache)[:, -1]
            drawn = draw(logits.astype(mx.float32), uniform[:, position])
            written[:, position] = np.where(position < given, tokens[:, position], drawn)
    return written


def resample(
    runner: Runner, tokens: np.ndarray, uniform: np.ndarray, given: np.ndarray | None = None
) -> np.ndarray:
    """Every token that isn't given drawn anew, from those before it.

    Args:
        runner: a loaded model.
        tokens: int32 (windows, length).
        uniform: float64 (windows, length), from 0 to 1, which decide the draws.
        given: int (windows,), how many tokens at the start of each window stay; one by default.
    """
    given = np.ones(len(tokens), dtype=np.int64) if given is None else given
    written = tokens.copy()
    batch = max(1, 4096 // tokens.shape[1])
    for piece in forward(runner, tokens, batch):
        drawn = draw(piece.logits, uniform[piece.rows, piece.columns])

        # What is predicted at a position is the next one's token; the last has no next one.
        start = piece.columns.start + 1
        stop = min(piece.columns.stop, tokens.shape[1] - 1) + 1
        stays = np.arange(start, stop) < given[piece.rows, None]
        before = tokens[piece.rows, start:stop]
        written[piece.rows, start:stop] = np.where(stays, before, drawn[:, : stop - start])
    return written
