"""The main job: a checkpoint and a budget in, a verified mixed-precision checkpoint out.

Order -> (download, profile) -> allocate, or a given plan -> write
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..allocation.allocate import allocate, measured_errors, safe_candidates
from ..allocation.plan import Plan
from ..allocation.uniform import active_ratio
from ..base.report import Report, Silent
from ..base.targets import check_target
from ..base.units import both, human
from ..checkpoint.layers import Inventory
from ..checkpoint.low_disk import Waves, at_once, shard_by_shard
from ..checkpoint.source import load_source
from ..measure.profile import Profile
from ..measure.sensitivity import Sensitivity
from ..rules import efforts
from ..rules.efforts import EFFORTS, effort_name
from ..rules.objectives import needs_sensitivity
from ..runtime.memory import fits_here
from .measurements import get_profile, get_sensitivity, known_profile
from .model import Job
from .request import Order, Request, default_target, place_order


@dataclass(frozen=True)
class Result:
    """A finished conversion."""

    path: Path
    plan: Plan
    inventory: Inventory
    bytes: int
    active_bytes: int
    active_ratio: float
    sentence: str | None
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        return self.bytes * 8 / self.inventory.parameters


def choose_plan(
    order: Order,
    curves: Callable[[], Profile],
    weigh: Callable[[], Sensitivity | None] = lambda: None,
    ahead: bool = False,
) -> Plan:
    """The plan that carries an order out: the fixed one, or the budget allocated on a profile.

    Args:
        order: what is asked for.
        curves: gets the profile, where one is needed.
        weigh: gets the sensitivity, where the objective needs one; without one that of
            `--effort fast` takes its place.
        ahead: the sensitivity will be measured later: the safety floor is that with one.

    Raises:
        MintError: the safety floor forbids the budget.
    """
    plan = order.fixed
    if plan is None:
        assert order.budget is not None
        job, objective = order.job, order.objective
        weighed = needs_sensitivity(objective)
        made = curves()
        weights = None
        if weighed:
            # What can't be is refused before a sensitivity is measured, which takes longer.
            safe_candidates(order.space, made, order.budget, weighed)
            weights = weigh()
            weighed = ahead or weights is not None
            objective = objective if weights is not None else EFFORTS["fast"].objective
        plan = allocate(made, order.budget, order.space, objective, weights, weighed)
        plan = replace(plan, parts=job.parts, effort=effort_name(order.request.effort))
    return replace(plan, quantizer=order.quantizer)


def convert(
    model: str,
    budget: str | None = None,
    out: str | Path | None = None,
    *,
    smoke: bool = True,
    report: Report | None = None,
    **more: Any,
) -> Result:
    """Convert a checkpoint.

    Args:
        model: a folder or a Hub id.
        budget: the size, unless `fit`, `plan` or `uniform` is given.
        out: the folder to write.
        smoke: end with a sentence from the result, where it fits in memory.
        report: receives progress.
        more: the other fields of `Request`.

    Raises:
        MintError: for everything that is wrong with the input; nothing that looks like a result is
            left then.
    """
    return carry_out(
        place_order(Request(model, budget=budget, out=out, **more), report), smoke, report
    )


def carry_out(order: Order, smoke: bool = True, report: Report | None = None) -> Result:
    """Do what a request asks for that was found possible (see `convert`)."""
    from ..converters.output.write import Artifacts, Conversion, write
    from ..converters.quantizers.distil import NO_ROOM, can_refine
    from ..converters.quantizers.registry import needs_inputs

    report = report or Silent()
    started = time.monotonic()
    request, job = order.request, order.job
    order.check_memory()
    if order.fixed is not None and request.out is None:
        check_target(default_target(job, order.fixed), job.source.path, request.force)
    waves: Waves = at_once
    if not job.source.has_weights and request.low_disk:
        reads = order.fixed is None and known_profile(job, request.sample) is None
        waves = shard_by_shard(job.source, job.inventory, reads, report)
    elif not job.source.has_weights:
        report.stage("download")
        job = replace(job, source=load_source(request.model))
        order = replace(order, job=job)
    artifacts = Artifacts()

    def curves() -> Profile:
        nonlocal artifacts
        made = get_profile(job, report, request.sample, request.allow_nonfinite, waves)
        artifacts = replace(artifacts, profile=made)
        return made

    @lru_cache(maxsize=1)  # measured once, also where it is in vain
    def sensitivity() -> Sensitivity | None:
        nonlocal artifacts
        found = order.sensitivity or get_sensitivity(job, report, order.tokens)
        if found is not None:
            artifacts = replace(artifacts, sensitivity=found)
        return found

    plan = choose_plan(order, curves, sensitivity)
    looks = needs_inputs(plan.quantizer)
    if looks and sensitivity() is None:
        plan, looks = replace(plan, quantizer=EFFORTS["fast"].quantizer), False
    if plan.objective is not None and not needs_sensitivity(plan.objective) and not looks:
        plan = replace(plan, effort="fast")
    if looks and (plain := _without_feedback(job, plan)):
        report.note(
            "layers in a mode that error feedback doesn't know (mxfp4 and its like) are rounded "
            f"to nearest: {plain}"
        )
    if plan.edited and (known := known_profile(job, request.sample)) is not None:
        plan = replace(plan, errors=measured_errors(plan.choice, known.curves))
    target = Path(request.out) if request.out is not None else default_target(job, plan)
    check_target(target, job.source.path, request.force)
    total = plan.layout(job.inventory).total
    say = smoke and fits_here(total) and order.speaks
    inputs = sensitivity() if looks else None
    refine = inputs is not None and efforts.refines(plan.effort, plan.quantizer)
    if refine and not can_refine(job.inventory, plan.choice):
        report.note(NO_ROOM)
        refine = False
    sentence = write(
        Conversion(
            job.source,
            job.inventory,
            plan,
            target,
            force=request.force,
            sentence=say,
            report=report,
            sensitivity=inputs,
            artifacts=artifacts,
            refine=refine,
            allow_nonfinite=request.allow_nonfinite,
            waves=waves,
            name=request.called,
        )
    )
    active = job.inventory.active_bytes(plan.choice)
    ratio = active_ratio(job.inventory, plan.choice)
    return Result(
        target, plan, job.inventory, total, active, ratio, sentence, time.monotonic() - started
    )


def _without_feedback(job: Job, plan: Plan) -> int:
    """How many layers are rounded anew to something else than affine codes."""
    chosen = [(layer, plan.choice[layer.path]) for layer in job.inventory.layers]
    return sum(c.quantized and c.mode != "affine" and c != layer.stored for layer, c in chosen)


def summary(result: Result) -> dict[str, Any]:
    """A finished conversion as one JSON object."""
    plan = result.plan
    return {
        "path": str(result.path),
        "source": plan.origin.source,
        "revision": plan.origin.revision,
        "bytes": result.bytes,
        "budget_bytes": plan.budget_bytes,
        "bits_per_weight": round(result.bits_per_weight, 4),
        "parameters": result.inventory.parameters,
        "active_bytes": result.active_bytes,
        "active_bytes_ratio": round(result.active_ratio, 4),
        "recipe": plan.recipe,
        "objective": plan.objective,
        "quantizer": plan.quantizer,
        "loss": plan.loss,
        "expected_kl": efforts.expected_kl(plan.objective, plan.quantizer, plan.loss),
        "gap": plan.gap,
        "sentence": result.sentence,
        "seconds": round(result.seconds, 2),
    }


def _gap(plan: Plan) -> str:
    if plan.gap is None:
        return ""
    return (
        f"; at most {plan.gap:.3%} from the best choice"
        if plan.gap
        else "; no choice of layers has a lower loss"
    )


def describe(result: Result) -> str:
    """A finished conversion in one line."""
    return (
        f"{result.path}: {both(result.bytes)}, {result.bits_per_weight:.2f} bits per weight; "
        f"decoding reads {human(result.active_bytes)} a token, {result.active_ratio:.2f}x of "
        "uniform 4bit-g64"
        + efforts.expectation(result.plan.objective, result.plan.quantizer, result.plan.loss)
        + _gap(result.plan)
    )
