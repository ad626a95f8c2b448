"""A checked request held against a model's headers: it becomes an order, or is refused.

    Request -> check_request -> CheckedRequest -> place_order -> Order -> convert.carry_out

Everything that can be refused is refused here, before a step that costs time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from ..allocation.allocate import dequantized, uniform
from ..allocation.artifacts import read_sensitivity, sensitivity_beside
from ..allocation.pace import Pace
from ..allocation.plan import Plan, check_plan
from ..allocation.search_space import (
    SearchSpace,
    check_feasible,
    list_candidates,
    search_space,
    size_range,
)
from ..base.errors import MintError, UsageError
from ..base.report import Report, Silent
from ..base.units import Budget, both
from ..base.versions import versions
from ..checkpoint.tokenizer import why_no_sentence
from ..converters.quantizers.memory_estimate import check_room, has_room, rounding
from ..converters.quantizers.registry import find_quantizer
from ..measure.sample import Sample, default_sample
from ..measure.sensitivity import Sensitivity
from ..measure.sensitivity_file import check_sensitivity
from ..rules.efforts import EFFORTS
from ..rules.objectives import needs_sensitivity
from ..runtime.memory import Fit, Needs, fit, machine_limit, needs
from .model import Job, note_side_files, note_source, prepare
from .request import CheckedRequest, Request
from .speed_tables import pace_of
from .twin import Wish, wish_of


@dataclass(frozen=True)
class Order:
    """A request that its model can have, as far as headers tell.

    Attributes:
        checked: what was asked for.
        job: the model.
        space: what a plan may choose from.
        budget: the size to choose for; None where a plan is fixed.
        fit: the sum behind it, where the budget is what a machine has room for.
        fixed_plan: the plan, where nothing is to be chosen.
        objective: what the choice minimises.
        sample: how much of each layer a profile measures.
        runs_model: whether the model is run on text of its own.
        tokens: how many tokens of that it writes.
        sensitivity: the one that was given, or stands beside the given plan.
        can_generate: whether the result can write a sentence.
        pace: what predicts how fast plans decode, and the least that is asked for; None where
            nothing is known of the machine yet.
        wish: what is asked for of a twin that writes the text.
    """

    checked: CheckedRequest
    job: Job
    space: SearchSpace
    budget: Budget | None
    fit: Fit | None
    fixed_plan: Plan | None
    objective: str
    sample: Sample
    runs_model: bool
    tokens: int
    sensitivity: Sensitivity | None = None
    can_generate: bool = True
    pace: Pace | None = None
    wish: Wish = field(default_factory=Wish)

    @property
    def request(self) -> Request:
        """The words that were asked with."""
        return self.checked.request

    @property
    def quantizer(self) -> str:
        """A name of QUANTIZERS."""
        return self.checked.quantizer

    @property
    def uses_grids(self) -> bool:
        """Whether weights that lie on a grid keep its codes: unless `--quantizer rtn` is given."""
        name = self.request.quantizer
        return name is None or not find_quantizer(name).plain

    @property
    def peak_memory(self) -> int:
        """Bytes of memory that carrying it out takes."""
        return self._memory_of(self.quantizer)

    def _memory_of(self, quantizer: str) -> int:
        """Bytes of memory that it takes with a quantizer of QUANTIZERS."""
        memory = find_quantizer(quantizer).memory
        return memory(self.job.inventory, self.tokens, self.runs_model)

    def check_memory(self) -> None:
        """Refuse what takes more memory than this machine has (a MintError)."""
        least = rounding(self.job.inventory, self.tokens, False)
        advice = "take a larger machine"
        if self.runs_model:
            advice = f"give --effort fast, which takes {both(least)}"
        smaller = find_quantizer(self.quantizer).shared
        if smaller and has_room(needed := self._memory_of(smaller)):
            advice = f"give --quantizer {smaller}, which takes {both(needed)}"
        check_room(self.peak_memory, advice)


def place_order(checked: CheckedRequest, report: Report | None = None) -> Order:
    """Hold a request against its model's headers.

    Args:
        checked: the request.
        report: receives remarks.

    Raises:
        MintError: for everything that the model can't have.
    """
    report = report or Silent()
    request = checked.request

    # Headers alone tell layers and sizes; no weight is read or downloaded.
    job = prepare(
        request.model,
        request.recipe,
        weights=False,
        parts=checked.parts,
        keep_nvfp4=request.keep_nvfp4,
        dtype=request.dtype,
    )
    note_source(job, report)
    if request.keep_nvfp4:
        _note_nvfp4(job, report)
    note_side_files(job, report)
    checked.target.check(job.source.path)

    # A size that no choice of layers has is refused before anything is measured.
    space = search_space(job.inventory, job.recipe, checked.overrides, request.ignore_guards)
    fit = _fit(checked, job, report)
    budget = checked.budget
    if fit is not None:
        budget = Budget(f"fit {request.fit}, context {request.context}", bytes=fit.budget)
    if budget is not None:
        _check_budget(budget, space, fit, request, job, report)
    fixed_plan = _fixed_plan(checked, job, space, report)

    # What is said here saves a wait for something that won't come.
    if request.low_disk and job.source.has_weights:
        report.note("the weights are here already: --low-disk has no effect")
    no_sentence = why_no_sentence(job.source.path)
    if no_sentence is not None:
        report.note(f"{no_sentence}: no sentence is generated")

    # Whether the model is run decides which options have a meaning.
    quantizer = find_quantizer(checked.quantizer)
    effort = EFFORTS[checked.effort]
    objective = (
        request.objective or job.recipe.objective or effort.objective_for(quantizer.needs_inputs)
    )
    weighs_errors = fixed_plan is None and needs_sensitivity(objective)
    runs_model = quantizer.needs_inputs or weighs_errors
    _check_model_use(request, runs_model)
    return Order(
        checked=checked,
        job=job,
        space=space,
        budget=budget,
        fit=fit,
        fixed_plan=fixed_plan,
        objective=objective,
        sample=checked.sample or default_sample(),
        runs_model=runs_model,
        tokens=request.tokens or effort.tokens,
        sensitivity=_sensitivity(checked, job, objective, fixed_plan, runs_model),
        can_generate=no_sentence is None,
        pace=pace_of(job, request.speed_table, request.context, checked.goal),
        wish=_wish(request, job, runs_model),
    )


def _note_nvfp4(job: Job, report: Report) -> None:
    """Say what --keep-nvfp4 has kept, and where that can be run."""
    stored = [layer.stored for layer in job.inventory.layers]
    if any(config is not None and config.global_scale for config in stored):
        report.note("experts that stay in NVFP4 have a number each, which MLX runs on a GPU only")
    else:
        report.note("no layer holds NVFP4 that mlx-lm could run as it is: it is dequantized")


def _fit(checked: CheckedRequest, job: Job, report: Report) -> Fit | None:
    """What --fit leaves for the weights."""
    request = checked.request
    if checked.machine is None:
        return None
    wanted = needs(job.source.config, job.inventory, request.context, request.kv_bits)

    # A quantized cache can cost more than it saves, which nobody would guess.
    if request.kv_bits is not None:
        plain = needs(job.source.config, job.inventory, request.context)
        if plain.total < wanted.total:
            report.note(
                "MLX reads a quantized cache without its fused attention, and the scores take more "
                f"than it saves: without --kv-bits {both(wanted.total - plain.total)} more remain"
            )
    return fit(checked.machine, wanted)


def _check_budget(
    budget: Budget, space: SearchSpace, fit: Fit | None, request: Request, job: Job, report: Report
) -> None:
    """Refuse a size below the smallest, and warn of one that this machine can't run."""
    limit = budget.resolve(space.inventory.parameters)
    if limit is None:
        return
    options = list_candidates(space)
    why = f" (it is what --fit {request.fit} leaves: a shorter --context leaves more)"
    largest = size_range(space.inventory, options)[1]
    if fit is None:
        why = ""
        _warn_of_size(min(limit, largest), job, request, report)
    if limit > largest:
        report.note(
            f"{both(limit)} are more than the largest size of this model: the result has "
            f"{both(largest)}"
        )
    check_feasible(limit, space.inventory, options, why)


