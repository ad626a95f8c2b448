"""What `convert` prints: the sizes of a model, what a conversion would take, and its result."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..allocation.plan import Plan
    from ..jobs.order import Order
    from ..jobs.request import CheckedRequest
    from ..jobs.result import Result
    from .output import Output


def write_page(result: Result, model: str, output: Output) -> None:
    """The result's report, of what is known without measuring."""
    from ..eval.make_report import write_report
    from .report import tell_report

    tell_report(write_report(result.path, model), output)


def print_fit(order: Order, output: Output) -> None:
    """The sum behind a size that follows from a machine."""
    from . import tables

    if order.fit is None:
        return
    output.table(*tables.fit_lines(order.fit))
    if hint := tables.raise_hint(order):
        output.note(hint)


def print_dry_run(order: Order, output: Output) -> None:
    """What a conversion would write and take."""
    from ..jobs.dry_run import dry_lines, dry_run
    from . import tables

    plan, run = dry_run(order)
    for line in dry_lines(order.job, plan, run):
        output.line(line)
    output.table(*tables.config_lines(plan, order.job.inventory))
    speeds = print_mac_speeds(order, plan, output)
    output.result(asdict(run) | speeds)


def print_mac_speeds(order: Order, plan: Plan, output: Output) -> dict[str, Any]:
    """How fast Macs of the size that --fit names are; returns the same for a JSON object."""
    from ..jobs.speed_tables import mac_speeds
    from . import tables

    machine = order.checked.machine
    if machine is None or machine.memory is None:
        return {}
    speeds = mac_speeds(order.job, plan.choice, machine.memory, order.request.context)
    if speeds:
        output.table(*tables.mac_lines(speeds), "estimated from bytes and shapes")
    return {"mac_speeds": [asdict(mac.decoding) | {"prompt": mac.prompt} for mac in speeds]}


def print_result(result: Result, budget: str | None, output: Output) -> dict[str, Any]:
    """A finished conversion for people; returns the same as one JSON object."""
    from ..jobs.result import describe, summary
    from . import tables

    output.table(*tables.config_lines(result.plan, result.inventory))
    if budget == "smallest" and result.bits_per_weight < 4:
        output.note(
            "this is the least that the safety floor allows: safe from collapse, but clearly "
            "worse than 4 bits"
        )
    output.line(describe(result))
    if result.sentence:
        output.line(f"it writes: {result.sentence}")
    return summary(result)


def print_next(result: Result, kv_bits: int | None, output: Output) -> None:
    """The command that talks to a result."""
    from ..checkpoint.run_command import run_command

    if kv_bits is not None:
        output.note(
            "of mlx-lm's commands only generate has a quantized cache: chat and server keep 16 bits"
        )
    towers = result.inventory.towers
    output.line(run_command(result.path, str(result.path), towers, kv_bits))


def print_sizes(checked: CheckedRequest, plot: Path | None, output: Output) -> None:
    """The sizes that a model can have, their curve, and the command that takes one."""
    from ..base.units import both, count
    from ..jobs.sizes import size_table
    from . import tables

    request = checked.request
    job, sizes = size_table(checked)
    output.line(
        f"{job.source.name}: {count(job.inventory.parameters)} parameters, "
        f"{both(job.source.weight_bytes)}"
    )
    output.table(*tables.size_lines(sizes))

    # What the columns mean.
    output.line(
        f"Mac: the smallest that has room for it beside a context of {request.context} tokens "
        "(--context); `--fit this-mac` takes the largest size that this one runs. 4.5bpw is the "
        "usual choice where there is one: below 4 quality falls fast, above 6 little is left to "
        "gain."
    )
    if sizes[0].loss is None:
        output.line(
            "No weight has been read: sizes are exact, except the smallest, a guess that may be "
            "a third too low."
        )
    if any(size.expected_kl is not None for size in sizes):
        output.line(
            "Expected KL: divergence from the source in nats a token, as this model's sensitivity "
            "predicts it; on other models the true one lay in such a band."
        )

    if plot is not None:
        _draw_sizes(checked, plot, output)

    # The next command has what decided about these sizes.
    options = {
        "--parts": request.parts,
        "--recipe": request.recipe,
        "--objective": request.objective,
        "--effort": request.effort,
        "--dtype": request.dtype,
        "--speed-table": request.speed_table,
    }
    words = [word for name, value in options.items() if value for word in (name, value)]
    usual = "4.5bpw" if "4.5bpw" in [size.label for size in sizes] else sizes[0].label
    command = shlex.join([request.model, *words])
    output.line(f"Then: mint-mlx convert {command} --budget {usual}")
    output.result(
        {
            "source": job.source.name,
            "parameters": job.inventory.parameters,
            "sizes": [asdict(size) for size in sizes],
        }
    )


def _draw_sizes(checked: CheckedRequest, plot: Path, output: Output) -> None:
    """Draw the curve of a model's sizes."""
    from ..eval.pictures.size_curve import size_curve as picture
    from ..eval.pictures.style import draw_to
    from ..jobs.sizes import size_curve

    curve, measured = size_curve(checked)
    if not measured:
        curve = replace(curve, source=f"{curve.source}, if its weights were Gaussian")
    draw_to(picture(curve), plot)
    output.line(f"{plot}: drawn")
