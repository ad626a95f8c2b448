"""What is measured of a model once: its profile and sensitivity, from the cache or kept there."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from ..allocation.artifacts import SENSITIVITY_FILE
from ..allocation.search_space import SearchSpace, list_candidates
from ..base.distributed import ranks
from ..base.hf_config import text_config
from ..base.quant_config import QuantConfig
from ..base.report import Report, Silent
from ..base.versions import versions
from ..checkpoint.low_disk import Waves, at_once
from ..checkpoint.tokenizer import encode, load_tokenizer, tokenizer_is_code
from ..measure import cache, resume
from ..measure.profile import Profile, measure_curves
from ..measure.profile_file import save_profile
from ..measure.sample import parse_sample
from ..measure.sensitivity import Sensitivity
from ..measure.sensitivity_file import load_sensitivity, save_sensitivity
from ..rules import efforts
from .model import Job


def get_sensitivity(
    job: Job, report: Report | None = None, count: int | None = None
) -> Sensitivity | None:
    """The model's sensitivity, with the text that it wrote for it: from the cache, else measured.

    Args:
        job: the model.
        report: receives progress.
        count: tokens; those of the default level by default.

    Returns:
        None where the model is built in a way that can't be walked through; the report is told so.
    """
    return (
        _measure_sensitivity(job, report, count)
        if ranks().size == 1
        else _first_measures(job, report, count)
    )


def _measure_sensitivity(job: Job, report: Report | None, count: int | None) -> Sensitivity | None:
    """As `get_sensitivity`, in this process."""
    from ..measure.fisher import check_chain, measure
    from ..measure.self_text import random_windows, write_tokens
    from ..runtime.blocks import NoChain

    report = report or Silent()
    count = count or efforts.EFFORTS[efforts.DEFAULT].tokens
    found = cache.cached_sensitivity(job.source, count)
    if found is not None:
        return found
    try:
        check_chain(job.source, job.inventory)
        report.stage("write tokens")
        windows = random_windows(vocabulary(job), count, first_token(job))
        place = cache.sensitivity_path(job.source, count)
        tokens, how = write_tokens(job.source, windows, progress=report.step, resume_file=place)
        report.stage("sensitivity")
        made = measure(job.source, job.inventory, tokens, how, progress=report.step, key=place.stem)
    except NoChain as error:
        report.note(
            f"{job.source.name} cannot be walked through ({error}): it is converted as with "
            "--effort fast"
        )
        return None
    with cache.report_write_errors("sensitivity", report):
        save_sensitivity(made, place)
        resume.clear(place)
    return made


def _first_measures(job: Job, report: Report | None, count: int | None) -> Sensitivity | None:
    """The first rank's sensitivity, for all: the walk through the model is one after the other in
    any case.
    """
    with tempfile.TemporaryDirectory(prefix="mint-mlx-") as folder:
        file, data = Path(folder) / SENSITIVITY_FILE, b""
        if ranks().first:
            found = _measure_sensitivity(job, report, count)
            if found is not None:
                save_sensitivity(found, file)
                data = file.read_bytes()
        data = ranks().gather_bytes(data)[0]
        if not data:
            return None
        file.write_bytes(data)
        return load_sensitivity(file)


def vocabulary(job: Job) -> int:
    """How many tokens the model knows: what its config says, or the rows of its embedding."""
    rows = next(layer.shape[0] for layer in job.inventory.layers if layer.role == "embedding")
    said = text_config(job.source.config).get("vocab_size")
    return min(said, rows) if type(said) is int and said > 0 else rows


def first_token(job: Job) -> int | None:
    """What a text of the model starts with, or None."""
    if tokenizer_is_code(job.source.path):
        return None
    ids = encode(load_tokenizer(job.source.path), "")
    return int(ids[0]) if len(ids) else None


def get_profile(
    job: Job,
    report: Report | None = None,
    sample: str | None = None,
    allow_nonfinite: bool = False,
    waves: Waves = at_once,
) -> Profile:
    """The source's profile: from the cache, else measured and kept there.

    Args:
        job: the model.
        report: receives progress.
        sample: how much of each layer is measured, for `sample.parse_sample`; an exact profile
            serves as well.
        allow_nonfinite: don't refuse NaN and infinite weights.
        waves: hands layers over as their shards come (lowdisk.py).
    """
    report = report or Silent()
    wanted, sample = profile_candidates(job), parse_sample(sample)
    found = known_profile(job, sample)
    if all(ranks().gather(found is not None)) and found is not None:
        return found
    report.stage("profile")
    # What is kept would hide from the next run what was allowed in this one.
    place = None if allow_nonfinite else cache.profile_path(job.source, wanted, sample)
    curves = measure_curves(
        job.source, job.inventory, wanted, sample, allow_nonfinite, waves, place, report.step
    )
    made = Profile(
        job.source.origin, job.inventory, curves, job.recipe, sample=sample, versions=versions()
    )
    if place is not None and ranks().first:
        with cache.report_write_errors("profile", report):
            save_profile(made, place)
            resume.clear(place)
    return made


def known_profile(job: Job, sample: str | None = None) -> Profile | None:
    """The source's profile from the cache, if an earlier run left one, whatever recipe and parts
    that was for.
    """
    found = cache.cached_profile(job.source, profile_candidates(job), parse_sample(sample))
    return found and replace(found, recipe=job.recipe, inventory=job.inventory)


def profile_candidates(job: Job) -> dict[str, tuple[QuantConfig, ...]]:
    """What a profile measures: all that the recipe names, guards aside, so that it serves overrides
    too.
    """
    return list_candidates(SearchSpace(job.inventory, job.recipe, ignore_guards=True))
