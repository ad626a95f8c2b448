"""What a conversion would write and take, from headers and from what earlier runs measured."""

from __future__ import annotations

from dataclasses import dataclass

from ..allocation.allocate import above_floor
from ..allocation.plan import Plan
from ..allocation.search_space import list_candidates, size_range
from ..allocation.uniform import active_ratio
from ..base.errors import MintError
from ..base.one_line import one_line
from ..base.quant_config import QuantConfig
from ..base.units import both, duration, human
from ..checkpoint import low_disk
from ..checkpoint.roles import EXPERTS
from ..converters.quantizers.registry import find_quantizer
from ..converters.quantizers.time_estimate import active_weights
from ..measure import pass_state
from ..measure.profile import without_grids
from ..measure.rounds import first_windows
from ..measure.row_sampling import first_share
from ..measure.self_text import LENGTH
from ..measure.sensitivity import Sensitivity
from ..rules import efforts
from ..rules.objectives import needs_sensitivity
from ..runtime.device import on_cpu
from ..runtime.memory import RESERVE
from ..runtime.product_rate import product_rate
from ..runtime.speed_table import Speed, describe_speed
from .choose import check_pace, choose_plan
from .measurements import (
    assumed_profile,
    known_profile,
    known_sensitivity,
    profile_candidates,
)
from .model import Job
from .order import Order
from .twin import NAME, Twin, find_twin


def usable_sensitivity(order: Order) -> Sensitivity | None:
    """The sensitivity that was given, else the one from the cache, if there is one."""
    if order.sensitivity is not None:
        return order.sensitivity
    profile = known_profile(order.job, order.sample) if order.wish.writes else None
    return known_sensitivity(order.job, order.tokens, order.wish, profile)


def needs_text(order: Order) -> bool:
    """Whether the model's text is still to be written, and a sensitivity measured on it."""
    return order.runs_model and usable_sensitivity(order) is None


def twin_of(order: Order, writes_text: bool) -> Twin | None:
    """The twin that would be written or used for an order's text; None where there is none.

    It is planned on assumed errors where none are known yet.

    Args:
        order: what would be done.
        writes_text: whether the text is still to be written; without, only one that stays counts.
    """
    if not writes_text and order.wish.keep is None:
        return None
    profile = None
    if order.wish.writes:
        profile = known_profile(order.job, order.sample) or assumed_profile(order.job)
    return find_twin(order.job, order.wish, profile, order.tokens)


@dataclass(frozen=True, repr=False)
class DryRun:
    """What a conversion would do.

    Attributes:
        bytes: of all safetensors files.
        assumed: whether they are those of Gaussian weights: the smallest size before any weight is
            read.
        bits_per_weight: of all files.
        range: the smallest and the largest size that is possible, in bytes.
        active_bytes: that a decoded token reads.
        active_bytes_ratio: the same relative to uniform 4bit-g64.
        download: bytes to download.
        disk: bytes of the result, of a twin that stays, and of shards that are here at once with
            --low-disk.
        spilled: bytes in the temporary folder while a sensitivity is measured, or a twin writes.
        memory: bytes at the peak.
        seconds: by stage.
        profiled: whether the layers' errors are known.
        speed: how fast it is predicted to decode; None where nothing is known of the machine.
        twin: the twin that would write the text, in words; None where none would.
        twin_stays: bytes of the disk that are a twin's with --keep-twin.
        settled: whether it is known which layer gets what: errors and, where the objective needs
            one, a sensitivity are there. Until then `bytes` may be a little more or less, within
            the budget.
    """

    bytes: int
    assumed: bool
    bits_per_weight: float
    range: tuple[int, int]
    active_bytes: int
    active_bytes_ratio: float
    download: int
    disk: int
    spilled: int
    memory: int
    seconds: dict[str, float]
    profiled: bool
    settled: bool
    speed: Speed | None = None
    twin: str | None = None
    twin_stays: int = 0

    def __repr__(self) -> str:
        return one_line(
            self,
            human(self.bytes),
            f"{self.bits_per_weight:.2f} bits per weight",
            f"about {duration(sum(self.seconds.values()))}",
        )


