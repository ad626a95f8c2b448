"""Where a model's speed table comes from: measured here, the cache, a file, or a chip's name."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..allocation.pace import BASELINE, Goal, Pace
from ..allocation.pace_source import known_table, runtime_versions
from ..allocation.search_space import Candidates
from ..allocation.uniform import comparable_choice
from ..base.errors import MintError
from ..base.quant_config import QuantConfig
from ..base.report import Report, Silent
from ..checkpoint.layers import Inventory
from ..measure import cache
from ..runtime.clock import start_clock, tick_seconds
from ..runtime.kvcache import cache_size
from ..runtime.machine_name import machine_name
from ..runtime.memory import GIB, machine_memory
from ..runtime.speed_estimate import CHIPS, Chip, estimate, macs_with, prompt_band
from ..runtime.speed_table import (
    BATCHES,
    LayerKind,
    Speed,
    SpeedTable,
    Timing,
    is_timed,
    kind_of,
    model_key,
    predict,
    prompt_speed,
    times_scaled,
)
from ..runtime.speed_table_file import save_table
from ..runtime.table_names import named_table
from ..runtime.time_layers import Bench, Product, time_product, timing
from ..runtime.time_model import Reference, time_rest, with_rest
from .model import Job

SECONDS = 120.0  # that measuring a table may take
SHARES = (0.5, 0.2)  # of it, for one token's products and for the rest; what remains is for batches
QUICKER = 0.8
CONTEXTS = (128, 2048)  # tokens at which the rest is timed, or the one asked for outside of them
UNIFORM = (BASELINE, QuantConfig(8, 64))  # whose speeds are told


def measure_table(
    job: Job,
    options: Candidates,
    context: int,
    seconds: float | None = None,
    report: Report | None = None,
) -> SpeedTable:
    """Time a model's layers on this machine, and what decoding takes beside them.

    One token's products come first; products of more tokens follow until the time is over.

    Args:
        job: the model; its weights need not be here.
        options: candidates of every layer.
        context: tokens of the cache.
        seconds: that all of it may take, about; SECONDS by default.
        report: receives progress.

    Raises:
        MintError: the model can't be run with some of its blocks alone.
    """
    report = report or Silent()
    seconds = SECONDS if seconds is None else seconds
    report.stage("speed")
    inventory = job.inventory
    started = time.monotonic()
    choice = comparable_choice(inventory, BASELINE)
    kinds = _kinds(inventory, options)
    machine, used = machine_name(), runtime_versions()

    # One token's products, all of them. Times are in ticks until all is done.
    bench = Bench(start_clock(), inventory.active_bytes(choice), {}, {})
    products = [Product(kind, config, 1) for kind, configs in kinds.items() for config in configs]
    larger = sorted((replace(p, batch=n) for n in BATCHES[1:] for p in products), key=_rank)
    count = len(products) + 1 + len(larger)
    times: dict[LayerKind, dict[QuantConfig, dict[int, Timing]]] = {kind: {} for kind in kinds}
    for i, product in enumerate(products):
        report.step(f"{product.kind} {product.config}", i, count)
        taken = time_product(product, SHARES[0] * seconds / len(products), bench)
        if taken:
            times[product.kind][product.config] = {1: timing(taken)}

    # The rest, by the model that they make up.
    table = SpeedTable(machine, used, times, {})
    report.step("the rest", len(products), count)
    reference = Reference(job.source.config, inventory, _quickest(table, inventory, choice))
    contexts = (min(CONTEXTS[0], context), max(CONTEXTS[1], context))
    name, share = job.source.name, SHARES[1] * seconds
    rest = time_rest(reference, table, name, contexts, share, bench.clock, report.detail)
    table = with_rest(table, inventory, rest)

    # Products of several tokens, as many as there is time for.
    for i, product in enumerate(larger):
        report.step(f"{product.batch} tokens", len(products) + 1 + i, count)
        remaining = started + seconds - time.monotonic()
        if remaining < 0:
            break
        taken = time_product(product, max(remaining / (len(larger) - i), 0.01), bench)
        if taken:
            times[product.kind][product.config][product.batch] = timing(taken)
    return times_scaled(replace(table, clock=1.0), tick_seconds(bench.clock))


def _quickest(
    table: SpeedTable, inventory: Inventory, choice: Mapping[str, QuantConfig]
) -> dict[str, QuantConfig]:
    """The model whose products take the least time: their errors hide the rest the least.

    What is faster by less than QUICKER may be so by chance; the usual configuration stays then.
    """
    quickest = {}
    for layer in inventory.layers:
        usual = choice[layer.path]
        kind = kind_of(layer)
        times = {} if kind is None else table.layers[kind]
        best = min(times, key=lambda config: times[config][1].seconds, default=usual)
        faster = usual in times and times[best][1].seconds < QUICKER * times[usual][1].seconds
        quickest[layer.path] = best if faster else usual
    return quickest


def _kinds(inventory: Inventory, options: Candidates) -> dict[LayerKind, list[QuantConfig]]:
    """What is timed of each kind of layer: candidates, what it is stored as, uniform plans."""
    uniforms = [comparable_choice(inventory, config) for config in UNIFORM]
    kinds: dict[LayerKind, set[QuantConfig]] = {}
    for layer in inventory.layers:
        kind = kind_of(layer)
        if kind is None:
            continue
        wanted = kinds.setdefault(kind, set())
        wanted |= set(options.get(layer.path, ())) | {choice[layer.path] for choice in uniforms}
        wanted |= {layer.stored} if layer.stored else set()
    return {kind: sorted(configs) for kind, configs in kinds.items()}


def _rank(product: Product) -> tuple[bool, int, QuantConfig]:
    """The order of products of several tokens: the usual configurations first, of all of them."""
    return product.config not in UNIFORM, product.batch, product.config


def get_table(
    job: Job, options: Candidates, context: int, report: Report | None = None
) -> SpeedTable:
    """This machine's table of a model: from the cache, else measured and written to it."""
    known = known_table(job.inventory)
    if known is not None and all(
        is_timed(known, layer, config)
        for layer in job.inventory.layers
        for config in options[layer.path]
        if config.quantized
    ):
        return known
    table = measure_table(job, options, context, report=report)
    key = model_key(job.inventory)
    path = cache.speed_path(job.source.name, key, table.machine, table.versions)
    with cache.report_write_errors("speed table", report or Silent()):
        save_table(table, path)
    return table


