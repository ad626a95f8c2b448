"""Which sizes a model can have, and what each would mean."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..allocation.pace import predicted
from ..allocation.plan import Plan
from ..allocation.search_space import list_candidates, size_range
from ..allocation.sweep import Sweep, sweep_profile
from ..base.quant_config import KEEP
from ..base.units import Budget, parse_budget
from ..checkpoint.origin import Origin
from ..measure.profile import without_grids
from ..rules import efforts
from ..rules.objectives import needs_sensitivity
from ..runtime.memory import Needs, smallest_mac
from ..runtime.speed_table import Speed
from .choose import choose_plan
from .dry_run import usable_sensitivity
from .measurements import assumed_profile, known_profile
from .model import Job
from .order import needs_of, place_order
from .request import CheckedRequest

SIZES = ("3.5bpw", "4.5bpw", "5.5bpw", "6.5bpw")


@dataclass(frozen=True)
class Size:
    """One possible size of a model.

    Attributes:
        label: what to give as `--budget`.
        bytes: of all safetensors files.
        bits_per_weight: of all files.
        loss: the objective's value, where errors are known.
        expected_kl: KL from the source in nats a token, where the objective predicts it.
        expected_kl_band: the lowest and the highest that this stands for (efforts.SPREAD).
        active_bytes: that a decoded token reads.
        mac: GiB of the smallest Mac that runs it; None where there is none, or it can't be told.
        speed: how fast it is predicted to decode; None where nothing is known of the machine.
    """

    label: str
    bytes: int
    bits_per_weight: float
    loss: float | None
    expected_kl: float | None
    expected_kl_band: tuple[float, float] | None
    active_bytes: int
    mac: int | None
    speed: Speed | None = None


def size_table(checked: CheckedRequest) -> tuple[Job, list[Size]]:
    """Two to six sizes from the smallest to nearly lossless, the last the unquantized model.

    Losses are known where a cached profile is; without one the smallest size assumes Gaussian
    weights.

    Args:
        checked: a request for the smallest size.

    Raises:
        MintError: the model, the recipe or an override is wrong.
    """
    order = place_order(checked)
    job = order.job
    parameters = job.inventory.parameters
    measured = known_profile(job, order.sample)
    sensitivity = usable_sensitivity(order) if measured else None
    profile = measured or assumed_profile(job)

    def plan(budget: Budget) -> Plan:
        return choose_plan(replace(order, budget=budget), profile, sensitivity, measured_later=True)

    # The usual sizes that lie between the smallest and the largest.
    smallest = plan(Budget("smallest"))
    plans = [("smallest", smallest)]
    least = smallest.layout(job.inventory).total
    _, most = size_range(job.inventory, list_candidates(order.space))
    for text in SIZES:
        budget = parse_budget(text)
        limit = budget.resolve(parameters)
        if limit is not None and least * 1.02 < limit < most:
            plans.append((text, plan(budget)))

    running = needs_of(job, order.request)
    table = [_size(job, label, plan, measured is not None, running) for label, plan in plans]
    kept = {layer.path: KEEP for layer in job.inventory.layers}
    speed = predicted(order.pace, job.inventory, kept)
    unquantized = Plan(Origin(profile.origin.source), kept, speed=speed)
    return job, [*table, _size(job, "(unquantized)", unquantized, False, running)]


def size_curve(checked: CheckedRequest) -> tuple[Sweep, bool]:
    """The curve of a model's sizes, and whether errors were measured.

    Without a cached profile it is that of Gaussian weights, by the objective of `--effort fast`.

    Args:
        checked: a request for the smallest size.
    """
    order = place_order(checked)
    measured = known_profile(order.job, order.sample)
    sensitivity = usable_sensitivity(order) if measured else None
    weighs_errors = needs_sensitivity(order.objective)
    objective = order.objective
    if weighs_errors and sensitivity is None:
        objective = efforts.EFFORTS["fast"].objective
    profile = measured or assumed_profile(order.job)
    if not order.uses_grids:
        profile = without_grids(profile)
    used = sensitivity if weighs_errors else None
    curve = sweep_profile(profile, used, objective, order.quantizer, weighs_errors)
    return curve, measured is not None


def _size(job: Job, label: str, plan: Plan, known: bool, running: Needs | None) -> Size:
    """A plan as a line of the table; its loss is told where errors are `known`."""
    total = plan.layout(job.inventory).total
    loss = plan.loss if known else None
    expected = efforts.expected_kl(plan.objective, plan.quantizer, loss)
    return Size(
        label=label,
        bytes=total,
        bits_per_weight=total * 8 / job.inventory.parameters,
        loss=loss,
        expected_kl=expected,
        expected_kl_band=efforts.band(expected),
        active_bytes=job.inventory.active_bytes(plan.choice),
        mac=smallest_mac(total, running),
        speed=plan.speed,
    )
