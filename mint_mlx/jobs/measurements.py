"""What is measured of a model: its profile and sensitivity, from the cache or written to it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..allocation.artifacts import SENSITIVITY_FILE
from ..allocation.search_space import SearchSpace, list_candidates
from ..base.distributed import ranks
from ..base.folders import UNMARKED
from ..base.hf_config import text_config
from ..base.quant_config import QuantConfig
from ..base.report import Report, Silent
from ..base.scratch import scratch_folder
from ..base.versions import versions
from ..checkpoint.low_disk import Waves, at_once
from ..checkpoint.source import check_unchanged
from ..checkpoint.tokenizer import encode, has_runnable_tokenizer, load_tokenizer
from ..measure import cache, resume
from ..measure.profile import Profile, assumed, measure_curves
from ..measure.profile_file import save_profile
from ..measure.sample import Sample, default_sample
from ..measure.sensitivity import Sensitivity
from ..measure.sensitivity_file import load_sensitivity, save_sensitivity
from ..measure.text import Text
from ..rules import efforts
from .model import Job
from .twin import Twin, Wish, find_twin, open_twin, wish_of, write_kept


def get_sensitivity(
    job: Job,
    report: Report | None = None,
    count: int | None = None,
    wish: Wish | None = None,
    profile: Profile | None = None,
) -> Sensitivity | None:
    """The model's sensitivity, with the text that it wrote for it: from the cache, else measured.

    Args:
        job: the model.
        report: receives progress.
        count: tokens of that text; those of the default effort by default.
        wish: whether a twin writes it; `wish_of` the model by default.
        profile: the model's, for a twin; from the cache or measured where one is written.

    Returns:
        None where the model can't be run block by block; the report is told so.
    """
    report = report or Silent()
    count = count or efforts.EFFORTS[efforts.DEFAULT].tokens
    twin = twin_for(job, wish or wish_of(job), profile, count, report)
    if ranks().size == 1:
        return _measure_sensitivity(job, report, count, twin)
    return _first_rank_measures(job, report, count, twin)


def twin_for(
    job: Job, wish: Wish, profile: Profile | None, count: int, report: Report
) -> Twin | None:
    """The twin that writes so many tokens of a model's text; one that stays is written now.

    Args:
        job: the model.
        wish: what is asked for.
        profile: the model's; from the cache or measured where a twin is written.
        count: tokens.
        report: is told where there is room for none.
    """
    if wish.writes and profile is None:
        profile = get_profile(job, report)
    twin = find_twin(job, wish, profile, count)
    if twin is not None and twin.keep is not None:
        write_kept(job, twin, report)
    if twin is None and wish.writes:
        report.note("not even the smallest twin fits in memory: the model is streamed for its text")
    return twin


def known_sensitivity(
    job: Job, count: int, wish: Wish | None = None, profile: Profile | None = None
) -> Sensitivity | None:
    """The sensitivity that `get_sensitivity` would take from the cache, if there is one."""
    wish = wish or wish_of(job)
    if wish.writes and profile is None:
        return None
    twin = find_twin(job, wish, profile, count)
    return cache.cached_sensitivity(job.source, job.inventory, count, twin.key if twin else "")


@cache.using("sensitivities")
def _measure_sensitivity(
    job: Job, report: Report, count: int, twin: Twin | None
) -> Sensitivity | None:
    """As `get_sensitivity`, in this process."""
    from ..measure import rounds
    from ..measure.fisher import check_chain
    from ..runtime.blocks import NoChain

    key = twin.key if twin else ""
    place = cache.sensitivity_path(job.source, count, key)
    cached = cache.cached_sensitivity(job.source, job.inventory, count, key)
    if cached is not None:
        resume.clear_surplus(place)
        return cached

    # The model is tried before it writes text, which takes as long as measuring on it.
    try:
        check_chain(job.source, job.inventory)
        text = get_text(job, count, report, twin)
        report.stage("sensitivity")
        sensitivity = rounds.measure(job.source, job.inventory, text, report.step, key=place.stem)
        check_unchanged(job.source, partial(resume.clear, place))
    except NoChain as error:
        report.note(
            f"{job.source.name} cannot be run block by block ({error}): it is converted as with "
            "--effort fast"
        )
        return None

    # A full disk costs the next run its time, not this one its result.
    with cache.report_write_errors("sensitivity", report):
        save_sensitivity(sensitivity, place)
        resume.clear(place)
    return sensitivity


def _first_rank_measures(
    job: Job, report: Report, count: int, twin: Twin | None
) -> Sensitivity | None:
    """The first rank's sensitivity, for all: block follows block, so the others can't share it."""
    with scratch_folder(UNMARKED) as folder:
        file = folder / SENSITIVITY_FILE
        data = b""
        if ranks().first:
            sensitivity = _measure_sensitivity(job, report, count, twin)
            if sensitivity is not None:
                save_sensitivity(sensitivity, file)
                data = file.read_bytes()
        data = ranks().gather_bytes(data)[0]
        if not data:
            return None
        file.write_bytes(data)
        return load_sensitivity(file)


def get_text(job: Job, count: int, report: Report, twin: Twin | None = None) -> Text:
    """Text of so many tokens that the model, or its twin, wrote."""
    from ..measure.conversations import in_words
    from ..measure.self_text import write_tokens

    windows, given = text_start(job, count, report)
    place = cache.sensitivity_path(job.source, count, twin.key if twin else "")
    if twin is None:
        report.stage("write tokens")
        tokens, how = write_tokens(
            job.source, windows, progress=report.step, resume_file=place, given=given
        )
        return Text(tokens, how, given)

    # Text that is complete needs no twin any more.
    kind = f"{job.source.stamp}-whole" if job.source.sampled else "whole"
    how = f"sampled by a twin of {twin.bits_per_weight:.2f} bits per weight, seed 0"
    how += in_words(given)
    noted = resume.read_tokens(place, kind, windows, given)
    if noted is not None:
        return Text(noted[0], how, given)
    report.note(f"{twin} writes the text")
    with open_twin(job, twin, report) as source:
        report.stage("write tokens")
        tokens, _ = write_tokens(
            source,
            windows,
            progress=report.step,
            streamed=False,
            resume_file=place,
            packed=True,
            given=given,
        )
    resume.write_tokens(place, kind, tokens, 1)
    return Text(tokens, how, given)


def text_start(
    job: Job, count: int, report: Report, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """What a model's own text goes on from, half of it conversations where it has a chat template.

    Args:
        job: the model.
        count: tokens of the text.
        report: is told of a chat template that can't be used.
        seed: the same seed gives the same.

    Returns:
        Tokens, int32 (windows, tokens), and how many at the start of each window are given.
    """
    from ..measure.conversations import begin_with, conversation_prompts
    from ..measure.self_text import random_windows

    tokenizer = _tokenizer(job)
    windows = random_windows(vocabulary(job), count, _first_of(tokenizer), seed)
    prompts = []
    if tokenizer is not None and tokenizer.chat_template is not None:
        prompts = conversation_prompts(job.source.path, report)
    return begin_with(windows, prompts, vocabulary(job), seed)


def vocabulary(job: Job) -> int:
    """How many tokens the model knows: what its config says, or the rows of its embedding."""
    rows = next(layer.shape[0] for layer in job.inventory.layers if layer.role == "embedding")
    stated = text_config(job.source.config).get("vocab_size")
    return min(stated, rows) if type(stated) is int and stated > 0 else rows


def first_token(job: Job) -> int | None:
    """What a text of the model starts with, or None."""
    return _first_of(_tokenizer(job))


def _tokenizer(job: Job) -> Any:
    """The model's tokenizer; None where there is none that may be run."""
    folder = job.source.path
    return load_tokenizer(folder) if has_runnable_tokenizer(folder) else None


