"""What is known of a checkpoint: its plan, its measured errors, its scores. The report shows it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..allocation.artifacts import PROFILE_FILE, find_sensitivity
from ..allocation.layer_losses import layer_losses
from ..allocation.plan import Plan
from ..allocation.plan_file import read_plan
from ..allocation.sweep import Sweep, sweep_profile
from ..allocation.uniform import uniform_choice
from ..base.errors import MintError
from ..base.files import PLAN_FILE, REFINED_FILE
from ..base.quant_config import AFFINE_BITS, QuantConfig
from ..base.report import Report
from ..base.side_files import may_be_copied
from ..checkpoint.source import load_source
from ..jobs.inspect import InspectedModel, inspect
from ..jobs.measurements import (
    get_profile,
    get_sensitivity,
    known_profile,
    known_sensitivity,
)
from ..jobs.model import Job, prepare
from ..measure.profile import Profile
from ..measure.profile_file import load_profile
from ..measure.sensitivity import Sensitivity
from ..rules.efforts import EFFORTS, effort_name, expected_kl
from ..rules.objectives import OBJECTIVES, needs_sensitivity
from .measured import Measurements, read_measured
from .pictures.size_curve import UniformPoint


@dataclass(frozen=True)
class Expectation:
    """What the measured errors predict of a checkpoint and of other sizes.

    Attributes:
        objective: whose losses these are.
        quantizer: that the checkpoint was made with.
        losses: by layer, of the checkpoint's choice.
        curve: the best plans of all sizes.
        uniform: uniform quantization with groups of 64.
    """

    objective: str
    quantizer: str
    losses: dict[str, float]
    curve: Sweep
    uniform: tuple[UniformPoint, ...]

    @property
    def loss(self) -> float:
        """Of the whole checkpoint, as the curve tells it: an expected KL where it is one."""
        total = sum(self.losses.values())
        return expected_kl(self.objective, self.quantizer, total) or total

    @property
    def is_kl(self) -> bool:
        """Whether losses are expected KLs, in nats per token."""
        return needs_sensitivity(self.objective)


@dataclass(frozen=True)
class Facts:
    """What is known of a checkpoint.

    Attributes:
        folder: that holds it.
        model: its layers as stored.
        config: its config.json.
        fingerprint: of its weights.
        plan: that it was made by; None where it has none, or another one than is stored.
        expectation: None where errors aren't known, and then `missing` says why.
        missing: why there is no expectation.
        refined: what refining noted, or nothing.
        measured: scores and further tables.
    """

    folder: Path
    model: InspectedModel
    config: dict[str, Any]
    fingerprint: str
    plan: Plan | None
    expectation: Expectation | None
    missing: str
    refined: dict[str, Any]
    measured: Measurements


def read_facts(
    folder: Path,
    source: str | None = None,
    measure: bool = False,
    notes: Path | None = None,
    report: Report | None = None,
) -> Facts:
    """Read what is known of a checkpoint.

    Args:
        folder: the checkpoint.
        source: the model that it was made from, whose errors the cache may hold.
        measure: measure the source's errors where nothing holds them.
        notes: the folder that holds what was measured; the checkpoint's by default.
        report: receives progress.

    Raises:
        MintError: the folder holds no checkpoint that can be read, or measuring failed.
    """
    model = inspect(folder)
    if not isinstance(model, InspectedModel):
        raise MintError(f"{folder} is no checkpoint: give the folder of one")
    checkpoint = load_source(str(folder))
    plan = _plan(folder, model)

    # The errors that the plan was made from lie beside the weights, else in the cache.
    missing = "no errors were measured: give its source with --source"
    expectation = None
    errors = None
    try:
        errors = _errors_beside(folder, plan)
    except MintError as error:
        missing = str(error)
    if errors is None and source is not None:
        errors = _errors_of(source, plan, measure, report)
    if errors is not None:
        try:
            expectation = _expectation(model, plan, *errors)
        except MintError as error:
            missing = str(error)
    return Facts(
        folder=folder,
        model=model,
        config=checkpoint.config,
        fingerprint=checkpoint.fingerprint,
        plan=plan,
        expectation=expectation,
        missing=missing,
        refined=_refined(folder),
        measured=read_measured(notes or folder, checkpoint.fingerprint),
    )


def _plan(folder: Path, model: InspectedModel) -> Plan | None:
    """The plan beside the weights, where they are what it says."""
    with suppress(MintError):
        plan = read_plan(folder / PLAN_FILE)
        if plan.choice == model.plan.choice:
            return plan
    return None


def _errors_beside(folder: Path, plan: Plan | None) -> tuple[Profile, Sensitivity | None] | None:
    """Profile and sensitivity that a checkpoint holds of the weights that it was made from.

    Raises:
        MintError: they are damaged, or of another model.
    """
    if plan is None or not (folder / PROFILE_FILE).is_file():
        return None
    profile = load_profile(folder / PROFILE_FILE)
    if not profile.origin.matches(plan.origin):
        raise MintError(f"{folder / PROFILE_FILE} is that of another model")
    return profile, find_sensitivity(folder)


def _errors_of(
    source: str, plan: Plan | None, measure: bool, report: Report | None
) -> tuple[Profile, Sensitivity | None] | None:
    """The same of a source: from the cache, else measured where that is wanted."""
    job = prepare(source, weights=measure)
    profile = get_profile(job, report) if measure else known_profile(job)
    if profile is None:
        return None
    needed = plan is None or plan.objective is None or needs_sensitivity(plan.objective)
    return profile, _sensitivity_of(job, plan, measure, report) if needed else None


def _sensitivity_of(
    job: Job, plan: Plan | None, measure: bool, report: Report | None
) -> Sensitivity | None:
    """A source's sensitivity, on as much text as the plan's level of effort takes."""
    tokens = EFFORTS[effort_name(plan.effort if plan else None)].tokens
    cached = known_sensitivity(job, tokens, profile=known_profile(job))
    if cached is not None or not measure:
        return cached
    return get_sensitivity(job, report, tokens)


def _expectation(
    model: InspectedModel, plan: Plan | None, profile: Profile, sensitivity: Sensitivity | None
) -> Expectation:
    """What errors predict.

    Raises:
        MintError: a configuration of the checkpoint wasn't measured.
    """
    # A plan that weighed errors with a sensitivity can't be judged as one without.
    objective = plan.objective if plan is not None else None
    if objective is None or (needs_sensitivity(objective) and sensitivity is None):
        objective = "prior" if sensitivity is None else "fisher"
    quantizer = plan.quantizer if plan is not None else "rtn"
    if expected_kl(objective, quantizer, 1.0) is None and needs_sensitivity(objective):
        objective = OBJECTIVES[objective].without_feedback or objective
    losses = layer_losses(profile, model.plan.choice, objective, sensitivity)
    curve = sweep_profile(profile, sensitivity, objective, quantizer)
    return Expectation(
        objective, quantizer, losses, curve, _uniform_points(profile, objective, sensitivity)
    )


def _uniform_points(
    profile: Profile, objective: str, sensitivity: Sensitivity | None
) -> tuple[UniformPoint, ...]:
    """Uniform quantization, rounded to nearest, as far as its errors were measured."""
    objective = OBJECTIVES[objective].without_feedback or objective
    points = []
    for bits in AFFINE_BITS:
        config = QuantConfig(bits, 64)
        choice = uniform_choice(profile.inventory, config)
        with suppress(MintError):
            loss = sum(layer_losses(profile, choice, objective, sensitivity).values())
            size = profile.inventory.layout(choice).total
            loss = expected_kl(objective, "rtn", loss) or loss
            points.append(UniformPoint(str(config), size, loss))
    return tuple(points)


def _refined(folder: Path) -> dict[str, Any]:
    """What refining noted: where it is sound, else nothing."""
    path = folder / REFINED_FILE
    if not may_be_copied(path, folder):
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {key: float(data[key]) for key in ("kl_before", "kl_after")}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
