"""`mint-mlx eval`: perplexity of a checkpoint and its divergence from its source.

One model at a time is in memory.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..base.errors import TAKE_BFLOAT16, MintError, UsageError
from ..base.interruption import have_results
from ..base.report import Report, Silent
from ..base.safetensors_header import stated_format
from ..checkpoint.known_differences import known_differences
from ..checkpoint.layers import list_layers
from ..checkpoint.source import Source, brought_keys, check_unchanged, load_source, open_model
from ..checkpoint.tokenizer import encode, load_tokenizer
from ..checkpoint.towers import find_unused
from ..jobs.model import other_model, other_weights
from ..runtime.overflow import overflow
from ..runtime.runner import Runner, load_shared
from . import chat, stats
from .kinds import Asked, ask, by_kind
from .make_reference import device, get_reference
from .protocol import Windows, bos_token, context_of, cut, default_length, done_of_all
from .reference import Reference
from .reference_file import check_reference_file, load_reference, save_reference
from .score import Score, score
from .settings import Settings
from .text import check_same_tokenizer, read_text, tokenizer_key
from .token_spread import token_spread


def evaluate(
    model: str,
    settings: Settings | None = None,
    source: str | None = None,
    save: Path | None = None,
    report: Report | None = None,
    with_spread: bool = False,
) -> dict[str, Any]:
    """Score a checkpoint.

    Args:
        model: a folder or Hub id.
        settings: what is scored and how.
        source: the model it was made from, or a file that `save` wrote; None scores perplexity
            alone.
        save: write the source's predictions to this file.
        report: receives progress.
        with_spread: add `spread`, how the divergence is spread over tokens (token_spread.py).

    Returns:
        The figures by name (see `mint-mlx eval --json`).

    Raises:
        MintError: the text is too short, the tokenizers differ, logits aren't finite, or a model
            can't be loaded.
    """
    settings = settings or Settings()
    report = report or Silent()
    from_file = source is not None and source.endswith(".safetensors")
    _check_call(settings, source, save, from_file)

    # The windows, in the source's tokens where there is a source, and its predictions on them.
    candidate = load_source(model)
    check_read_alike(candidate)
    for difference in known_differences(candidate.config):
        report.note(f"known difference: {difference}")
    reference: Reference | None = None
    asked: Asked | None = None
    if source is None:
        text, _ = cut_text(candidate, settings, report)
    elif from_file:
        reference = _load_reference(Path(source).expanduser(), candidate, report)
        text = [predictions.windows for predictions in reference.predictions]
    else:
        origin = load_source(source)
        other = other_model(candidate, origin) or other_weights(candidate, origin)
        if other is not None:
            report.note(f"{other}; the divergence is one between two models")
        key = tokenizer_key(load_tokenizer(origin.path))
        check_same_tokenizer(origin.name, key, load_tokenizer(candidate.path))
        if settings.kinds:
            asked = ask(origin, "--kinds", report)
            text = asked.windows
            control: list[np.ndarray | None] = [None] * len(text)
        else:
            text, control = cut_text(origin, settings, report)
        reference = get_reference(origin, text, control, settings, report)

    if save is not None and reference is not None:
        save_reference(reference, save)
    figures = score_model(candidate, text, reference, settings, report, with_spread)
    if asked is not None:
        figures["kinds"] = by_kind(asked.kinds, text, figures["window_kl"])
    return figures


def check_read_alike(source: Source) -> None:
    """Refuse a finished MLX checkpoint of which stock mlx-lm makes another model than is read here.

    A source in a release's own layout is converted before anyone runs it with mlx-lm.

    Raises:
        MintError: naming the key.
    """
    changes = brought_keys(source)
    finished = isinstance(source.config.get("quantization"), dict) or any(
        stated_format(source.path / file) == "mlx" for file in source.headers
    )
    if changes and finished:
        raise MintError(
            f"config.json of {source.name} {changes[0]}: everyone who loads this checkpoint with "
            "mlx-lm gets another model than the one that would be scored: write it anew with "
            "`mint-mlx convert --uniform keep`"
        )


def _check_call(settings: Settings, source: str | None, save: Path | None, from_file: bool) -> None:
    """Refuse options that contradict each other, and a file that can't be written.

    Raises:
        MintError: the first of them.
    """
    if save is not None:
        if source is None or from_file:
            raise UsageError(
                "--save-reference writes the source's predictions: give the source with --source"
            )
        check_reference_file(save)
    if from_file and settings != Settings(batch=settings.batch):
        raise UsageError(
            "a saved reference brings its own text and windows: leave those options out"
        )
    if source is None and (settings.chat or settings.kinds):
        option = "--chat" if settings.chat else "--kinds"
        raise UsageError(f"{option} compares with the source's own replies: give it with --source")


def _load_reference(path: Path, candidate: Source, report: Report) -> Reference:
    """A saved reference that this candidate can be compared with."""
    reference = load_reference(path)
    about = reference.about
    check_same_tokenizer(about.source, about.tokenizer, load_tokenizer(candidate.path))
    if about.device != device():
        report.note(
            f"the source ran on {about.device}, this model runs on {device()}: rounding differs"
        )
    return reference


def cut_text(
    origin: Source, settings: Settings, report: Report
) -> tuple[list[Windows], list[np.ndarray | None]]:
    """The windows to score, in the tokens of `origin`.

    Returns:
        Sets of windows, and for each which scored tokens are control tokens (None without --chat).

    Raises:
        MintError: the text is too short.
    """
    tokenizer = load_tokenizer(origin.path)
    if settings.chat:
        report.stage("replies of the source")
        replies, is_control = chat.replies(origin, tokenizer, report)
        return replies, list(is_control)

    length = settings.length or default_length(settings.protocol, origin.config)
    context = context_of(origin.config)
    if context is not None and length > context:
        report.note(
            f"windows of {length} tokens are longer than the context of {context} tokens that the "
            "model states"
        )

    # For the first few windows the beginning of the text is enough, as a rule.
    text = read_text(settings.text)
    ids = np.zeros(0, dtype=np.int64)
    if settings.windows is not None and settings.seed is None:
        ids = encode(tokenizer, text[: (settings.windows + 1) * length * 16])
    if len(ids) < (settings.windows or 0) * length or not len(ids):
        ids = encode(tokenizer, text)

    bos = bos_token(tokenizer) if settings.protocol == "llama.cpp" else None
    windows = cut(ids, settings.protocol, length, settings.windows, settings.seed, bos)
    if settings.windows is not None and len(windows.tokens) < settings.windows:
        report.note(
            f"the text has {len(windows.tokens)} windows of {length} tokens, not {settings.windows}"
        )
    return [windows], [None]


def score_model(
    source: Source,
    text: list[Windows],
    reference: Reference | None,
    settings: Settings,
    report: Report,
    with_spread: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint, score it on windows, and gather the figures.

    `window_nll` and `window_kl` hold the means of each window, so that two checkpoints can be
    compared in pairs. An interruption gives the figures of the windows that were finished.
    """
    report.stage("evaluate")
    parameters = _parameters(source)
    mx.reset_peak_memory()
    runner = load_shared(source.path)
    _tell_overflow(source, runner, text[0].tokens, report)
    if runner.streamed:  # a streamed model has dropped its blocks
        runner = load_shared(source.path)
    started = time.monotonic()
    scores = _score_all(source, runner, text, reference, settings, report)
    check_unchanged(source)
    seconds = time.monotonic() - started

    about = reference.about if reference is not None else None
    lengths = {windows.tokens.shape[1] for windows in text}
    figures: dict[str, Any] = {
        "model": source.name,
        "text": about.text if about else settings.text_name,
        "protocol": about.protocol if about else settings.protocol,
        "length": max(lengths),
        "shortest": min(lengths),
    }
    figures |= stats.perplexity_figures(scores)
    figures["window_nll"] = [float(x) for s in scores for x in s.nll.mean(axis=1)]

    if reference is not None:
        scored = list(reference.predictions[: len(scores)])
        figures["source"] = reference.about.source
        figures |= stats.divergence_figures(scores, scored)
        figures["window_kl"] = [
            float(x) for s in scores if s.kl is not None for x in s.kl.mean(axis=1)
        ]
        figures["noise_floor"] = reference.about.noise_floor
        if with_spread:
            figures["spread"] = token_spread(scores, scored, load_tokenizer(source.path))

    finished = sum(score.finished for score in scores)
    return figures | {
        "seconds": seconds,
        "tokens_per_second": figures["tokens"] / seconds,
        "peak_memory": mx.get_peak_memory(),
        "bytes": source.weight_bytes,
        "bits_per_weight": source.weight_bytes * 8 / parameters,
        "streamed": runner.streamed,
        "device": device(),
        "interrupted": finished < sum(len(windows.tokens) for windows in text),
    }