def _fixed_plan(
    checked: CheckedRequest, job: Job, space: SearchSpace, report: Report
) -> Plan | None:
    """The plan, where nothing is left to choose: the one that was given, or a uniform one."""
    if checked.plan is not None:
        plan = _given_plan(checked.plan, job, space, report)
        # The loss is that of the rounding that the plan was made for.
        if checked.quantizer != plan.quantizer:
            plan = replace(plan, loss=None, gap=None)
    elif checked.uniform is not None:
        plan = uniform(
            job.source, job.inventory, checked.uniform, space.forced, space.ignore_guards
        )
        plan = replace(plan, parts=checked.parts)
    elif checked.request.dequantize:
        plan = dequantized(job.source, job.inventory, space.forced)
        plan = replace(plan, parts=checked.parts)
    else:
        return None
    _warn_of_size(plan.layout(job.inventory).total, job, checked.request, report)
    return plan


def _given_plan(plan: Plan, job: Job, space: SearchSpace, report: Report) -> Plan:
    """A plan as one of this source; weights of another structure fail on the plan's layers."""
    source = job.source
    if not plan.origin.matches(source.origin):
        report.note(
            f"the plan was made from other weights ({plan.origin.source or 'unnamed'}) than "
            f"{source.name}: its sizes hold, its errors may not; `mint-mlx profile` and `allocate` "
            "make a fresh one"
        )
        plan = replace(plan, loss=None, gap=None, errors={})
    check_plan(plan, job.inventory, space.ignore_guards)
    total = plan.layout(job.inventory).total
    if plan.first_budget is not None and total > plan.first_budget:
        report.note(
            f"the edited plan makes {both(total)}, more than the budget of "
            f"{both(plan.first_budget)} that it was made for"
        )
    return replace(plan, origin=source.origin, versions=versions())


