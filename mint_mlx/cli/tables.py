"""Tables that several commands print: sizes, what a memory leaves room for, layers, findings."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from ..allocation.plan import Plan
from ..allocation.search_space import list_candidates, size_range
from ..base.units import both, count, human
from ..checkpoint.block_path import any_block, block_of, collapse
from ..checkpoint.layers import Inventory
from ..converters.output.card import config_table
from ..jobs.findings import Finding
from ..jobs.inspect import LayerInfo
from ..jobs.order import Order
from ..jobs.sizes import Size
from ..jobs.speed_tables import MacSpeed
from ..measure.curve import sqnr_db
from ..measure.grid import describe
from ..rules.efforts import band_text
from ..runtime.memory import RESERVE, Fit
from ..runtime.speed_table import figure

Line = list[Any]
Columns = list[str]


def size_lines(table: list[Size]) -> tuple[Columns, list[Line]]:
    """A size table as columns and lines to print."""
    known = any(size.expected_kl is not None for size in table)
    timed = any(size.speed is not None for size in table)
    columns = ["--budget", "size", "bpw", *(["expected KL"] if known else []), "read/token"]
    columns += [*(["tokens/s"] if timed else []), "Mac"]
    lines: list[Line] = []
    for size in table:
        expected = "-" if size.expected_kl is None else band_text(size.expected_kl)
        line = [
            size.label,
            human(size.bytes, up=size.label == "smallest"),
            f"{size.bits_per_weight:.2f}",
            *([expected] if known else []),
            human(size.active_bytes),
            *([str(size.speed or "-")] if timed else []),
            f"{size.mac} GiB" if size.mac else "-",
        ]
        lines.append(line)
    return columns, lines


def fit_lines(fit: Fit) -> tuple[Columns, list[Line]]:
    """The sum behind a fit, line by line."""
    running = fit.needs
    source = "as the driver says" if fit.measured else "macOS's default"
    bits = 16 if running.kv_bits is None else running.kv_bits
    lines: list[Line] = [
        [f"memory of the machine ({both(fit.memory)}): the GPU may use, {source}", both(fit.limit)],
        ["- reserve: buffers, Python, the tokenizer", both(RESERVE)],
        [
            f"- cache of {running.context} tokens, keys and values in {bits} bits",
            both(running.cache),
        ],
        ["- workspace while a prompt is read", both(running.workspace)],
        ["= left for the weights", both(fit.budget)],
    ]
    return ["fit", "bytes"], lines


def mac_lines(speeds: list[MacSpeed]) -> tuple[Columns, list[Line]]:
    """How fast Macs decode and read a prompt."""
    lines: list[Line] = [
        [mac.decoding.machine, str(mac.decoding), " to ".join(map(figure, mac.prompt))]
        for mac in speeds
    ]
    context = f"tokens/s at a context of {speeds[0].decoding.context}" if speeds else "tokens/s"
    return ["Mac with", context, "reading a prompt"], lines


def raise_hint(order: Order) -> str | None:
    """How a larger size would fit, where only macOS's limit is in its way."""
    fit = order.fit
    if fit is None:
        return None

    # Less than a hundredth more is not worth a risk.
    _, most = size_range(order.job.inventory, list_candidates(order.space))
    gain = min(most, fit.raised - fit.needs.total) - fit.budget
    if fit.budget >= most or gain < fit.budget // 100:
        return None
    return (
        f"{human(gain)} more would fit with `sudo sysctl iogpu.wired_limit_mb={fit.raised >> 20}` "
        f"and --budget {fit.budget + gain}B. The risk: what the GPU holds cannot be paged out, so "
        "with other programs open macOS may stall or kill them (a restart undoes the setting)"
    )


def layer_lines(layers: tuple[LayerInfo, ...]) -> tuple[Columns, list[Line]]:
    """Layers with configuration, bytes and error; one line for those that only differ in block."""
    # A plan alone states how many weights a layer has, not its shape.
    shaped = all(layer.shape is not None for layer in layers)
    groups: dict[tuple[str, str, str], list[LayerInfo]] = defaultdict(list)
    for layer in layers:
        shape = count(layer.weights)
        if layer.shape is not None:
            shape = "x".join(map(str, layer.shape))
        stored = str(layer.config)
        if layer.grid is not None:
            stored += f", {describe(layer.grid)}"
        groups[any_block(layer.path), stored, shape].append(layer)

    blocks = len({block_of(layer.path) for layer in layers} - {None})
    lines: list[Line] = []
    for (_, config, shape), group in groups.items():
        name = collapse([layer.path for layer in group], blocks)
        size = sum(layer.bytes for layer in group)
        worst = [layer.worst for layer in group if layer.worst]
        sqnr = f"{sqnr_db(max(worst)):.1f}" if worst else "-"
        lines.append([name, group[0].role, shape, config, human(size), sqnr])
    return ["layer", "role", "shape" if shaped else "weights each", "as", "bytes", "SQNR dB"], lines


def finding_lines(findings: list[Finding]) -> list[tuple[str, str]]:
    """The doctor's findings; one line for the same one in several blocks."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for finding in findings:
        groups[any_block(finding.where), finding.problem].append(finding.where)
    return [(collapse(places, 0), problem) for (_, problem), places in groups.items()]


def config_lines(plan: Plan, inventory: Inventory) -> tuple[Columns, list[Line]]:
    """The bits x group table: layers, weights, bytes and their share."""
    total = plan.layout(inventory).total
    lines: list[Line] = [
        [config, layers, count(weights), human(size), f"{size / total:.1%}"]
        for config, layers, weights, size in config_table(plan, inventory)
    ]
    rest = inventory.other_bytes
    lines.append(["other tensors", "-", "-", human(rest), f"{rest / total:.1%}"])
    return ["as", "layers", "weights", "bytes", "share"], lines
