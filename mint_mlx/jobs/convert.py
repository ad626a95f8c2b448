"""The main job: a checkpoint and a size in, a verified mixed-precision checkpoint out.

Request -> CheckedRequest -> Order -> profile -> sensitivity -> plan -> write -> Result
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..allocation.allocate import measured_errors, safe_candidates
from ..allocation.plan import Plan
from ..allocation.uniform import active_ratio
from ..base.errors import TAKE_BFLOAT16, MintError
from ..base.report import Report, Silent
from ..base.targets import check_target
from ..checkpoint.low_disk import Waves, at_once, shard_by_shard
from ..checkpoint.source import load_source, read_as
from ..converters.output.card_facts import guess_base
from ..converters.output.conversion import Artifacts, Conversion
from ..converters.output.write import write
from ..converters.quantizers.distil import NO_ROOM, can_refine
from ..converters.quantizers.registry import needs_inputs
from ..measure.grid import describe
from ..measure.profile import Profile, without_grids
from ..measure.sensitivity import Sensitivity
from ..rules import efforts
from ..rules.objectives import needs_sensitivity
from ..runtime.machine import CONTEXT
from ..runtime.memory import fits_here
from .cast import tell_cast, tell_divergence
from .choose import choose_plan, note_vetoes, paced, settle_plan
from .measurements import assumed_profile, get_profile, get_sensitivity, known_profile
from .model import Job
from .order import Order, default_target, place_order
from .request import Request, check_request
from .result import Result
from .stages import expected_stages


def convert(
    model: str,
    budget: str | None = None,
    out: str | Path | None = None,
    *,
    fit: str | None = None,
    context: int = CONTEXT,
    kv_bits: int | None = None,
    plan: str | Path | Plan | None = None,
    uniform: str | None = None,
    parts: str | None = None,
    recipe: str | None = None,
    objective: str | None = None,
    effort: str | None = None,
    quantizer: str | None = None,
    sensitivity: str | Path | None = None,
    tokens: int | None = None,
    overrides: Sequence[str] = (),
    ignore_guards: bool = False,
    force: bool = False,
    sample: str | None = None,
    allow_nonfinite: bool = False,
    low_disk: bool = False,
    card_name: str | None = None,
    keep_nvfp4: bool = False,
    dequantize: bool = False,
    dtype: str | None = None,
    base_model: str | None = None,
    measurements: bool = True,
    min_speed: float | None = None,
    speed: str | None = None,
    speed_table: str | None = None,
    twin: str | None = None,
    keep_twin: str | Path | None = None,
    no_twin: bool = False,
    smoke: bool = True,
    report: Report | None = None,
) -> Result:
    """Convert a checkpoint to one of `budget`, `fit`, `plan`, `uniform` and `dequantize`.

    Args:
        model: a folder or a Hub id.
        budget: the size of all safetensors files: `19GB`, `17.5GiB`, `4.5bpw`, `smallest`.
        out: the folder to write; `NAME-mint-4.5bpw` by default.
        fit: `this-mac` or a memory such as `32GiB` or `32`: the largest size that such a
            machine runs.
        context: tokens that the cache must hold beside the weights.
        kv_bits: bits of a quantized cache, as mlx-lm's `--kv-bits`.
        plan: a plan, its file, or a checkpoint or repository that holds one.
        uniform: the same configuration for every layer, such as `4bit-g64`.
        parts: `text`, `mtp` to keep blocks for multi-token prediction in mtp.safetensors
            (`mtp-8bit`: in 8 bits), or `all` for them and a vision or audio tower.
        recipe: a recipe's name or file; found by the model's type by default.
        objective: what the allocator minimises (`mint-mlx convert --help` lists them).
        effort: `fast`, `balanced` (the default) or `best`.
        quantizer: how codes are made; what the effort says by default.
        sensitivity: a sensitivity's file, or a checkpoint or repository that holds one.
        tokens: how much text the model writes for a sensitivity; what the effort says by default.
        overrides: `REGEX=CONFIG` for all layers that match; later ones win.
        ignore_guards: allow what the guards forbid, such as 4-bit routers.
        force: replace a checkpoint of ours at `out`, and unfinished work of another kind.
        sample: how much of each layer is profiled: `auto`, or a share such as `0.05`.
        allow_nonfinite: take NaN and infinite weights as they are.
        low_disk: fetch a Hub model shard by shard.
        card_name: the result's name in its model card; the folder's by default.
        keep_nvfp4: leave experts of NVFP4 packed, which no CPU runs.
        dequantize: write every layer in 16 bits.
        dtype: `float16` or `bfloat16`, of all 16-bit tensors; what the model states by default.
        base_model: the Hub's name of a model that is given as a folder, for the card; what its own
            card tells by default.
        measurements: write profile and sensitivity beside the weights.
        min_speed: tokens per second that the result must be predicted to decode at `context`.
        speed: the same as a multiple of uniform 4bit-g64's, such as `0.95x`.
        speed_table: whose speed that is: a file, or an Apple chip; this machine's by default.
        twin: an MLX checkpoint of the same model, which writes the text in its place.
        keep_twin: the folder for a twin that is written for that, and stays.
        no_twin: the model writes its text itself, also where it doesn't fit in memory.
        smoke: end with a sentence that the result writes, where it fits in memory.
        report: receives progress and remarks.

    Raises:
        MintError: for everything that is wrong with the input; nothing that looks like a result is
            left then.
    """
    request = Request(
        model,
        budget=budget,
        fit=fit,
        context=context,
        kv_bits=kv_bits,
        plan=plan,
        uniform=uniform,
        out=out,
        parts=parts,
        recipe=recipe,
        objective=objective,
        effort=effort,
        quantizer=quantizer,
        sensitivity=sensitivity,
        tokens=tokens,
        overrides=overrides,
        ignore_guards=ignore_guards,
        force=force,
        sample=sample,
        allow_nonfinite=allow_nonfinite,
        low_disk=low_disk,
        card_name=card_name,
        keep_nvfp4=keep_nvfp4,
        dequantize=dequantize,
        dtype=dtype,
        base_model=base_model,
        measurements=measurements,
        min_speed=min_speed,
        speed=speed,
        speed_table=speed_table,
        twin=twin,
        keep_twin=keep_twin,
        no_twin=no_twin,
    )

    # Words first, then what headers tell, then the work.
    order = place_order(check_request(request), report)
    return carry_out(order, smoke, report)


def carry_out(order: Order, smoke: bool = True, report: Report | None = None) -> Result:
    """Do what a request asks for that its model can have.

    Args:
        order: the request, held against the model.
        smoke: end with a sentence that the result writes, where it fits in memory.
        report: receives progress and remarks.

    Raises:
        MintError: as `convert`.
    """
    report = report or Silent()
    started = time.monotonic()
    request = order.request

    # What needs no weights is refused first: too little memory, a name that is taken.
    order.check_memory()
    if order.fixed_plan is not None:
        target_of(order, order.fixed_plan)

    # Up to here only headers were read; from here on weights are needed.
    _warn_of_floor(order, report)
    report.stages(expected_stages(order, smoke))
    order = paced(order, report)
    order, waves = open_weights(order, report)
    job = order.job
    changes = tell_cast(job, report)

    # Errors are measured first: what their safety floor forbids needs no sensitivity, which takes
    # longer.
    profile = None
    if order.fixed_plan is None:
        profile = get_profile(job, report, order.sample, request.allow_nonfinite, waves)
        _tell_grids(profile, order, report)
        assert order.budget is not None
        with_sensitivity = needs_sensitivity(order.objective)
        usable = profile if order.uses_grids else without_grids(profile)
        safe_candidates(order.space, usable, order.budget, with_sensitivity)

    # The sensitivity weighs errors in the choice, and its tokens are what quantizers measure on.
    sensitivity = None
    if order.runs_model:
        sensitivity = order.sensitivity or get_sensitivity(
            job, report, order.tokens, order.wish, profile
        )
    if sensitivity is not None:
        _check_activations(job, sensitivity, report)
    if changes:
        tell_divergence(order, sensitivity, report)

    # Every layer gets its configuration, and the plan its final quantizer.
    plan = choose_plan(order, profile, sensitivity)
    plan = settle_plan(plan, job, sensitivity, report)
    note_vetoes(order, profile, report)
    if plan.edited and (known := known_profile(job, order.sample)) is not None:
        known = known if order.uses_grids else without_grids(known)
        plan = replace(plan, errors=measured_errors(plan.choice, known.curves))
    target = target_of(order, plan)

    # Codes are written, verified and refined in a work folder that gets its name last.
    total = plan.layout(job.inventory).total
    inputs = sensitivity if needs_inputs(plan.quantizer) else None
    conversion = Conversion(
        job.source,
        job.inventory,
        plan,
        target,
        force=request.force,
        sentence=smoke and order.can_generate and fits_here(total),
        report=report,
        sensitivity=inputs,
        artifacts=Artifacts(profile, sensitivity) if request.measurements else Artifacts(),
        refine=inputs is not None and _refines(job, plan, report),
        allow_nonfinite=request.allow_nonfinite,
        waves=waves,
        name=request.card_name,
        grids=order.uses_grids,
        base=_base_model(order, report),
    )
    sentence = write(conversion)

    active = job.inventory.active_bytes(plan.choice)
    ratio = active_ratio(job.inventory, plan.choice)
    seconds = time.monotonic() - started
    return Result(target, plan, job.inventory, total, active, ratio, sentence, seconds)


def _base_model(order: Order, report: Report) -> str | None:
    """The Hub's name of the source for its card, where the source's own is a folder's."""
    source = order.job.source
    if order.request.base_model is not None or "/" in source.name:
        return order.request.base_model
    guess = guess_base(source.path)
    if guess is not None:
        report.note(f"base_model in the card: {guess}, as the source's card says (--base-model)")
    return guess


