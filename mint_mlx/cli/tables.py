"""What a person asks before converting: which sizes there are, what a memory leaves room for, which
layer got what.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from ..allocation.plan import Plan
from ..allocation.search_space import list_candidates, size_range
from ..base.quant_config import KEEP
from ..base.units import Budget, both, count, human, parse_budget
from ..base.versions import versions
from ..checkpoint.block_path import any_block, block_of, collapse
from ..checkpoint.layers import Inventory
from ..checkpoint.origin import Origin
from ..converters.output.card import config_table
from ..jobs.convert import choose_plan
from ..jobs.doctor import Finding
from ..jobs.dry_run import assumed_profile, known_sensitivity
from ..jobs.measurements import known_profile
from ..jobs.model import Job
from ..jobs.request import Order, Request, needs_of, place_order
from ..measure.profile import sqnr_db
from ..rules import efforts
from ..runtime.memory import RESERVE, Fit, Needs, smallest_mac

SIZES = ("3.5bpw", "4.5bpw", "5.5bpw", "6.5bpw")
Row = list[Any]


@dataclass(frozen=True)
class SizeRow:
    """One possible size of a model."""

    label: str
    bytes: int
    bits_per_weight: float
    loss: float | None
    expected_kl: float | None
    active_bytes: int
    mac: int | None


def size_table(request: Request) -> tuple[Job, list[SizeRow]]:
    """Two to six sizes from the smallest to nearly lossless, the last the unquantized model.

    Losses are known where a cached profile is; without one the smallest size assumes Gaussian
    weights.

    Raises:
        MintError: the model, the recipe, the objective or an override is wrong.
    """
    order = place_order(replace(request, budget="smallest"))
    job = order.job
    measured = known_profile(job)
    weights = known_sensitivity(order) if measured else None
    profile = measured or assumed_profile(job)
    options = list_candidates(order.space)
    _, most = size_range(job.inventory, options)
    rows = []

    def plan(budget: Budget) -> Plan:
        return choose_plan(
            replace(order, budget=budget), lambda: profile, lambda: weights, ahead=True
        )

    smallest = plan(Budget("smallest"))
    budgets = [("smallest", smallest)]
    floor = smallest.layout(job.inventory).total
    for text in SIZES:
        limit = parse_budget(text).resolve(job.inventory.parameters)
        if limit is not None and floor * 1.02 < limit < most:
            budgets.append((text, plan(parse_budget(text))))
    beside = needs_of(job, request)
    for label, chosen in budgets:
        rows.append(_size_row(job, label, chosen, measured is not None, beside))
    unquantized = Plan(
        Origin(profile.origin.source), {layer.path: KEEP for layer in job.inventory.layers}
    )
    rows.append(_size_row(job, "(unquantized)", unquantized, False, beside))
    return job, rows


def _size_row(job: Job, label: str, plan: Plan, known: bool, beside: Needs | None) -> SizeRow:
    total = plan.layout(job.inventory).total
    bits = total * 8 / job.inventory.parameters
    active = job.inventory.active_bytes(plan.choice)
    loss = plan.loss if known else None
    expected = efforts.expected_kl(plan.objective, plan.quantizer, loss)
    return SizeRow(label, total, bits, loss, expected, active, smallest_mac(total, beside))


def size_rows(table: list[SizeRow]) -> tuple[list[str], list[Row]]:
    """A size table as columns and rows to print."""
    known = any(row.expected_kl is not None for row in table)
    columns = ["--budget", "size", "bpw", *(["expected KL"] if known else []), "read/token", "Mac"]
    rows: list[Row] = []
    for row in table:
        kl = "-" if row.expected_kl is None else f"{row.expected_kl:.2g}"
        mac, size = (
            f"{row.mac} GiB" if row.mac else "-",
            human(row.bytes, up=row.label == "smallest"),
        )
        figures = [row.label, size, f"{row.bits_per_weight:.2f}", *([kl] if known else [])]
        rows.append([*figures, human(row.active_bytes), mac])
    return columns, rows


def fit_rows(fit: Fit) -> tuple[list[str], list[Row]]:
    """The sum behind a fit, line by line."""
    beside = fit.needs
    source = "as the driver says" if fit.measured else "macOS's default"
    kind = "16 bits" if beside.kv_bits is None else f"{beside.kv_bits} bits"
    rows: list[Row] = [
        [f"memory of the machine ({both(fit.memory)}): the GPU may use, {source}", both(fit.limit)],
        ["- reserve: buffers, Python, the tokenizer", both(RESERVE)],
        [f"- cache of {beside.context} tokens, keys and values in {kind}", both(beside.cache)],
        ["- workspace while a prompt is read", both(beside.workspace)],
        ["= left for the weights", both(fit.budget)],
    ]
    return ["fit", "bytes"], rows


def raise_hint(order: Order) -> str | None:
    """How a larger size would fit, where macOS's limit is what stands in its way."""
    fit, job = order.fit, order.job
    if fit is None:
        return None
    options = list_candidates(order.space)
    _, most = size_range(job.inventory, options)
    gain = min(most, fit.raised - fit.needs.total) - fit.budget
    if fit.budget >= most or gain < fit.budget // 100:
        return None
    return (
        f"{human(gain)} more would fit with `sudo sysctl iogpu.wired_limit_mb={fit.raised >> 20}` "
        f"and --budget {fit.budget + gain}B. The risk: what the GPU holds cannot be paged out, so "
        "with other programs open macOS may stall or kill them (a restart undoes the setting)"
    )