def _tell_overflow(source: Source, runner: Runner, tokens: np.ndarray, report: Report) -> None:
    """Say where a checkpoint in float16 has activations that float16 cannot hold."""
    if all(info.dtype != "F16" for table in source.headers.values() for info in table.values()):
        return
    problem = overflow(runner, tokens[:1])
    if problem is not None:
        report.note(
            f"{source.name} overflows in float16, which gives NaN on a GPU ({problem}): "
            f"{TAKE_BFLOAT16}"
        )


def _parameters(source: Source) -> int:
    """Numbers in a checkpoint, with those that its language model doesn't use."""
    inventory = list_layers(open_model(source), source.config)
    unused = find_unused(source.headers.values(), source.config, inventory)
    return inventory.parameters + unused.parameters(source.config)


def _score_all(
    source: Source,
    runner: Runner,
    text: list[Windows],
    reference: Reference | None,
    settings: Settings,
    report: Report,
) -> list[Score]:
    """Score one set of windows after the other, up to an interruption.

    Raises:
        KeyboardInterrupt: before the first window was finished.
    """
    scores: list[Score] = []

    def progress(done: int, _: int) -> None:
        have_results()
        # Tasks are sets of one window each: what is done counts over all sets.
        report.step(source.name, *done_of_all(text, len(scores), done))

    for i, windows in enumerate(text):
        if i and runner.streamed:  # a streamed model has dropped its blocks
            runner = load_shared(source.path)

        predictions = reference.predictions[i] if reference is not None else None
        batch = settings.batch_for(windows)
        try:
            scores.append(score(runner, windows, batch, predictions, progress))
        except KeyboardInterrupt:
            if not scores:
                raise
            break
        if scores[-1].finished < len(windows.tokens):
            break
    return scores
