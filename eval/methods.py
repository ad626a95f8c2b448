"""The methods of a comparison by name, and the checkpoints to build with each of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..allocation.allocate import allocate
from ..allocation.plan import Plan
from ..allocation.search_space import SearchSpace
from ..base.errors import MintError, UsageError
from ..base.report import Report
from ..base.units import both, parse_budget
from ..checkpoint.source import Source
from ..converters.output import write
from ..converters.output.conversion import Conversion
from ..converters.quantizers.memory_estimate import check_room
from ..converters.quantizers.registry import find_quantizer, needs_inputs
from ..jobs import measurements
from ..jobs.model import Job
from ..measure.profile import Profile
from ..measure.sensitivity import Sensitivity
from ..rules.efforts import EFFORTS, Effort
from ..rules.objectives import needs_sensitivity
from . import peer_gguf, peers
from .build import Task
from .gguf_file import read_gguf

OURS = {  # the levels of `convert --effort`, and two objectives
    **EFFORTS,
    "nmse": Effort("weights only", "nmse", "rtn"),
    "mint": Effort("weights only", "mint", "rtn"),
}
NAMES = {"nmse": "mint-mlx (nmse)", "mint": "MINT as published"}  # in tables and pictures
PUBLISHED = ("mint",)  # somebody else's method, built by us at every size: a peer like the others


def known_methods() -> tuple[str, ...]:
    """All names that `--methods` takes."""
    return (*OURS, *peers.peer_names())


def check_methods(names: Sequence[str] | None, baseline_text: str | None) -> list[str]:
    """The methods to run, each once; all by default.

    By default those that lack a text are there as well, and become rows that say so.

    Raises:
        UsageError: a name is unknown, or one that was asked for needs a text.
    """
    if names is None:
        return list(known_methods())
    chosen = list(dict.fromkeys(name.strip() for name in names))
    for name in chosen:
        if name not in known_methods():
            raise UsageError(
                f"no method is called {name!r}: there are {', '.join(known_methods())}"
            )
        if name in peers.CALIBRATED and baseline_text is None:
            raise UsageError(
                f"{name} calibrates on a text: give one with --baseline-text (not the one that is "
                "scored)"
            )
    return chosen


def peer_tasks(
    job: Job, names: Iterable[str], budgets: Iterable[int], text: str | None, report: Report
) -> Iterator[Task]:
    """Every peer at its sizes near the budgets, each size once.

    Args:
        job: the source.
        names: of methods; ours are left out.
        budgets: bytes.
        text: the baseline text.
        report: is told of peers that have no size near a budget.
    """
    chosen = [name for name in names if name not in OURS]
    text_key = hashlib.blake2b((text or "").encode(), digest_size=4).hexdigest()
    done = set()
    for budget in budgets:
        for name in chosen:
            if name in peers.CALIBRATED and text is None:
                reason = "calibrates on a text: give one with --baseline-text"
                yield Task(name, "peer", True, "-", budget, reason=reason)
                continue

            near = peers.make_peers(name, job.source, job.inventory, budget, text)
            if not near:
                report.note(f"{name} has no size near {both(budget)}")
            for peer in near:
                if (peer.name, peer.about) in done:
                    continue
                done.add((peer.name, peer.about))
                key = text_key if peer.sees_text else ""
                if name in peer_gguf.TYPES:
                    key = peer_gguf.quantizer_stamp()
                yield Task(
                    peer.name,
                    "peer",
                    peer.sees_text,
                    peer.about,
                    budget,
                    key=key,
                    build=peer.build,
                    foreign=True,
                )


def names_of_given(paths: Sequence[tuple[str, Path]]) -> list[str]:
    """What files and folders that exist already are called in a table, each otherwise than all
    methods and than each other.

    Args:
        paths: the name that each would have, and where it lies.
    """
    names = [name for name, _ in paths]
    for shorten in (lambda path: f"{path.parent.name}/{path.name}", str):
        taken = Counter([*names, *known_methods(), *NAMES.values()])
        names = [
            name if taken[name] == 1 else shorten(path.absolute())
            for name, (_, path) in zip(names, paths, strict=True)
        ]
    return names


def gguf_tasks(source: Source, files: Sequence[Path]) -> Iterator[Task]:
    """GGUF files of the source, to be read as checkpoints."""
    names = names_of_given([(file.name, file) for file in files])
    for name, file in zip(names, files, strict=True):
        status = file.stat()
        key = f"{file.absolute()} {status.st_size} {status.st_mtime_ns}"
        read = partial(read_gguf, source, file)
        yield Task(name, "given", False, "GGUF as given", status.st_size, key, read)


def given_tasks(sources: Sequence[Source]) -> Iterator[Task]:
    """Checkpoints that exist already."""
    names = names_of_given([(source.name, source.path) for source in sources])
    for name, source in zip(names, sources, strict=True):
        key = f"{source.fingerprint} {source.stamp}"
        size = source.weight_bytes
        yield Task(name, "given", False, "as given", size, key, folder=source.path)


def our_tasks(
    job: Job, names: Sequence[str], sizes: Sequence[int], report: Report
) -> Iterator[Task]:
    """Our checkpoints by each method at each size.

    Args:
        job: the source.
        names: of OURS.
        sizes: bytes, of which none is exceeded.
        report: receives progress.
    """
    if not names:
        return

    # What each method sees beside the weights, measured once for all sizes.
    sensitivities: dict[str, Sensitivity | None] = {}
    reasons: dict[str, str] = {}
    for name in names:
        try:
            sensitivities[name] = _sensitivity(job, OURS[name], report)
        except MintError as error:
            reasons[name] = str(error)

    profile = measurements.get_profile(job, report)
    for size in sizes:
        for name in names:
            if name in reasons:
                yield _refused(name, size, reasons[name])
                continue
            try:
                task = _our_task(job, profile, name, size, sensitivities[name], report)
            except MintError as error:
                task = _refused(name, size, str(error))
            yield task


def _kind(name: str) -> str:
    return "peer" if name in PUBLISHED else "ours"


def _refused(name: str, size: int, reason: str) -> Task:
    return Task(name, _kind(name), False, "-", size, reason=reason)


def _sensitivity(job: Job, level: Effort, report: Report) -> Sensitivity | None:
    """The sensitivity of the model on its own text, where a level uses it.

    Raises:
        MintError: it would take too much memory, or can't be measured of this model.
    """
    if not needs_sensitivity(level.objective) and not needs_inputs(level.quantizer):
        return None
    needed = find_quantizer(level.quantizer).memory(job.inventory, level.tokens, True)
    check_room(needed, "leave it out of --methods, or take a larger machine")

    measured = measurements.get_sensitivity(job, report, level.tokens)
    if measured is None:
        raise MintError(
            "no sensitivity can be measured of this model: `convert` makes the same of it as fast"
        )
    return measured


def _our_task(
    job: Job,
    profile: Profile,
    name: str,
    size: int,
    sensitivity: Sensitivity | None,
    report: Report,
) -> Task:
    """One of our checkpoints.

    Raises:
        MintError: nothing fits the size.
    """
    level = OURS[name]
    space = SearchSpace(job.inventory, job.recipe)
    budget = parse_budget(f"{size}B")
    plan = allocate(profile, budget, space, level.objective, sensitivity)
    effort = name if name in EFFORTS else plan.effort
    plan = replace(plan, quantizer=level.quantizer, effort=effort)

    # The plan decides the result, and what its quantizer sees.
    inputs = sensitivity if needs_inputs(level.quantizer) else None
    key = json.dumps({path: str(config) for path, config in plan.choice.items()})
    if inputs is not None:
        key += write.digest(inputs)

    refine = level.refine and inputs is not None
    build = partial(_write, job, plan, inputs, refine, report)
    return Task(name, _kind(name), False, plan.quantizer, size, key, build)


def _write(
    job: Job, plan: Plan, inputs: Sensitivity | None, refine: bool, report: Report, out: Path
) -> None:
    """Write one of our checkpoints, with its scales and biases distilled where there is memory."""
    from ..converters.quantizers.distil import NO_ROOM, can_refine

    if refine and not can_refine(job.inventory, plan.choice):
        report.note(NO_ROOM)
        refine = False
    conversion = Conversion(
        job.source,
        job.inventory,
        plan,
        out,
        force=True,
        report=report,
        sensitivity=inputs,
        refine=refine,
    )
    write.write(conversion)