def _first_of(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before every text, if it does."""
    ids = [] if tokenizer is None else encode(tokenizer, "")
    return int(ids[0]) if len(ids) else None


@cache.using("profiles")
def get_profile(
    job: Job,
    report: Report | None = None,
    sample: Sample | None = None,
    allow_nonfinite: bool = False,
    waves: Waves = at_once,
) -> Profile:
    """The source's profile: from the cache, else measured and written to it.

    Args:
        job: the model.
        report: receives progress.
        sample: how much of each layer is measured, by default what suits the device; an exact
            profile serves as well.
        allow_nonfinite: don't refuse NaN and infinite weights.
        waves: hands layers over as their shards come (low_disk.py).
    """
    report = report or Silent()
    sample = sample or default_sample()
    candidates = profile_candidates(job)
    cached = known_profile(job, sample)
    if all(ranks().gather(cached is not None)) and cached is not None:
        resume.clear_surplus(cache.profile_path(job.source, candidates, sample))
        _tell_zeros(cached, report)
        return cached

    # A profile in the cache would hide from the next run what was allowed in this one.
    place = None if allow_nonfinite else cache.profile_path(job.source, candidates, sample)
    report.stage("profile")
    curves = measure_curves(
        job.source, job.inventory, candidates, sample, allow_nonfinite, waves, place, report.step
    )
    check_unchanged(job.source, lambda: None if place is None else resume.clear(place))
    measured = Profile(
        job.source.origin, job.inventory, curves, job.recipe, sample=sample, versions=versions()
    )
    if place is not None and ranks().first:
        with cache.report_write_errors("profile", report):
            save_profile(measured, place)
            resume.clear(place)
    _tell_zeros(measured, report)
    return measured


def _tell_zeros(profile: Profile, report: Report) -> None:
    """Say which layers hold zeros alone, as those that a download has not reached yet do."""
    empty = [path for path, curve in profile.curves.items() if not curve.energy.any()]
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        report.note(
            f"nothing but zeros in {empty[0]}{more} of {len(profile.curves)} layers: look whether "
            f"the download or copy of {profile.origin.source} is complete"
        )


def known_profile(job: Job, sample: Sample | None = None) -> Profile | None:
    """The source's profile from the cache, if there is one, for this job's recipe and parts."""
    cached = cache.cached_profile(job.source, profile_candidates(job), sample or default_sample())
    return cached and replace(cached, recipe=job.recipe, inventory=job.inventory)


def profile_candidates(job: Job) -> dict[str, tuple[QuantConfig, ...]]:
    """What a profile measures: all that the recipe names, also what only an override can choose."""
    return list_candidates(SearchSpace(job.inventory, job.recipe, ignore_guards=True))


def assumed_profile(job: Job) -> Profile:
    """A profile as Gaussian weights would give it, for sizes before any weight is read."""
    curves = assumed(job.inventory, profile_candidates(job))
    return Profile(job.source.origin, job.inventory, curves, job.recipe, weighting="assumed")
