"""What a person asks before converting: which sizes there are, what a plan would write, which layer got what."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from . import efforts, lowdisk
from .allocate import above_floor, list_candidates, size_range
from .cache import cached_sensitivity
from .converters.card import config_table
from .converters.quantizers import NEEDS_INPUTS
from .doctor import Finding
from .errors import MintError
from .layers import Inventory
from .measured import known_profile, profile_candidates
from .memory import RESERVE, Fit, Needs, smallest_mac
from .objectives import NEEDS_SENSITIVITY
from .order import Job, Order, Request, needs_of, place_order
from .peak import turns
from .pipeline import choose_plan
from .plan import Plan
from .profile import Profile, assumed, sqnr_db
from .quant import KEEP, QuantConfig
from .roles import EXPERTS, block_of
from .sample import first_share, parse_sample
from .sensitivity import Sensitivity
from .uniform import active_ratio
from .units import Budget, both, count, duration, human, parse_budget
from .versions import versions

SIZES = ("3.5bpw", "4.5bpw", "5.5bpw", "6.5bpw")
Row = list[Any]


@dataclass(frozen=True)
class SizeRow:
    """One possible size of a model."""

    label: str
    bytes: int
    bits_per_weight: float
    loss: float | None
    active_bytes: int
    mac: int | None


def known_sensitivity(order: Order) -> Sensitivity | None:
    """The source's sensitivity as it was given, else from the cache, if an earlier run left one."""
    found = order.own or cached_sensitivity(order.job.source, order.tokens)
    return found[1] if found else None


def assumed_profile(job: Job) -> Profile:
    """A profile as Gaussian weights would give it, for sizes before any weight is read."""
    curves = assumed(job.inventory, profile_candidates(job))
    s = job.source
    return Profile(s.name, s.revision, s.structure, s.content, job.inventory, curves, job.recipe, weighting="assumed")


def size_table(request: Request) -> tuple[Job, list[SizeRow]]:
    """Five or six sizes from the smallest to nearly lossless, the last the unquantized model.

    Losses are known where a cached profile is; without one the smallest size assumes Gaussian weights.

    Raises:
        MintError: the model, the recipe, the objective or an override is wrong.
    """
    order = place_order(replace(request, budget="smallest"))
    job = order.job
    measured = known_profile(job)
    weights = known_sensitivity(order) if measured else None
    profile = measured or assumed_profile(job)
    options = list_candidates(job.inventory, job.recipe, order.forced, request.ignore_guards)
    _, most = size_range(job.inventory, options)
    rows = []

    def plan(budget: Budget) -> Plan:
        return choose_plan(replace(order, budget=budget), lambda: profile, lambda: weights, ahead=True)

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
    unquantized = Plan(profile.source, None, "", "", {layer.path: KEEP for layer in job.inventory.layers})
    rows.append(_size_row(job, "(unquantized)", unquantized, False, beside))
    return job, rows


def _size_row(job: Job, label: str, plan: Plan, known: bool, beside: Needs | None) -> SizeRow:
    total = plan.layout(job.inventory).total
    bits = total * 8 / job.inventory.parameters
    active = job.inventory.active_bytes(plan.choice)
    return SizeRow(label, total, bits, plan.loss if known else None, active, smallest_mac(total, beside))


def size_rows(table: list[SizeRow]) -> tuple[list[str], list[Row]]:
    """A size table as columns and rows to print."""
    columns = ["--budget", "size", "bpw", "loss", "read/token", "Mac"]
    rows: list[Row] = []
    for row in table:
        loss = "-" if row.loss is None else f"{row.loss:.4g}"
        mac = f"{row.mac} GiB" if row.mac else "-"
        rows.append([row.label, human(row.bytes), f"{row.bits_per_weight:.2f}", loss, human(row.active_bytes), mac])
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
    options = list_candidates(job.inventory, job.recipe, order.forced, order.request.ignore_guards)
    _, most = size_range(job.inventory, options)
    gain = min(most, fit.raised - fit.needs.total) - fit.budget
    if fit.budget >= most or gain < fit.budget // 100:
        return None
    return (
        f"{human(gain)} more would fit with `sudo sysctl iogpu.wired_limit_mb={fit.raised >> 20}` and --budget "
        f"{fit.budget + gain}B. The risk: what the GPU holds cannot be paged out, so with other programs open macOS "
        "may stall or kill them (a restart undoes the setting)"
    )


def collapse(paths: list[str], blocks: int) -> str:
    """Module paths that differ in their block number as one: `layers.*` for all blocks, else `layers.[0-2,5]`."""
    match = re.search(r"\.(\d+)\.", paths[0])
    if match is None:
        return paths[0]
    numbers = sorted(block for block in map(block_of, paths) if block is not None)
    middle = "*" if len(numbers) == blocks > 1 else _ranges(numbers)
    return f"{paths[0][: match.start()]}.{middle}.{paths[0][match.end() :]}"


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return texts[0] if len(numbers) == 1 else f"[{','.join(texts)}]"


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
            LayerRow(layer.path, layer.role, shape, str(config), layer.bytes(config), error.worst if error else None)
        )
    return rows