def _warn_of_floor(order: Order, report: Report) -> None:
    """Say before a download and a profile that the safety floor will probably forbid the budget."""
    if order.fixed_plan is not None or known_profile(order.job, order.sample) is not None:
        return
    assert order.budget is not None
    weighs_errors = needs_sensitivity(order.objective)
    try:
        safe_candidates(order.space, assumed_profile(order.job), order.budget, weighs_errors)
    except MintError as error:
        report.note(f"probably refused once errors are measured: {error} (if weights are Gaussian)")


def _check_activations(job: Job, sensitivity: Sensitivity, report: Report) -> None:
    """Refuse a model in float16 whose activations float16 cannot hold.

    Raises:
        MintError: naming the layer.
    """
    if all(layer.dtype != "F16" for layer in job.inventory.layers):
        return
    from ..runtime.overflow import overflow
    from ..runtime.runner import load_runner

    report.stage("look for overflows of float16")
    problem = overflow(load_runner(job.source.path, dtype=job.source.dtype), sensitivity.tokens)
    if problem is not None:
        raise MintError(
            f"{job.source.name} {'states' if job.source.dtype is None else 'is asked for in'} "
            f"float16 and overflows in it, which gives NaN on a GPU ({problem}): {TAKE_BFLOAT16}"
        )