def dry_run(order: Order) -> tuple[Plan, DryRun]:
    """What `convert` would do with an order, from headers and a cached profile alone.

    Raises:
        MintError: the safety floor forbids the budget, as far as that is known.
    """
    request = order.request
    job = order.job
    inventory = job.inventory

    # A plan as the conversion would make it, on assumed errors where none are known yet.
    check_pace(order)
    chooses = order.fixed_plan is None
    known = known_profile(job, order.sample) if chooses else None
    if known is not None and not order.uses_grids:
        known = without_grids(known)
    sensitivity = usable_sensitivity(order) if known else None
    profile = known or assumed_profile(job) if chooses else None
    try:
        plan = choose_plan(order, profile, sensitivity, measured_later=True)
    except MintError as error:
        if known is not None or not chooses:
            raise
        raise MintError(
            f"{error} (if weights were Gaussian; `mint-mlx profile` measures what they are)"
        ) from None

    # What would be possible, as far as the safety floor is known.
    options = list_candidates(order.space)
    weighs_errors = needs_sensitivity(order.objective)
    if known is not None:
        options = above_floor(order.space, options, known.curves, weighs_errors)

    # What it would take: a profile reads all shards once more.
    total = plan.layout(inventory).total
    needs_profile = chooses and known is None
    download = 0 if job.source.has_weights else job.source.weight_bytes
    shards = download
    if download and request.low_disk:
        download *= 1 + needs_profile
        shards = low_disk.peak_bytes(job.source, low_disk.shards_needed(job.source, inventory))
    settled = not chooses or (known is not None and not (weighs_errors and sensitivity is None))
    writes_text = needs_text(order)
    twin = twin_of(order, writes_text)
    stays = twin.stays if twin else 0
    run = DryRun(
        bytes=total,
        assumed=request.budget == "smallest" and known is None,
        bits_per_weight=total * 8 / inventory.parameters,
        range=size_range(inventory, options),
        active_bytes=inventory.active_bytes(plan.choice),
        active_bytes_ratio=active_ratio(inventory, plan.choice),
        download=download,
        disk=total + shards + stays,
        spilled=max(_spilled(order) if writes_text else 0, twin.dropped if twin else 0),
        memory=max(order.peak_memory, twin.bytes + RESERVE if twin else 0),
        seconds=stage_seconds(order, total, needs_profile, writes_text, twin),
        profiled=known is not None,
        settled=settled,
        speed=plan.speed,
        twin=str(twin) if twin and writes_text else None,
        twin_stays=stays,
    )
    return plan, run


def _spilled(order: Order) -> int:
    """Bytes of block inputs that wait on disk while a sensitivity is measured."""
    inventory = order.job.inventory
    hidden = max(
        (layer.shape[-1] for layer in inventory.layers if layer.role == "embedding"), default=0
    )
    return pass_state.bytes_needed(inventory.blocks, order.tokens * hidden, 4 if on_cpu() else 2)


def stage_seconds(
    order: Order, total: int, needs_profile: bool, writes_text: bool, twin: Twin | None
) -> dict[str, float]:
    """Seconds of each stage, on this machine.

    Args:
        order: what would be done.
        total: bytes that would be written.
        needs_profile: whether errors are measured first.
        writes_text: whether the model's text is written and measured (`needs_text`).
        twin: that writes the text, or stays.
    """
    seconds = {}
    quantize, measure = _quantizer_rates()
    if needs_profile:
        seconds["profile"] = _profile_seconds(order, measure)
    if twin is not None and (twin.dropped or twin.stays):
        seconds[NAME] = _twin_seconds(order, twin, quantize)
    seconds["convert"] = _convert_seconds(order.job, total, quantize)
    return seconds | _model_seconds(order, writes_text)


def _profile_seconds(order: Order, rate: float) -> float:
    """Seconds of a profile, disks at 1 GB/s.

    `rate` is how many weights a second are measured at one candidate."""
    candidates = profile_candidates(order.job)
    measured = 0.0
    read = 0.0
    for layer in order.job.inventory.layers:
        weights = layer.size * first_share(layer.as_experts, order.sample)
        measured += weights * sum(c.quantized for c in candidates[layer.path])
        # A layer that is stored quantized is read whole.
        read += 2 * (layer.size if layer.stored else weights)
    return read / 1e9 + measured / rate


def _convert_seconds(job: Job, total: int, rate: float) -> float:
    """Seconds of reading, rounding to nearest and writing, disks at 1 GB/s; `rate` in weights."""
    reading = job.source.weight_bytes / 1e9
    writing = total / 1e9
    return reading + writing + sum(layer.size for layer in job.inventory.layers) / rate