def layer_table(layers: list[LayerRow]) -> tuple[list[str], list[Row]]:
    """Layers with configuration, bytes and error; those that agree but for their block are drawn together."""
    blocks = len({block_of(layer.path) for layer in layers} - {None})
    groups: dict[tuple[str, str, str], list[LayerRow]] = defaultdict(list)
    for layer in layers:
        groups[re.sub(r"\.\d+\.", ".*.", layer.path, count=1), layer.config, layer.shape].append(layer)
    rows: list[Row] = []
    for group in groups.values():
        first, worst = group[0], [layer.worst for layer in group if layer.worst]
        sqnr = f"{sqnr_db(max(worst)):.1f}" if worst else "-"
        name, size = collapse([layer.path for layer in group], blocks), sum(layer.bytes for layer in group)
        rows.append([name, first.role, first.shape, first.config, human(size), sqnr])
    return ["layer", "role", "shape", "as", "bytes", "SQNR dB"], rows


def finding_rows(findings: list[Finding]) -> list[tuple[str, str]]:
    """The doctor's findings; the same one in several blocks is drawn together."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for finding in findings:
        groups[re.sub(r"\.\d+\.", ".*.", finding.where, count=1), finding.problem].append(finding.where)
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
    return Plan(s.name, s.revision, s.structure, s.content, choice, recipe="as stored", versions=versions())


@dataclass(frozen=True)
class DryRun:
    """What a conversion would do.

    Which layer gets what is `settled` once the model is `profiled` and, where the objective needs one, its sensitivity
    is measured; until then `bytes` may be a little more or less, within the budget. They are `assumed` of the smallest
    size before any weight is read.
    """

    bytes: int
    assumed: bool
    bits_per_weight: float
    range: tuple[int, int]
    active_bytes: int
    active_bytes_ratio: float
    download: int
    disk: int
    memory: int
    seconds: dict[str, float]
    profiled: bool
    settled: bool


def dry_run(order: Order) -> tuple[Plan, DryRun]:
    """What `convert` would do with an order, from headers and a cached profile alone."""
    request, job = order.request, order.job
    known = known_profile(job, request.sample) if order.fixed is None else None
    weights = known_sensitivity(order) if known else None
    try:
        plan = choose_plan(order, lambda: known or assumed_profile(job), lambda: weights, ahead=True)
    except MintError as error:
        if known is not None or order.fixed is not None:
            raise
        raise MintError(f"{error} (if weights were Gaussian; `mint-mlx profile` measures what they are)") from None
    options = list_candidates(job.inventory, job.recipe, order.forced, request.ignore_guards)
    if known is not None:
        weighed = order.objective in NEEDS_SENSITIVITY
        options = above_floor(job.inventory, known.curves, options, job.recipe, order.forced, weighed)
    total = plan.layout(job.inventory).total
    needs_profile = order.fixed is None and known is None
    download = room = 0 if job.source.has_weights else job.source.weight_bytes
    if download and request.low_disk:
        download, room = download * (1 + needs_profile), lowdisk.room(job.source, job.inventory)
    run = DryRun(
        bytes=total,
        assumed=request.budget == "smallest" and known is None,
        bits_per_weight=total * 8 / job.inventory.parameters,
        range=size_range(job.inventory, options),
        active_bytes=job.inventory.active_bytes(plan.choice),
        active_bytes_ratio=active_ratio(job.inventory, plan.choice),
        download=download,
        disk=total + room,
        memory=order.peak,
        seconds=_stage_seconds(order, total, needs_profile) | _look_seconds(order),
        profiled=known is not None,
        settled=order.fixed is not None
        or (known is not None and (order.objective not in NEEDS_SENSITIVITY or weights is not None)),
    )
    return plan, run


def _stage_seconds(order: Order, total: int, needs_profile: bool) -> dict[str, float]:
    """Seconds of each stage: disks at 1 GB/s, MLX's quantizer as measured here in a fraction of a second."""
    job, sample = order.job, parse_sample(order.request.sample)
    quantize, measure = _quantizer_rates()
    reading = job.source.weight_bytes / 1e9
    seconds = {"convert": reading + total / 1e9 + sum(layer.size for layer in job.inventory.layers) / quantize}
    if needs_profile:
        wanted = profile_candidates(job)
        measured = read = 0.0
        for layer in job.inventory.layers:
            weights = layer.size * first_share(layer.as_experts, sample)
            measured += weights * sum(c.quantized for c in wanted[layer.path])
            read += 2 * (layer.size if layer.stored else weights)
        seconds = {"profile": read / 1e9 + measured / measure} | seconds
    return seconds