def _tell_grids(profile: Profile, order: Order, report: Report) -> None:
    """Say how many layers lie on which grid, where their codes will be taken as they are."""
    counts = Counter(curve.grids[0] for curve in profile.curves.values() if curve.grids)
    if order.uses_grids and counts:
        listed = ", ".join(f"{count} {describe(grid)}" for grid, count in counts.items())
        report.note(
            f"layers whose weights lie on a grid already: {listed}; with so many bits they keep "
            "its codes (--quantizer rtn would round them anew)"
        )


def target_of(order: Order, plan: Plan) -> Path:
    """The folder that a plan's result goes to.

    Raises:
        MintError: it can't be written to, or something else is there.
    """
    target = order.checked.target.folder or default_target(order.job, plan)
    check_target(target, order.job.source.path, order.request.force)
    return target


def open_weights(order: Order, report: Report) -> tuple[Order, Waves]:
    """The order with a source whose weights can be read, and the waves in which they come.

    A Hub model that isn't here is downloaded, or its shards come one by one with --low-disk.
    """
    job = order.job
    if job.source.has_weights:
        return order, at_once
    if order.request.low_disk:
        profiled = order.fixed_plan is None and known_profile(job, order.sample) is None
        return order, shard_by_shard(job.source, job.inventory, profiled, report)
    report.stage("download")
    source = load_source(order.request.model)
    source = read_as(source, job.source.keep_nvfp4, job.source.dtype)
    return replace(order, job=replace(job, source=source)), at_once


def _refines(job: Job, plan: Plan, report: Report) -> bool:
    """Whether a plan ends with distillation: where its effort does, and memory allows."""
    if not efforts.refines(plan.effort, plan.quantizer):
        return False
    if not can_refine(job.inventory, plan.choice):
        report.note(NO_ROOM)
        return False
    return True