def _check_model_use(request: Request, runs_model: bool) -> None:
    """Refuse options that contradict whether the model is run (a UsageError)."""
    if request.allow_nonfinite and runs_model:
        raise UsageError(
            "--allow-nonfinite goes with --effort fast: a model with such weights can't be run"
        )
    if request.low_disk and runs_model:
        raise UsageError(
            "--low-disk goes with --effort fast, or with a plan and --quantizer rtn: the model is "
            "not run then"
        )
    twin = "--twin" if request.twin is not None else "--keep-twin"
    asked = request.twin is not None or request.keep_twin is not None
    if asked and not runs_model:
        raise UsageError(f"{twin} has no effect where only weights are used: leave it out")
    if asked and request.sensitivity is not None:
        raise UsageError(f"a sensitivity has its text: give either --sensitivity or {twin}")
    if request.tokens is not None and not runs_model:
        raise UsageError("--tokens has no effect where only weights are used: leave it out")


def _wish(request: Request, job: Job, runs_model: bool) -> Wish:
    """What is asked for of a twin, where the model is run."""
    if not runs_model:
        return Wish()
    return wish_of(job, request.twin, request.keep_twin, request.no_twin)


def _sensitivity(
    checked: CheckedRequest,
    job: Job,
    objective: str,
    fixed_plan: Plan | None,
    runs_model: bool,
) -> Sensitivity | None:
    """The sensitivity that a request names, else the one beside the plan that it names."""
    request = checked.request
    if request.sensitivity is None:
        # Text of another length, or a plan without a place, has no sensitivity beside it.
        if not runs_model or request.tokens is not None:
            return None
        if not isinstance(request.plan, str | Path):
            return None
        beside = sensitivity_beside(request.plan)
        if beside is None or not beside.origin.matches(job.source.origin):
            return None
        check_sensitivity(beside, job.inventory)
        return beside

    # One that is named must be used.
    if request.tokens is not None:
        raise UsageError("a sensitivity has its tokens: give either --sensitivity or --tokens")
    if not runs_model:
        quantizer = checked.quantizer
        user = quantizer if fixed_plan else f"the objective {objective} and {quantizer}"
        raise UsageError(f"--sensitivity has no effect with {user}: leave it out")
    given = read_sensitivity(request.sensitivity)
    if not given.origin.matches(job.source.origin):
        raise MintError(
            f"the sensitivity in {request.sensitivity} is that of another model "
            f"({given.origin.source}): leave it out"
        )
    check_sensitivity(given, job.inventory)
    return given


def needs_of(job: Job, request: Request) -> Needs | None:
    """What running the model takes beside its weights; None where its cache's kind is unknown."""
    try:
        return needs(job.source.config, job.inventory, request.context, request.kv_bits)
    except MintError:
        if request.kv_bits is not None:
            raise
        return None


def _warn_of_size(size: int, job: Job, request: Request, report: Report) -> None:
    """Say so where a size is more than this machine can run."""
    running = needs_of(job, request)
    beside = running.total if running else 0
    limit, _ = machine_limit()
    if size + beside > limit:
        report.note(
            f"{both(size)} and a context of {request.context} tokens ({both(beside)}) are more "
            f"than this machine can run ({both(limit)}): `--fit this-mac` finds what it can"
        )


def default_target(job: Job, plan: Plan) -> Path:
    """`NAME-mint-4.5bpw` in the current folder."""
    bits = plan.layout(job.inventory).total * 8 / job.inventory.parameters
    name = job.source.name.rpartition("/")[2]
    return Path(f"{name}-mint-{f'{bits:.2f}'.rstrip('0').rstrip('.')}bpw")
