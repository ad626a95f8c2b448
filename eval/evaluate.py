"""`mint-mlx eval`: perplexity of a checkpoint and its divergence from its source, one model in
memory at a time.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..base import blas
from ..base.distributed import ranks
from ..base.errors import MintError, UsageError
from ..base.report import Report, Silent
from ..base.versions import versions
from ..checkpoint import mlxlm
from ..checkpoint.layers import list_layers
from ..checkpoint.source import Source, load_source, open_model
from ..checkpoint.tokenizer import encode, load_tokenizer
from ..checkpoint.towers import find_unused
from ..measure import cache
from ..runtime.divergence import kl, log_softmax
from ..runtime.runner import Routing, Runner, forward, load_shared
from . import chat, stats
from .protocol import Windows, bos_token, check_protocol, context_of, cut, default_length
from .reference import (
    About,
    Part,
    Reference,
    check_reference_file,
    load_reference,
    predict,
    save_reference,
    text_hash,
)
from .score import Score, score
from .text import read_text, wikitext


@dataclass(frozen=True)
class Settings:
    """What is scored and how.

    Attributes:
        protocol: `windows` or `llama.cpp`.
        length: tokens a window; None takes the protocol's, or the model's context if shorter.
        windows: number of windows; None takes all.
        seed: chooses the windows at random; None takes the first ones.
        batch: windows at once; None takes what suits their length.
        text: a file; None takes WikiText-2's test split.
        chat: score the source's own replies instead of a text.

    Raises:
        UsageError: a figure or the protocol is impossible, or says nothing of replies.
    """

    protocol: str = "windows"
    length: int | None = None
    windows: int | None = None
    seed: int | None = None
    batch: int | None = None
    text: str | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        check_protocol(self.protocol, self.length, self.windows, self.seed)
        if self.batch is not None and self.batch < 1:
            raise UsageError("--batch must be 1 or more")
        chosen = (self.length, self.windows, self.seed, self.text)
        if self.chat and (self.protocol != "windows" or any(value is not None for value in chosen)):
            raise UsageError(
                "--chat scores the source's own replies, whole: leave --text, --protocol, "
                "--length, --windows and --seed out"
            )

    @property
    def text_name(self) -> str:
        return (
            "its own replies"
            if self.chat
            else Path(self.text).name
            if self.text
            else "WikiText-2 test"
        )


def evaluate(
    model: str,
    settings: Settings | None = None,
    source: str | None = None,
    save: Path | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Score a checkpoint.

    Args:
        model: a folder or Hub id.
        settings: what is scored and how.
        source: the model it was made from, or a file that `save` wrote; None scores perplexity
            alone.
        save: keep the source's predictions in this file.
        report: receives progress.

    Returns:
        The figures by name (see `mint-mlx eval --json`).

    Raises:
        MintError: the text is too short, the tokenizers differ, logits aren't finite, or a model
            can't be loaded.
    """
    settings, report = settings or Settings(), report or Silent()
    if save is not None:
        if source is None or source.endswith(".safetensors"):
            raise UsageError(
                "--save-reference keeps the source's predictions: give the source with --source"
            )
        check_reference_file(save)
    candidate = load_source(model)
    tokenizer = load_tokenizer(candidate.path)
    reference: Reference | None = None
    if source is not None and source.endswith(".safetensors"):
        if settings != Settings(batch=settings.batch):
            raise UsageError(
                "a saved reference brings its own text and windows: leave those options out"
            )
        reference = load_reference(Path(source).expanduser())
        check_same_tokenizer(reference.about.source, reference.about.tokenizer, tokenizer)
        if reference.about.device != device():
            report.note(
                f"the source ran on {reference.about.device}, this model on {device()}: rounding "
                "differs"
            )
        parts = [part.windows for part in reference.parts]
    elif source is not None:
        origin = load_source(source)
        check_same_tokenizer(origin.name, tokenizer_key(load_tokenizer(origin.path)), tokenizer)
        parts, control = cut_text(origin, settings, report)
        reference = get_reference(origin, parts, control, settings, report)
    elif settings.chat:
        raise UsageError("--chat compares with the source's own replies: give it with --source")
    else:
        parts, _ = cut_text(candidate, settings, report)
    if save is not None and reference is not None:
        save_reference(reference, save)
    return score_model(candidate, parts, reference, settings, report)