def _twin_seconds(order: Order, twin: Twin, rate: float) -> float:
    """Seconds of writing a twin, its ranges searched; `rate` as of `_convert_seconds`."""
    assert twin.plan is not None
    search = find_quantizer(twin.plan.quantizer).seconds(order.job.inventory, 0, 1.0)
    return _convert_seconds(order.job, twin.bytes, rate) + sum(search.values())


def _model_seconds(order: Order, writes_text: bool) -> dict[str, float]:
    """Seconds of what runs the model on its own text: operations over a product's timed rate.

    A token costs two operations for each weight that it reads: once when it is written, once when
    its inputs are read, and four times where the sensitivity is measured (forward, forward again
    for the gradients, twice that back). The quantizer's entry says what it takes itself."""
    inventory = order.job.inventory
    rate = product_rate()
    seconds = {}
    if writes_text:
        windows = -(-order.tokens // LENGTH)
        runs = 2 * order.tokens + 4 * first_windows((windows, LENGTH)) * LENGTH
        seconds["tokens and sensitivity"] = 2 * active_weights(inventory) * runs / rate
    return seconds | find_quantizer(order.quantizer).seconds(inventory, order.tokens, rate)


def _quantizer_rates() -> tuple[float, float]:
    """Weights per second of rounding to nearest, and of measuring the error of one candidate."""
    import time

    import mlx.core as mx

    from ..measure.distortion import measure

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
    # Only the time to write it follows from the size, so a guess will do.
    parameters = order.job.inventory.parameters
    size = order.budget.resolve(parameters) if order.budget else None
    needs_profile = order.fixed_plan is None and known_profile(order.job, order.sample) is None
    writes_text = needs_text(order)
    twin = twin_of(order, writes_text)
    seconds = stage_seconds(order, size or parameters // 2, needs_profile, writes_text, twin)
    stages = ", ".join(f"{stage} about {duration(s)}" for stage, s in seconds.items())
    return (
        f"about {duration(sum(seconds.values()))} on this machine ({stages}); memory about "
        f"{both(order.peak_memory)}"
    )


def dry_lines(job: Job, plan: Plan, run: DryRun) -> list[str]:
    """A dry run for people."""
    # How far each figure can be trusted.
    exact = "exact"
    if run.assumed:
        exact = "about, until the safety floor is measured"
    elif not run.settled and plan.budget != "smallest":
        exact = "a little more or less, within the budget"
    floor = "" if run.profiled or run.settled else " (before the safety floor)"
    experts = any(layer.role in EXPERTS for layer in job.inventory.layers)
    of_experts = " (k of E experts)" if experts else ""

    # What it would be.
    least, most = run.range
    lines = [
        f"would write   {both(run.bytes)}, {run.bits_per_weight:.2f} bits per weight ({exact})"
    ]
    expected = efforts.expected_kl(plan.objective, plan.quantizer, plan.loss)
    if run.profiled and expected is not None:
        band = efforts.band_text(expected)
        lines.append(f"expected KL   {band} nats a token from the source")
    lines += [
        f"possible      {both(least)} to {both(most)}{floor}",
        f"read a token  {both(run.active_bytes)}, {run.active_bytes_ratio:.2f}x of uniform 4bit-g64"
        f"{of_experts}",
    ]

    if run.speed is not None:
        lines.append(f"decodes       {describe_speed(run.speed)}")

    # What it would take.
    if run.twin is not None:
        lines.append(f"text          by a {run.twin}")
    spilled = f", temporarily {both(run.spilled)} in --work-dir" if run.spilled else ""
    stays = f", {both(run.twin_stays)} of it for the twin that stays" if run.twin_stays else ""
    stages = ", ".join(f"{stage} about {duration(s)}" for stage, s in run.seconds.items())
    lines += [
        f"download      {both(run.download) if run.download else 'nothing'}",
        f"disk          {both(run.disk)}{stays}{spilled}",
        f"memory        about {both(run.memory)} at the peak",
        f"time          {stages}",
    ]
    if run.settled:
        return lines
    if run.profiled:
        why = "is by errors alone: `mint-mlx sensitivity` measures what they cost"
    else:
        why = "assumes Gaussian weights: `mint-mlx profile` measures them first"
    return [*lines, f"the choice of layers below {why}"]
