"""The source's reference: from the cache, else computed by running the source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..base import blas
from ..base.checksum import Damaged, if_sound
from ..base.distributed import ranks
from ..base.report import Report
from ..base.versions import versions
from ..checkpoint import mlxlm
from ..checkpoint.source import Source, check_unchanged
from ..checkpoint.tokenizer import load_tokenizer
from ..measure import cache
from ..runtime.divergence import kl, log_softmax
from ..runtime.forward import Routing, forward
from ..runtime.runner import Runner, load_shared
from .protocol import Windows, done_of_all
from .reference import About, Predictions, Reference, predict, text_hash
from .reference_file import load_reference, save_reference
from .settings import Settings
from .text import tokenizer_key


@cache.using("references")
def get_reference(
    source: Source,
    text: list[Windows],
    control: Sequence[np.ndarray | None],
    settings: Settings,
    report: Report,
) -> Reference:
    """The source's predictions: from the cache, else computed and stored there.

    All ranks take it from their caches, or all compute it together.

    Args:
        source: the source.
        text: what to run it on.
        control: for each set of windows which scored tokens are control tokens, or None.
        settings: how the windows were cut.
        report: receives progress.

    Raises:
        MintError: its logits aren't finite.
    """
    path = _cache_path(source, text)
    cached = _load_cached(path, text)
    if all(ranks().gather(cached is not None)) and cached is not None:
        # The same tokens may have come from a file of another name.
        about = replace(cached.about, text=settings.text_name, protocol=settings.protocol)
        return replace(cached, about=about)

    report.stage("source")
    predictions, noise = _run(source, text, control, settings, report)
    check_unchanged(source)
    about = About(
        source=source.name,
        fingerprint=source.fingerprint,
        protocol=settings.protocol,
        text=settings.text_name,
        vocabulary=predictions[0].whole_logp.shape[-1],
        tokenizer=tokenizer_key(load_tokenizer(source.path)),
        noise_floor=noise,
        device=device(),
    )
    reference = Reference(about, tuple(predictions))
    with cache.report_write_errors("reference", report):
        save_reference(reference, path)
    return reference


def _cache_path(source: Source, text: list[Windows]) -> Path:
    """Where the cache holds this source's reference for this text."""
    content = f"{source.fingerprint} {source.stamp} {versions()}"
    key = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
    split = f"-of{ranks().size}" if ranks().size > 1 else ""
    name = f"{cache.file_name(source.name)}-{key}-{text_hash(text)}-{device()}{split}.safetensors"
    return cache.cache_dir() / "references" / name


def _load_cached(path: Path, text: list[Windows]) -> Reference | None:
    """The cached reference of these windows; None where there is none, or a damaged one."""

    def read(path: Path) -> Reference:
        reference = load_reference(path)
        windows = [predictions.windows for predictions in reference.predictions]
        if text_hash(windows) != text_hash(text):
            raise Damaged(f"{path} is of another text")
        return reference

    return if_sound(path, read)


def _run(
    source: Source,
    text: list[Windows],
    control: Sequence[np.ndarray | None],
    settings: Settings,
    report: Report,
) -> tuple[list[Predictions], float | None]:
    """The source's predictions for each set of windows, and its noise floor."""
    # A rank that has some of the blocks sees what their routers choose, and no others.
    by_blocks = ranks().size > 1 and not mlxlm.splits_tensors(source.config, ranks().size)
    scored = sum(windows.scored for windows in text)
    predictions: list[Predictions] = []

    def progress(done: int, _: int) -> None:
        report.step(source.name, *done_of_all(text, len(predictions), done))

    noise: float | None = None
    runner: Runner | None = None
    for windows, is_control in zip(text, control, strict=True):
        if runner is None or runner.streamed:  # a streamed model has dropped its blocks
            runner = load_shared(source.path)
        if not predictions:
            noise = noise_floor(runner, windows)

        batch = settings.batch_for(windows)
        routing = None if by_blocks else Routing()
        predictions.append(predict(runner, windows, scored, batch, is_control, progress, routing))
    return predictions, noise


def noise_floor(runner: Runner, windows: Windows) -> float | None:
    """The KL of the source against itself when only the arithmetic differs, in nats per token.

    The same tokens run in other batch shapes. None for a streamed source, which would have to be
    read again for it.
    """
    if runner.streamed:
        return None

    def predicted(tokens: np.ndarray) -> mx.array:
        pieces = forward(runner, tokens, len(tokens))
        return mx.concatenate([log_softmax(piece.logits) for piece in pieces], axis=1)

    # One window alone, as the last of three, and its first half.
    tokens = windows.tokens[:1, :256]
    alone = predicted(tokens)
    of_three = predicted(np.concatenate([tokens, tokens[:, ::-1], tokens]))[2:]
    first_half = predicted(tokens[:, : 1 + tokens.shape[1] // 2])

    floor = float(np.finfo(np.float32).eps)
    for other in (of_three, first_half):
        same = alone[:, : other.shape[1]]
        floor = max(floor, float(mx.abs(kl(same, other)).mean()))
    return floor


def device() -> str:
    """What the arithmetic is done on: `gpu`, or the CPU's BLAS."""
    return "gpu" if mx.default_device() == mx.gpu else f"cpu-{blas.use_fast_blas() or 'reference'}"
