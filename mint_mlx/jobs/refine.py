"""Distil a finished checkpoint's scales and biases on text that its source wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..allocation.artifacts import sensitivity_beside
from ..base.errors import MintError
from ..base.files import REFINED_FILE, write_text
from ..base.one_line import one_line
from ..base.quant_config import KEEP
from ..base.report import Report, Silent
from ..base.side_files import MAX_BYTES
from ..base.targets import check_target
from ..checkpoint import mlxlm
from ..checkpoint.source import Source, load_source
from ..converters.output.card import refined_card
from ..converters.output.copied import copied
from ..converters.output.refined import hashes_of
from ..converters.output.replace_tensors import replace_tensors
from ..converters.output.verify import verify_copy
from ..converters.quantizers.distil import TOKENS as STEP_TOKENS
from ..converters.quantizers.distil import Refined, can_refine, refine_own
from ..measure.self_text import LENGTH
from ..measure.text import Text
from ..rules import efforts
from .measurements import get_text, known_profile, known_sensitivity, twin_for
from .model import Job, check_same_model, prepare
from .request import check_twin
from .twin import Wish, wish_of

HELD_OUT = 8  # one of so many windows is not trained on
MIN_TOKENS = 8192  # below which the held-out windows are too few to judge by


@dataclass(frozen=True, repr=False)
class Refinement:
    """A checkpoint that was distilled.

    Attributes:
        path: its folder.
        kl_before, kl_after: KL divergence from the source in nats a token, on text that it was not
            trained on.
    """

    path: Path
    kl_before: float
    kl_after: float

    def __repr__(self) -> str:
        divergence = f"KL {self.kl_before:.4g} -> {self.kl_after:.4g}"
        return one_line(self, divergence, f"path={str(self.path)!r}")


def refine(
    checkpoint: str,
    source: str,
    out: str | Path | None = None,
    *,
    steps: int | None = None,
    force: bool = False,
    twin: str | None = None,
    keep_twin: str | Path | None = None,
    no_twin: bool = False,
    report: Report | None = None,
) -> Refinement:
    """Distil the scales and biases of an MLX checkpoint: same bytes, closer to its source.

    Args:
        checkpoint: a folder or a Hub id.
        source: the unquantized model that it was made from.
        out: the folder to write; `NAME-refined` by default.
        steps: of at most 1,024 tokens; 200 by default.
        force: replace an existing output folder.
        twin, keep_twin, no_twin: as of `convert`; `twin` may be the checkpoint itself.
        report: receives progress.

    Raises:
        MintError: an input is wrong, the checkpoint doesn't fit in memory, nothing was gained, or
            the disk holds other bytes than were written; nothing is left then.
    """
    report = report or Silent()

    # Both models are held against each other before the source writes a word.
    given = load_source(checkpoint)
    target = Path(out) if out is not None else Path(f"{given.name.rpartition('/')[2]}-refined")
    check_target(target, given.path, force)
    check_twin(twin, keep_twin, no_twin, target)
    _check_refinable(checkpoint, given)
    job = prepare(source)
    _check_pair(given, job.source, report)
    check_target(target, job.source.path, force)

    # Refining works on a copy, which gets its name only if something was gained.
    wish = wish_of(job, twin, keep_twin, no_twin)
    text = _text(job, given.path, steps, wish, report)
    with copied(given.path, target, force, report) as work:
        report.stage("refine")
        refined = refine_own(job.source, text, work, report.step, steps)
        if refined is None:
            raise MintError(
                f"refining {given.name} gained nothing on text that it was not trained on: nothing "
                "was written"
            )
        replace_tensors(work, refined.tensors)
        verify_copy(work, given.path, hashes_of(refined.tensors))
        mlxlm.build_model(work)
        _write_facts(work, target.name, job.source.name, refined)
    return Refinement(target, refined.before, refined.after)


def _check_refinable(checkpoint: str, given: Source) -> None:
    """Refuse a checkpoint without scales and biases, or one that memory has no room for."""
    if not any(name.endswith(".biases") for table in given.headers.values() for name in table):
        raise MintError(
            f"{given.name} has no layer with scales and biases: give a quantized MLX checkpoint"
        )
    inventory = prepare(checkpoint).inventory
    if not can_refine(inventory, {layer.path: layer.stored or KEEP for layer in inventory.layers}):
        raise MintError(
            f"refining {given.name} takes more memory than this machine has: do it on a larger one"
        )


def _check_pair(given: Source, source: Source, report: Report) -> None:
    """Refuse a source that the checkpoint wasn't made from, as far as their configs tell."""
    if source.fingerprint == given.fingerprint:
        raise MintError(
            f"{given.name} is its own source: give the model that it was made from with --source"
        )
    check_same_model(given, source, report)


def tokens_needed(steps: int | None) -> int:
    """How much text so many steps are trained and judged on: whole windows, at least MIN_TOKENS."""
    most = efforts.EFFORTS["best"].tokens
    if steps is None:
        return most
    trained = steps * STEP_TOKENS
    return min(most, max(MIN_TOKENS, -(-trained * HELD_OUT // (HELD_OUT - 1) // LENGTH) * LENGTH))


def _text(job: Job, checkpoint: Path, steps: int | None, wish: Wish, report: Report) -> Text:
    """Text that the source, or its twin, wrote: as much as steps need.

    That of a sensitivity, in the cache or beside the checkpoint, serves; else it is written.
    """
    count = tokens_needed(steps)
    sizes = sorted({count, *(effort.tokens for effort in efforts.EFFORTS.values())})
    profile = known_profile(job) if wish.writes else None
    stays = wish.keep is not None  # also where there is text already
    twin = twin_for(job, wish, profile, count, report) if stays else None
    for size in [size for size in sizes if size >= count]:
        cached = known_sensitivity(job, size, wish, profile)
        if cached is not None:
            return _first(cached.text, count)
    beside = sensitivity_beside(checkpoint)
    of_source = beside is not None and beside.origin.matches(job.source.origin)
    if beside is not None and of_source and beside.tokens.size >= count:
        return _first(beside.text, count)
    if not stays:
        twin = twin_for(job, wish, profile, count, report)
    return get_text(job, count, report, twin)


def _first(text: Text, count: int) -> Text:
    """The first windows of a text, with `count` tokens at least."""
    return text[: -(-count // text.tokens.shape[1])]


def _write_facts(work: Path, name: str, source: str, refined: Refined) -> None:
    """Say in the checkpoint and in its card what was done."""
    facts = {"source": source, "kl_before": refined.before, "kl_after": refined.after}
    card = work / "README.md"
    if card.is_file() and card.stat().st_size <= MAX_BYTES:
        text = card.read_text(encoding="utf-8", errors="replace")
        write_text(card, refined_card(text, name, refined.before, refined.after))
    write_text(work / REFINED_FILE, json.dumps(facts, indent=2) + "\n")
