"""Distil a finished checkpoint's scales and biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.errors import MintError
from ..base.files import REFINED_FILE, write_text
from ..base.hf_config import text_config
from ..base.quant_config import KEEP
from ..base.report import Report, Silent
from ..base.targets import check_target
from ..checkpoint import mlxlm
from ..checkpoint.source import load_source
from ..measure import cache
from ..rules import efforts
from .measurements import first_token, vocabulary
from .model import prepare

if TYPE_CHECKING:
    from ..converters.quantizers.distil import Refined


def refine_checkpoint(
    checkpoint: str,
    model: str,
    out: Path | None = None,
    steps: int | None = None,
    force: bool = False,
    report: Report | None = None,
) -> tuple[Path, Refined]:
    """Distil the scales and biases of any MLX checkpoint on text that its source wrote (refine.py):
    a new checkpoint.

    Raises:
        MintError: an input is wrong, the checkpoint doesn't fit in memory, or nothing was gained;
            nothing is written then.
    """
    from ..converters.output import write as writer
    from ..converters.output.card import refined_card
    from ..converters.output.replace_tensors import replace_tensors
    from ..converters.quantizers.distil import can_refine, refine_own
    from ..measure.self_text import random_windows, write_tokens

    report = report or Silent()
    given = load_source(checkpoint)
    target = out or Path(f"{given.name.rpartition('/')[2]}-refined")
    check_target(target, given.path, force)
    if not any(name.endswith(".biases") for table in given.headers.values() for name in table):
        raise MintError(
            f"{given.name} has no layer with scales and biases: give a quantized MLX checkpoint"
        )
    made = prepare(checkpoint).inventory
    if not can_refine(made, {layer.path: layer.stored or KEEP for layer in made.layers}):
        raise MintError(
            f"refining {given.name} takes more memory than this machine has: do it on a larger one"
        )
    job = prepare(model)
    if job.source.fingerprint == given.fingerprint:
        raise MintError(
            f"{given.name} is its own source: give the model that it was made from with --source"
        )
    check_target(target, job.source.path, force)
    same = [text_config(source.config) for source in (given, job.source)]
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        one, two = (text.get(key) for text in same)
        if one != two:
            raise MintError(
                f"{given.name} was not made from {job.source.name}: their {key} is {one} and {two}"
            )
    count = efforts.EFFORTS["best"].tokens
    known = cache.cached_sensitivity(job.source, count)
    if known is not None:
        tokens = known.tokens
    else:
        report.stage("write tokens")
        place = cache.sensitivity_path(job.source, count)
        first = first_token(job)
        windows = random_windows(vocabulary(job), count, first)
        tokens, _ = write_tokens(job.source, windows, progress=report.step, resume_file=place)
    with writer.copied(given.path, target, force) as work:
        report.stage("refine")
        found = refine_own(job.source, tokens, work, report.step, steps)
        if found is None:
            raise MintError(
                f"refining {given.name} gained nothing on text that it was not trained on: nothing "
                "was written"
            )
        replace_tensors(work, found.tensors)
        mlxlm.build_model(work)
        facts = {"source": job.source.name, "kl_before": found.before, "kl_after": found.after}
        card = work / "README.md"
        if card.is_file():
            told = refined_card(
                card.read_text(encoding="utf-8"), target.name, found.before, found.after
            )
            write_text(card, told)
        write_text(work / REFINED_FILE, json.dumps(facts, indent=2) + "\n")
    return target, found