def _look_seconds(order: Order) -> dict[str, float]:
    """Seconds of what looks at the model's own text: by the count of multiplications and a product timed here.

    A token costs two operations for each weight that it reads: once when it is written, and seven times in the walk
    (forward, forward again for the gradients and for the inputs' shapes, twice that back, and forward for the inputs).
    Learning and refining take six for each weight and token of a step, three times that with all that isn't a product,
    and each further turn of learning (peak.py) four: its products, made again.
    Error feedback costs a row and column of each second moment for every weight, and the moments their tokens.
    """
    from . import refine as refining
    from .converters import learn as learning

    layers = [layer for layer in order.job.inventory.layers if layer.kind != "embedding"]
    active = sum(layer.size * layer.reads for layer in layers)
    rate, seconds = _product_rate(), {}
    if order.runs and known_sensitivity(order) is None:
        seconds["tokens and sensitivity"] = 2 * 8 * active * order.tokens / rate
    if order.quantizer in NEEDS_INPUTS:
        each = sum(2 * layer.size * layer.shape[-1] for layer in layers)
        copies = sum(layer.reads * layer.experts * layer.shape[-1] ** 2 for layer in layers)
        seconds["error feedback"] = (each + 2 * copies * order.tokens) / rate
    if order.quantizer == "learn":
        further = turns(order.job.inventory, order.tokens) - 1
        seconds["learning"] = (3 * 6 + 4 * further) * active * learning.STEPS * learning.TOKENS / rate
        seconds["refining"] = 3 * 6 * active * refining.STEPS * refining.TOKENS / rate
    return seconds


def _product_rate() -> float:
    """Operations per second of a float32 matrix product."""
    import time

    import mlx.core as mx

    a = mx.random.normal((1024, 1024))
    mx.eval(a @ a)
    start = time.perf_counter()
    mx.eval(a @ a)
    return 2 * 1024**3 / (time.perf_counter() - start)


def _quantizer_rates() -> tuple[float, float]:
    """Weights per second of `mx.quantize`, and of quantizing, dequantizing and the squared error together."""
    import time

    import mlx.core as mx

    from .distortion import measure

    w = mx.random.normal((256, 4096)).astype(mx.bfloat16)
    mx.eval(mx.quantize(w, 64, 4))
    start = time.perf_counter()
    mx.eval(mx.quantize(w, 64, 4))
    middle = time.perf_counter()
    measure(w, [QuantConfig(4, 64)] * 4)
    end = time.perf_counter()
    return w.size / (middle - start), 4 * w.size / (end - middle)


def time_note(order: Order) -> str:
    """What a conversion will take, said before it starts."""
    inventory = order.job.inventory
    size = order.budget.resolve(inventory.parameters) if order.budget else None  # only the time to write it follows
    known = order.fixed or known_profile(order.job, order.request.sample)
    seconds = _stage_seconds(order, size or inventory.parameters // 2, known is None) | _look_seconds(order)
    stages = ", ".join(f"{stage} about {duration(s)}" for stage, s in seconds.items())
    return f"about {duration(sum(seconds.values()))} on this machine ({stages}); memory about {both(order.peak)}"


def dry_lines(job: Job, plan: Plan, run: DryRun) -> list[str]:
    """A dry run for people."""
    least, most = run.range
    exact = "exact" if run.settled or plan.budget == "smallest" else "a little more or less, within the budget"
    if run.assumed:
        exact = "about, until the safety floor is measured"
    experts = any(layer.role in EXPERTS for layer in job.inventory.layers)
    expected = efforts.expected_kl(plan.objective, plan.quantizer, plan.loss) if run.profiled else None
    floor = "" if run.profiled or run.settled else " (before the safety floor)"
    lines = [
        f"would write   {both(run.bytes)}, {run.bits_per_weight:.2f} bits per weight ({exact})",
        *([f"expected KL   {expected:.2g} nats a token from the source"] if expected is not None else []),
        f"possible      {both(least)} to {both(most)}{floor}",
        f"read a token  {both(run.active_bytes)}, {run.active_bytes_ratio:.2f}x of uniform 4bit-g64"
        + (" (k of E experts)" if experts else ""),
        f"download      {both(run.download) if run.download else 'nothing'}",
        f"disk          {both(run.disk)}",
        f"memory        about {both(run.memory)} at the peak",
        "time          " + ", ".join(f"{stage} about {duration(s)}" for stage, s in run.seconds.items()),
    ]
    if not run.settled and not run.profiled:
        lines.append("the choice of layers below assumes Gaussian weights: `mint-mlx profile` measures them first")
    elif not run.settled:
        lines.append("the choice of layers below is by errors alone: `mint-mlx sensitivity` measures what they cost")
    return lines