def tokenizer_key(tokenizer: Any) -> str:
    """Names what a tokenizer does to text, whatever file it came from."""
    ids = encode(tokenizer, wikitext()[:200_000])
    return hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=8).hexdigest()


def check_same_tokenizer(source: str, key: str, tokenizer: Any) -> None:
    """Refuse to compare token by token what has different tokens.

    Raises:
        MintError: the tokenizers differ.
    """
    if tokenizer_key(tokenizer) != key:
        raise MintError(
            f"the tokenizers of the model and of {source} differ: they cannot be compared token by "
            "token"
        )


def cut_text(
    origin: Source, settings: Settings, report: Report
) -> tuple[list[Windows], list[np.ndarray | None]]:
    """The windows to score, in the tokens of `origin`.

    Raises:
        MintError: the text is too short.
    """
    tokenizer = load_tokenizer(origin.path)
    if settings.chat:
        report.stage("replies of the source")
        parts, marks = chat.replies(origin, tokenizer, report)
        return parts, list(marks)
    text = read_text(settings.text)
    length = settings.length or default_length(settings.protocol, origin.config)
    context = context_of(origin.config)
    if context is not None and length > context:
        report.note(
            f"windows of {length} tokens are longer than the context of {context} that the model "
            "states"
        )
    bos = bos_token(tokenizer) if settings.protocol == "llama.cpp" else None
    ids = np.zeros(0, dtype=np.int64)
    if (
        settings.windows is not None and settings.seed is None
    ):  # the beginning of the text is enough, usually
        ids = encode(tokenizer, text[: (settings.windows + 1) * length * 16])
    if len(ids) < (settings.windows or 0) * length or not len(ids):
        ids = encode(tokenizer, text)
    windows = cut(ids, settings.protocol, length, settings.windows, settings.seed, bos)
    if settings.windows is not None and len(windows.tokens) < settings.windows:
        report.note(
            f"the text has {len(windows.tokens)} windows of {length} tokens, not {settings.windows}"
        )
    return [windows], [None]


def get_reference(
    origin: Source,
    parts: list[Windows],
    control: Sequence[np.ndarray | None],
    settings: Settings,
    report: Report,
) -> Reference:
    """The source's predictions: from the cache, else computed and kept there; by all ranks
    together, or by none.
    """
    key = hashlib.blake2b(
        f"{origin.fingerprint} {origin.stamp} {versions()}".encode(), digest_size=8
    ).hexdigest()
    split = f"-of{ranks().size}" if ranks().size > 1 else ""
    name = f"{cache.file_name(origin.name)}-{key}-{text_hash(parts)}-{device()}{split}.safetensors"
    path = cache.cache_dir() / "references" / name
    kept: Reference | None = None
    if path.is_file():
        try:
            kept = load_reference(path)
        except MintError:  # cut short or of another version: computed anew
            path.unlink(missing_ok=True)
    if all(ranks().gather(kept is not None)) and kept is not None:
        return kept
    report.stage("source")
    scored = sum(part.scored for part in parts)
    made: list[Part] = []
    floor: float | None = None
    runner: Runner | None = None
    for part, marks in zip(parts, control, strict=True):
        if runner is None or runner.streamed:  # a streamed model has dropped its blocks
            runner = load_shared(origin.path)
        floor = noise_floor(runner, part) if not made else floor
        batch = batch_for(part, settings)
        # A rank that has some of the blocks sees what their routers choose, and no others.
        routing = (
            None if split and not mlxlm.splits_tensors(origin.config, ranks().size) else Routing()
        )
        told = partial(report.step, origin.name)
        made.append(predict(runner, part, scored, batch, marks, told, routing))
    vocabulary = made[0].whole_logp.shape[-1]
    about = About(
        source=origin.name,
        fingerprint=origin.fingerprint,
        protocol=settings.protocol,
        text=settings.text_name,
        vocabulary=vocabulary,
        tokenizer=tokenizer_key(load_tokenizer(origin.path)),
        noise_floor=floor,
        device=device(),
    )
    reference = Reference(about, tuple(made))
    with cache.report_write_errors("reference", report):
        save_reference(reference, path)
    return reference


