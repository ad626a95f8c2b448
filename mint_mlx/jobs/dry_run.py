"""What a conversion would write and take, told before it is done: from headers, and from what
earlier runs measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..allocation.allocate import above_floor
from ..allocation.plan import Plan
from ..allocation.search_space import list_candidates, size_range
from ..allocation.uniform import active_ratio
from ..base.errors import MintError
from ..base.quant_config import QuantConfig
from ..base.units import both, duration
from ..checkpoint import low_disk
from ..checkpoint.roles import EXPERTS
from ..converters.quantizers.registry import find_quantizer
from ..converters.quantizers.time_estimate import active_weights
from ..measure import pass_state
from ..measure.cache import cached_sensitivity
from ..measure.profile import Profile, assumed
from ..measure.row_sampling import first_share
from ..measure.sample import parse_sample
from ..measure.sensitivity import Sensitivity
from ..rules import efforts
from ..rules.objectives import needs_sensitivity
from ..runtime.device import on_cpu
from .convert import choose_plan
from .measurements import known_profile, profile_candidates
from .model import Job
from .request import Order


def known_sensitivity(order: Order) -> Sensitivity | None:
    """The source's sensitivity as it was given, else from the cache, if an earlier run left one."""
    return order.sensitivity or cached_sensitivity(order.job.source, order.tokens)


def assumed_profile(job: Job) -> Profile:
    """A profile as Gaussian weights would give it, for sizes before any weight is read."""
    curves = assumed(job.inventory, profile_candidates(job))
    return Profile(job.source.origin, job.inventory, curves, job.recipe, weighting="assumed")


@dataclass(frozen=True)
class DryRun:
    """What a conversion would do.

    Which layer gets what is `settled` once the model is `profiled` and, where the objective needs
    one, its sensitivity is measured; until then `bytes` may be a little more or less, within the
    budget. They are `assumed` of the smallest size before any weight is read. What is `spilled` to
    the temporary folder goes when the sensitivity is measured."""

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


def dry_run(order: Order) -> tuple[Plan, DryRun]:
    """What `convert` would do with an order, from headers and a cached profile alone."""
    request, job = order.request, order.job
    known = known_profile(job, request.sample) if order.fixed is None else None
    weights = known_sensitivity(order) if known else None
    try:
        plan = choose_plan(
            order, lambda: known or assumed_profile(job), lambda: weights, ahead=True
        )
    except MintError as error:
        if known is not None or order.fixed is not None:
            raise
        raise MintError(
            f"{error} (if weights were Gaussian; `mint-mlx profile` measures what they are)"
        ) from None
    options = list_candidates(order.space)
    if known is not None:
        weighed = needs_sensitivity(order.objective)
        options = above_floor(order.space, options, known.curves, weighed)
    total = plan.layout(job.inventory).total
    needs_profile = order.fixed is None and known is None
    download = room = 0 if job.source.has_weights else job.source.weight_bytes
    if download and request.low_disk:
        download *= 1 + needs_profile
        room = low_disk.peak_bytes(job.source, low_disk.shards_needed(job.source, job.inventory))
    run = DryRun(
        bytes=total,
        assumed=request.budget == "smallest" and known is None,
        bits_per_weight=total * 8 / job.inventory.parameters,
        range=size_range(job.inventory, options),
        active_bytes=job.inventory.active_bytes(plan.choice),
        active_bytes_ratio=active_ratio(job.inventory, plan.choice),
        download=download,
        disk=total + room,
        spilled=_spilled(order),
        memory=order.peak,
        seconds=_stage_seconds(order, total, needs_profile) | _look_seconds(order),
        profiled=known is not None,
        settled=order.fixed is not None
        or (known is not None and (not needs_sensitivity(order.objective) or weights is not None)),
    )
    return plan, run