def caches_of(job: Job, context: int, kv_bits: int | None = None) -> dict[int, int]:
    """Bytes of a model's cache by context, for an estimate; none where its kind is unknown."""
    try:
        sizes = {c: cache_size(job.source.config, c, kv_bits).bytes for c in (1, context)}
    except MintError:
        return {1: 0}
    return sizes


def this_chip() -> Chip | None:
    """The chip of this Mac; of two that share a name the one that is sold with its memory."""
    name = machine_name()
    memory = round(machine_memory() / GIB)
    chips = [chip for chip in CHIPS if re.sub(r" \d+-core$", "", f"Apple {chip.name}") == name]
    exact = [chip for chip in chips if memory in chip.memory]
    return next(iter(exact or chips), None)


def pace_of(job: Job, words: str | None, context: int, goal: Goal | None = None) -> Pace | None:
    """What predicts a job's plans without measuring anything; None where nothing does.

    A named table, this machine's from the cache, or, without a goal, the estimate of this Mac.

    Raises:
        MintError: the named table is wrong.
    """
    name = job.source.name
    if words is not None:
        table = named_table(words, job.inventory, name, caches_of(job, context))
        return Pace(table, context, goal)
    known = known_table(job.inventory)
    if known is not None:
        return Pace(known, context, goal)
    chip = this_chip() if goal is None else None
    if chip is None:
        return None
    return Pace(estimate(chip, job.inventory, name, caches_of(job, context)), context)


@dataclass(frozen=True)
class MacSpeed:
    """How fast a Mac is estimated to be.

    Attributes:
        decoding: one token at a time.
        prompt: the lowest and the highest tokens per second of reading a prompt.
    """

    decoding: Speed
    prompt: tuple[float, float]


def mac_speeds(
    job: Job, choice: Mapping[str, QuantConfig], memory: int, context: int
) -> list[MacSpeed]:
    """How fast a choice is on each Mac that is sold with so much memory, as estimated.

    Args:
        job: the model.
        choice: a configuration for each layer.
        memory: of the Mac, in bytes.
        context: tokens in the cache.
    """
    caches = caches_of(job, context)
    speeds = []
    for chip in macs_with(round(memory / GIB)):
        table = estimate(chip, job.inventory, job.source.name, caches)
        prompt = prompt_speed(table, job.inventory, choice)
        assert prompt is not None  # an estimate knows every configuration
        speed = predict(table, job.inventory, choice, context)
        speeds.append(MacSpeed(speed, prompt_band(prompt)))
    return speeds