def score_model(
    source: Source,
    parts: list[Windows],
    reference: Reference | None,
    settings: Settings,
    report: Report,
) -> dict[str, Any]:
    """Load a checkpoint, score it on windows, and gather the figures.

    `window_nll` and `window_kl` hold the means of each window, so that two checkpoints can be
    compared in pairs."""
    report.stage("evaluate")
    inventory = list_layers(open_model(source), source.config)
    parameters = (
        inventory.parameters
        + find_unused(source.headers.values(), source.config, inventory).parameters
    )
    mx.reset_peak_memory()
    runner = load_shared(source.path)
    begun = time.monotonic()
    scores: list[Score] = []
    interrupted = False
    for i, part in enumerate(parts):
        known = reference.parts[i] if reference else None
        try:
            done = score(
                runner,
                part,
                batch_for(part, settings),
                known,
                lambda n, of: report.step(source.name, n, of),
            )
        except KeyboardInterrupt:
            if not scores:
                raise
            interrupted = True
            break
        scores.append(done)
        if done.finished < len(part.tokens):
            interrupted = True
            break
        if runner.streamed and i + 1 < len(parts):  # a streamed model has dropped its blocks
            runner = load_shared(source.path)
    seconds = time.monotonic() - begun
    about = reference.about if reference is not None else None
    figures: dict[str, Any] = {
        "model": source.name,
        "text": about.text if about else settings.text_name,
        "protocol": about.protocol if about else settings.protocol,
    }
    figures["length"] = parts[0].tokens.shape[1]
    figures |= stats.perplexity_figures(scores)
    figures["window_nll"] = [float(x) for s in scores for x in s.nll.mean(axis=1)]
    if reference is not None:
        figures["source"] = reference.about.source
        figures |= stats.divergence_figures(scores, list(reference.parts[: len(scores)]))
        figures["window_kl"] = [
            float(x) for s in scores if s.kl is not None for x in s.kl.mean(axis=1)
        ]
        figures["noise_floor"] = reference.about.noise_floor
    return figures | {
        "seconds": seconds,
        "tokens_per_second": figures["tokens"] / seconds,
        "peak_memory": mx.get_peak_memory(),
        "bytes": source.weight_bytes,
        "bits_per_weight": source.weight_bytes * 8 / parameters,
        "streamed": runner.streamed,
        "device": device(),
        "interrupted": interrupted,
    }


def batch_for(windows: Windows, settings: Settings) -> int:
    """Windows at once: about 4,096 tokens, which keeps the processor busy and memory small."""
    return settings.batch or max(1, 4096 // windows.tokens.shape[1])


def noise_floor(runner: Runner, windows: Windows) -> float | None:
    """The KL of the source against itself when only the arithmetic differs: the same tokens in
    other batch shapes.

    None for a streamed source, which would have to be read again for it.
    """
    if runner.streamed:
        return None
    floor = float(np.finfo(np.float32).eps)
    tokens = windows.tokens[:1, :256]

    def predicted(tokens: np.ndarray) -> mx.array:
        return mx.concatenate(
            [log_softmax(p.logits) for p in forward(runner, tokens, len(tokens))], axis=1
        )

    alone = predicted(tokens)
    beside = predicted(np.concatenate([tokens, tokens[:, ::-1], tokens]))[2:]
    part = predicted(tokens[:, : 1 + tokens.shape[1] // 2])
    for other in (beside, part):
        same = alone[:, : other.shape[1]]
        floor = max(floor, float(mx.abs(kl(same, other)).mean()))
    return floor


def device() -> str:
    """What the arithmetic was done on: `gpu`, or the CPU's BLAS."""
    return "gpu" if mx.default_device() == mx.gpu else f"cpu-{blas.use_fast_blas() or 'reference'}"