@dataclass(frozen=True)
class LayerRow:
    """One layer as `inspect` shows it. `worst` is the worst expert's NMSE where it is known."""

    path: str
    role: str
    shape: str
    config: str
    bytes: int
    worst: float | None


def plan_rows(plan: Plan, inventory: Inventory) -> list[LayerRow]:
    """Every layer of a plan."""
    rows = []
    for layer in inventory.layers:
        config, error = plan.choice[layer.path], plan.errors.get(layer.path)
        shape = "x".join(map(str, layer.shape))
        rows.append(
            LayerRow(
                layer.path,
                layer.role,
                shape,
                str(config),
                layer.bytes(config),
                error.worst if error else None,
            )
        )
    return rows


def layer_table(layers: list[LayerRow]) -> tuple[list[str], list[Row]]:
    """Layers with configuration, bytes and error; those that agree but for their block are drawn
    together.
    """
    blocks = len({block_of(layer.path) for layer in layers} - {None})
    groups: dict[tuple[str, str, str], list[LayerRow]] = defaultdict(list)
    for layer in layers:
        groups[any_block(layer.path), layer.config, layer.shape].append(layer)
    rows: list[Row] = []
    for group in groups.values():
        first, worst = group[0], [layer.worst for layer in group if layer.worst]
        sqnr = f"{sqnr_db(max(worst)):.1f}" if worst else "-"
        name, size = (
            collapse([layer.path for layer in group], blocks),
            sum(layer.bytes for layer in group),
        )
        rows.append([name, first.role, first.shape, first.config, human(size), sqnr])
    return ["layer", "role", "shape", "as", "bytes", "SQNR dB"], rows


def finding_rows(findings: list[Finding]) -> list[tuple[str, str]]:
    """The doctor's findings; the same one in several blocks is drawn together."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for finding in findings:
        groups[any_block(finding.where), finding.problem].append(finding.where)
    return [(collapse(places, 0), problem) for (_, problem), places in groups.items()]


def config_rows(plan: Plan, inventory: Inventory) -> tuple[list[str], list[Row]]:
    """The bits x group table: layers, weights, bytes and their share."""
    total = plan.layout(inventory).total
    rows: list[Row] = [
        [config, layers, count(weights), human(size), f"{size / total:.1%}"]
        for config, layers, weights, size in config_table(plan, inventory)
    ]
    rest = inventory.other_bytes
    rows.append(["other tensors", "-", "-", human(rest), f"{rest / total:.1%}"])
    return ["as", "layers", "weights", "bytes", "share"], rows


def stored_plan(job: Job) -> Plan:
    """What a checkpoint is stored as now, as a plan (errors from its profile cannot be known)."""
    choice = {layer.path: layer.stored or KEEP for layer in job.inventory.layers}
    s = job.source
    return Plan(s.origin, choice, recipe="as stored", versions=versions())
