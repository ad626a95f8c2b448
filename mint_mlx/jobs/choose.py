"""Which plan carries an order out: the one that was given, or one that is allocated."""

from __future__ import annotations

from dataclasses import replace

from ..allocation.allocate import allocate, describe_vetoes
from ..allocation.pace import Pace, predicted
from ..allocation.plan import Plan
from ..allocation.search_space import list_candidates
from ..base.errors import MintError
from ..base.report import Report
from ..converters.quantizers.registry import needs_inputs
from ..measure.profile import Profile, without_grids
from ..measure.sensitivity import Sensitivity
from ..rules.efforts import EFFORTS
from ..rules.objectives import needs_sensitivity
from .model import Job
from .order import Order
from .speed_tables import get_table


def choose_plan(
    order: Order,
    profile: Profile | None,
    sensitivity: Sensitivity | None = None,
    measured_later: bool = False,
) -> Plan:
    """The plan that carries an order out: the fixed one, or the budget allocated on a profile.

    Args:
        order: what is asked for.
        profile: needed where no plan is fixed.
        sensitivity: used where the objective needs one; without one the objective of
            `--effort fast` takes its place.
        measured_later: a sensitivity will be measured before the conversion: experts have the lower
            floor that goes with it.

    Raises:
        MintError: the safety floor forbids the budget.
    """
    plan = order.fixed_plan
    if plan is None:
        assert order.budget is not None and profile is not None
        weighs_errors = needs_sensitivity(order.objective)
        unweighed = weighs_errors and sensitivity is None
        plan = allocate(
            profile if order.uses_grids else without_grids(profile),
            order.budget,
            order.space,
            EFFORTS["fast"].objective if unweighed else order.objective,
            sensitivity if weighs_errors else None,
            weighs_errors and (measured_later or not unweighed),
            order.pace,
        )
        plan = replace(plan, parts=order.job.parts, effort=order.checked.effort)
    elif order.pace is not None:
        speed = predicted(order.pace, order.job.inventory, plan.choice)
        plan = replace(plan, speed=speed, speed_goal=None)
    return replace(plan, quantizer=order.quantizer)


def paced(order: Order, report: Report) -> Order:
    """An order that has a speed to reach with this machine's table, measured where none is known.

    Raises:
        MintError: the model can't be timed.
    """
    goal = order.checked.goal
    if goal is None or order.pace is not None:
        return order
    table = get_table(order.job, list_candidates(order.space), order.request.context, report)
    return replace(order, pace=Pace(table, order.request.context, goal))


def check_pace(order: Order) -> None:
    """Refuse to plan for a speed where nothing is known of the machine yet (a MintError)."""
    if order.checked.goal is not None and order.pace is None:
        raise MintError(
            f"nothing is known of how fast {order.job.source.name} decodes on this machine: "
            "`mint-mlx speed MODEL` measures it in two minutes, or give --speed-table"
        )


def note_vetoes(order: Order, profile: Profile | None, report: Report) -> None:
    """Say which layers the safety floor leaves unquantized, whatever the budget."""
    if order.fixed_plan is not None or profile is None:
        return
    usable = profile if order.uses_grids else without_grids(profile)
    vetoes = describe_vetoes(order.space, usable, needs_sensitivity(order.objective))
    if vetoes:
        more = f" ({len(vetoes)} such layers)" if len(vetoes) > 1 else ""
        report.note(f"{vetoes[0].replace('would stay', 'stays')}{more}")


def settle_plan(plan: Plan, job: Job, sensitivity: Sensitivity | None, report: Report) -> Plan:
    """The plan as it can be carried out, with a note where that is less than was asked for."""
    # Without a sensitivity there are no tokens to measure a layer's inputs on.
    if needs_inputs(plan.quantizer) and sensitivity is None:
        plan = replace(plan, quantizer=EFFORTS["fast"].quantizer)
    if not needs_inputs(plan.quantizer):
        weights_only = plan.objective is not None and not needs_sensitivity(plan.objective)
        return replace(plan, effort="fast") if weights_only else plan

    if plain := _without_feedback(job, plan):
        report.note(
            "layers in a mode that error feedback doesn't know (mxfp4 and its like) are rounded "
            f"to nearest: {plain}"
        )
    return plan


def _without_feedback(job: Job, plan: Plan) -> int:
    """How many layers are quantized anew to something else than affine codes."""
    chosen = [(layer, plan.choice[layer.path]) for layer in job.inventory.layers]
    return sum(c.quantized and c.mode != "affine" and c != layer.stored for layer, c in chosen)
