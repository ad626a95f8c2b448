"""Which stages an order goes through, so that each can tell its number when it begins."""

from __future__ import annotations

from ..base.hf_config import HALVES
from ..converters.quantizers.registry import needs_inputs
from ..rules import efforts
from ..runtime.device import on_cpu
from ..runtime.memory import fits_here
from .dry_run import needs_text, twin_of
from .measurements import known_profile
from .order import Order
from .twin import STAGES

CAST = "divergence of the cast"
QUICK = 1 << 30  # bytes of a model that a CPU runs in seconds


def expected_stages(order: Order, smoke: bool) -> list[str]:
    """The names of an order's stages, as they are reported one after the other.

    What only the work itself shows (a model without blocks in a chain, too little memory to distil)
    is expected to go well.

    Args:
        order: before any work is done.
        smoke: whether the result writes a sentence.
    """
    job = order.job
    stages = ["speed"] if order.checked.goal is not None and order.pace is None else []
    if not job.source.has_weights and not order.request.low_disk:
        stages.append("download")
    if job.source.dtype is not None and not order.request.low_disk:
        stages.append(f"cast to {job.source.dtype}")
    if order.fixed_plan is None and known_profile(job, order.sample) is None:
        stages.append("profile")
    if order.runs_model:
        stages += _of_model(order)
    if job.source.dtype is not None and (order.runs_model or measures_cast(order)):
        stages.append(CAST)
    stages += ["convert", "verify"]
    if needs_inputs(order.quantizer) and efforts.refines(order.checked.effort, order.quantizer):
        stages.append("refine")
    if smoke and order.can_generate:
        stages.append("generate")
    return stages


def _of_model(order: Order) -> list[str]:
    """The stages that run the model on its own text."""
    job = order.job
    stages: list[str] = []
    writes_text = needs_text(order)
    twin = twin_of(order, writes_text)
    if twin is not None and (twin.dropped or twin.stays):
        stages += STAGES
    if writes_text:
        stages += ["write tokens", "sensitivity"]
    if any(layer.dtype == HALVES["float16"] for layer in job.inventory.layers):
        stages.append("look for overflows of float16")
    return stages


def measures_cast(order: Order) -> bool:
    """Whether what a cast costs is measured without a sensitivity's text: where that is quick."""
    as_float32 = 4 * order.job.inventory.parameters
    if not order.can_generate or order.request.low_disk:
        return False
    return as_float32 <= QUICK if on_cpu() else fits_here(as_float32 // 2)