def _spilled(order: Order) -> int:
    """Bytes of block inputs that wait on disk while a sensitivity is measured."""
    if not order.runs or known_sensitivity(order) is not None:
        return 0
    inventory = order.job.inventory
    hidden = max(
        (layer.shape[-1] for layer in inventory.layers if layer.role == "embedding"), default=0
    )
    return pass_state.bytes_needed(inventory.blocks, order.tokens * hidden, 4 if on_cpu() else 2)


def _stage_seconds(order: Order, total: int, needs_profile: bool) -> dict[str, float]:
    """Seconds of each stage: disks at 1 GB/s, MLX's quantizer as measured here in a fraction of a
    second.
    """
    job, sample = order.job, parse_sample(order.request.sample)
    quantize, measure = _quantizer_rates()
    reading = job.source.weight_bytes / 1e9
    seconds = {
        "convert": reading
        + total / 1e9
        + sum(layer.size for layer in job.inventory.layers) / quantize
    }
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
    """Seconds of what reads the model's own text: operations over the rate of a product timed here.

    A token costs two operations for each weight that it reads: once when it is written, and seven
    times in the walk (forward, forward again for the gradients and for the inputs' shapes, twice
    that back, and forward for the inputs). The quantizer's entry says what it takes itself."""
    inventory, rate = order.job.inventory, _product_rate()
    seconds = {}
    if order.runs and known_sensitivity(order) is None:
        seconds["tokens and sensitivity"] = 2 * 8 * active_weights(inventory) * order.tokens / rate
    return seconds | find_quantizer(order.quantizer).seconds(inventory, order.tokens, rate)


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
    """Weights per second of `mx.quantize`, and of quantizing, dequantizing and the squared error
    together.
    """
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
    inventory = order.job.inventory
    size = (
        order.budget.resolve(inventory.parameters) if order.budget else None
    )  # only the time to write it follows
    known = order.fixed or known_profile(order.job, order.request.sample)
    seconds = _stage_seconds(
        order, size or inventory.parameters // 2, known is None
    ) | _look_seconds(order)
    stages = ", ".join(f"{stage} about {duration(s)}" for stage, s in seconds.items())
    return (
        f"about {duration(sum(seconds.values()))} on this machine ({stages}); memory about "
        f"{both(order.peak)}"
    )


def dry_lines(job: Job, plan: Plan, run: DryRun) -> list[str]:
    """A dry run for people."""
    least, most = run.range
    exact = (
        "exact"
        if run.settled or plan.budget == "smallest"
        else "a little more or less, within the budget"
    )
    if run.assumed:
        exact = "about, until the safety floor is measured"
    experts = any(layer.role in EXPERTS for layer in job.inventory.layers)
    expected = (
        efforts.expected_kl(plan.objective, plan.quantizer, plan.loss) if run.profiled else None
    )
    floor = "" if run.profiled or run.settled else " (before the safety floor)"
    lines = [
        f"would write   {both(run.bytes)}, {run.bits_per_weight:.2f} bits per weight ({exact})",
        *(
            [f"expected KL   {expected:.2g} nats a token from the source"]
            if expected is not None
            else []
        ),
        f"possible      {both(least)} to {both(most)}{floor}",
        f"read a token  {both(run.active_bytes)}, {run.active_bytes_ratio:.2f}x of uniform 4bit-g64"
        + (" (k of E experts)" if experts else ""),
        f"download      {both(run.download) if run.download else 'nothing'}",
        f"disk          {both(run.disk)}"
        + (f", for a time {both(run.spilled)} in --work-dir" if run.spilled else ""),
        f"memory        about {both(run.memory)} at the peak",
        "time          "
        + ", ".join(f"{stage} about {duration(s)}" for stage, s in run.seconds.items()),
    ]
    if not run.settled and not run.profiled:
        lines.append(
            "the choice of layers below assumes Gaussian weights: `mint-mlx profile` measures "
            "them first"
        )
    elif not run.settled:
        lines.append(
            "the choice of layers below is by errors alone: `mint-mlx sensitivity` measures what "
            "they cost"
        )
    return lines
