"""What is asked for, held against what the headers tell: a request becomes an order, or is refused.

    Request -> prepare -> Job -> place_order -> Order

Everything that can be refused is refused here, before a step that costs time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..allocation.allocate import uniform
from ..allocation.artifacts import SENSITIVITY_FILE, find_artifact, sensitivity_beside
from ..allocation.plan import Plan, check_plan
from ..allocation.plan_file import read_plan
from ..allocation.search_space import (
    Override,
    SearchSpace,
    check_feasible,
    list_candidates,
    parse_override,
    search_space,
    size_range,
)
from ..base.distributed import ranks
from ..base.errors import MintError, UsageError
from ..base.files import PLAN_FILE
from ..base.quant_config import QuantConfig, parse_config
from ..base.report import Report, Silent
from ..base.targets import check_target
from ..base.units import Budget, both, parse_budget
from ..base.versions import versions
from ..checkpoint.source import Source
from ..checkpoint.tokenizer import why_no_sentence
from ..checkpoint.towers import check_parts
from ..converters.quantizers.memory_estimate import check_room, rounding
from ..converters.quantizers.registry import find_quantizer
from ..measure.sample import parse_sample
from ..measure.sensitivity import Sensitivity
from ..measure.sensitivity_file import load_sensitivity
from ..rules.efforts import EFFORTS, Effort, check_tokens, effort_name
from ..rules.objectives import find_objective, needs_sensitivity
from ..runtime.memory import CONTEXT, Fit, Needs, check_context, fit, machine_limit, needs
from .model import Job, announce, prepare


@dataclass(frozen=True)
class Request:
    """What a user asks for. Exactly one of `budget`, `fit`, `plan` and `uniform` says how to
    quantize.

    Attributes:
        model: a folder or a Hub id.
        budget: `19GB`, `17.5GiB`, `4.5bpw`, `smallest`, ...
        fit: `this-mac` or a memory size such as `32GiB`: the budget that leaves room for the cache
            (memory.py).
        context: tokens of the context that the cache must hold.
        kv_bits: bits of a quantized cache, or None.
        plan: a plan, its file, or a checkpoint or repository that keeps one; carried out as it is.
        uniform: the same configuration for every layer, such as `4bit-g64`.
        out: the folder to write, `NAME-mint-4.5bpw` by default.
        parts: `text` or `all` (parts.py); what the plan says, else `text`, by default.
        recipe: a recipe's name or file.
        objective: a name of objectives.OBJECTIVES.
        effort: a name of efforts.EFFORTS: the objective and the quantizer where they aren't given.
        quantizer: a name of converters.quantizers.registry.QUANTIZERS.
        sensitivity: a sensitivity's file, or a checkpoint or repository that keeps one; measured by
            default.
        tokens: how much text of its own the model writes; what the level says by default.
        overrides: `REGEX=CONFIG`, later ones win.
        ignore_guards: allow what the guards forbid.
        force: replace a checkpoint of ours at `out`, and unfinished work of another kind.
        sample: how much of each layer the profile measures (sample.parse_sample).
        allow_nonfinite: take NaN and infinite weights as they are.
        low_disk: fetch a Hub model shard by shard (lowdisk.py).
        called: the result's name in its model card, the folder's by default.
    """

    model: str
    budget: str | None = None
    fit: str | None = None
    context: int = CONTEXT
    kv_bits: int | None = None
    plan: str | Path | Plan | None = None
    uniform: str | None = None
    out: str | Path | None = None
    parts: str | None = None
    recipe: str | None = None
    objective: str | None = None
    effort: str | None = None
    quantizer: str | None = None
    sensitivity: str | Path | None = None
    tokens: int | None = None
    overrides: Sequence[str] = ()
    ignore_guards: bool = False
    force: bool = False
    sample: str | None = None
    allow_nonfinite: bool = False
    low_disk: bool = False
    called: str | None = None


@dataclass(frozen=True)
class Order:
    """A request that was found possible, as far as headers tell.

    Attributes:
        tokens: how many the model writes, where a sensitivity is measured.
        runs: whether the model is run on them.
        sensitivity: the one that was given.
        speaks: whether the result can be asked for a sentence.
    """

    request: Request
    job: Job
    budget: Budget | None
    fit: Fit | None
    objective: str
    quantizer: str
    tokens: int
    space: SearchSpace
    fixed: Plan | None
    runs: bool
    sensitivity: Sensitivity | None = None
    speaks: bool = True

    @property
    def peak(self) -> int:
        """Bytes of memory that carrying it out takes."""
        return find_quantizer(self.quantizer).memory(self.job.inventory, self.tokens, self.runs)

    def check_memory(self) -> None:
        """Refuse what takes more memory than this machine has (a MintError)."""
        least = rounding(self.job.inventory, self.tokens, False)
        check_room(
            self.peak,
            f"give --effort fast, which takes {both(least)}"
            if self.runs
            else "take a larger machine",
        )


@dataclass(frozen=True)
class _Asked:
    """What a request says by itself, whatever its model is."""

    budget: Budget | None
    config: QuantConfig | None
    overrides: list[Override]
    given: Plan | None
    effort: Effort
    quantizer: str
    parts: str


def _read(request: Request) -> _Asked:
    """Read a request and refuse what contradicts itself (a MintError)."""
    if (
        sum(x is not None for x in (request.budget, request.fit, request.plan, request.uniform))
        != 1
    ):
        raise UsageError("give exactly one of --budget, --fit, --plan and --uniform")
    check_context(request.context, request.kv_bits)
    budget = parse_budget(request.budget) if request.budget is not None else None
    config = parse_config(request.uniform) if request.uniform is not None else None
    overrides = [parse_override(text) for text in request.overrides]
    if request.plan is not None and (overrides or request.objective or request.effort):
        raise UsageError(
            "a plan is carried out as it is: edit it instead of giving --override, --objective or "
            "--effort"
        )
    if (
        request.budget is None
        and request.fit is None
        and (request.recipe is not None or request.sample is not None)
    ):
        raise UsageError(
            "--recipe and --sample are for what is chosen under a size: leave them out"
        )
    if config is not None and (request.objective or request.effort not in (None, "fast")):
        raise UsageError(
            "--uniform chooses for itself: leave --objective and --effort out (--quantizer says "
            "how it is rounded)"
        )
    effort = EFFORTS[effort_name(request.effort)]
    if request.objective is not None:
        find_objective(request.objective)
    given = request.plan
    if given is not None and not isinstance(given, Plan):
        given = read_plan(find_artifact(given, PLAN_FILE))
    if given is not None:
        effort = EFFORTS[effort_name(given.effort)]
    quantizer = request.quantizer or (
        given.quantizer if given else EFFORTS["fast"].quantizer if config else effort.quantizer
    )
    if find_quantizer(quantizer).sequential and ranks().size > 1:
        raise UsageError(
            "learning goes from block to block, which machines can't share: give --effort balanced"
        )
    if request.out is not None:
        check_target(Path(request.out), None, request.force)
    parse_sample(request.sample)
    parts = request.parts or (given.parts if given else "text")
    check_parts(parts)
    if given is not None and parts != given.parts:
        raise UsageError(
            f"the plan was made for --parts {given.parts}: leave --parts out, or make another plan"
        )
    return _Asked(budget, config, overrides, given, effort, quantizer, parts)


def place_order(request: Request, report: Report | None = None) -> Order:
    """Check all that a request says, from headers alone.

    Raises:
        MintError: for everything that is wrong with it.
    """
    report = report or Silent()
    asked = _read(request)
    job = prepare(request.model, request.recipe, weights=False, parts=asked.parts)
    source, inventory = job.source, job.inventory
    announce(job, report)
    if request.out is not None:
        check_target(Path(request.out), source.path, request.force)
    space = search_space(inventory, job.recipe, asked.overrides, request.ignore_guards)
    options = list_candidates(space)
    budget, room = asked.budget, _room(request, job, report)
    if room is not None:
        budget = Budget(f"fit {request.fit}, context {request.context}", bytes=room.budget)
    if budget is not None and (limit := budget.resolve(inventory.parameters)) is not None:
        why = ""
        if room is None:
            _warn_of_size(min(limit, size_range(inventory, options)[1]), job, request, report)
        else:
            why = f" (it is what --fit {request.fit} leaves: a shorter --context leaves more)"
        check_feasible(limit, inventory, options, why)
    fixed = _fixed(asked, request, job, space, report)
    if request.low_disk and source.has_weights:
        report.note("the weights are here already: --low-disk has nothing to fetch")
    silent = why_no_sentence(source.path)
    if silent is not None:
        report.note(f"{silent}: no sentence is generated")
    entry = find_quantizer(asked.quantizer)
    objective = (
        request.objective or job.recipe.objective or asked.effort.objective_for(entry.needs_inputs)
    )
    runs = entry.needs_inputs or (fixed is None and needs_sensitivity(objective))
    if request.allow_nonfinite and runs:
        raise UsageError(
            "--allow-nonfinite goes with --effort fast: a model with such weights can't be run"
        )
    if request.low_disk and runs:
        raise UsageError(
            "--low-disk goes with --effort fast, or with a plan and --quantizer rtn: nothing is "
            "run then"
        )
    if request.tokens is not None and not runs:
        raise UsageError("--tokens is of no use where only weights are looked at: leave it out")
    check_tokens(request.tokens)
    return Order(
        request,
        job,
        budget,
        room,
        objective,
        asked.quantizer,
        request.tokens or asked.effort.tokens,
        space,
        fixed,
        runs,
        _given_sensitivity(
            request, source, objective if fixed is None else None, asked.quantizer, runs
        ),
        silent is None,
    )


def _room(request: Request, job: Job, report: Report) -> Fit | None:
    """What --fit leaves for the weights."""
    if request.fit is None:
        return None
    wanted = needs(job.source.config, job.inventory, request.context, request.kv_bits)
    plain = (
        wanted
        if request.kv_bits is None
        else needs(job.source.config, job.inventory, request.context)
    )
    if plain.total < wanted.total:
        report.note(
            "MLX reads a quantized cache without its fused attention, and the scores take more "
            f"than it saves: without --kv-bits {both(wanted.total - plain.total)} more are left"
        )
    return fit(request.fit, wanted)


def _fixed(
    asked: _Asked, request: Request, job: Job, space: SearchSpace, report: Report
) -> Plan | None:
    """The plan, where nothing is left to choose: the one that was given, or a uniform one."""
    source, inventory = job.source, job.inventory
    if asked.given is not None:
        _check_source(asked.given, source, report)
        check_plan(asked.given, inventory, request.ignore_guards)
        fixed = replace(
            asked.given,
            origin=source.origin,
            versions=versions(),
        )
        if request.quantizer not in (
            None,
            fixed.quantizer,
        ):  # the loss was that of another rounding
            fixed = replace(fixed, loss=None, gap=None)
    elif asked.config is not None:
        fixed = replace(
            uniform(source, inventory, asked.config, space.forced, space.ignore_guards),
            parts=asked.parts,
        )
    else:
        return None
    _warn_of_size(fixed.layout(inventory).total, job, request, report)
    return fixed


def _given_sensitivity(
    request: Request, source: Source, objective: str | None, quantizer: str, runs: bool
) -> Sensitivity | None:
    """The sensitivity that a request names, else the one kept beside the plan that it names.

    `objective`: where a plan is to be chosen.
    """
    if request.sensitivity is None:
        if not runs or request.tokens is not None or not isinstance(request.plan, str | Path):
            return None
        found = sensitivity_beside(request.plan)
        return found if found and found.origin.matches(source.origin) else None
    if request.tokens is not None:
        raise UsageError("a sensitivity has its tokens: give either --sensitivity or --tokens")
    if not runs:
        what = quantizer if objective is None else f"the objective {objective} and {quantizer}"
        raise UsageError(f"--sensitivity is of no use for {what}: leave it out")
    sensitivity = load_sensitivity(find_artifact(request.sensitivity, SENSITIVITY_FILE))
    if not sensitivity.origin.matches(source.origin):
        raise MintError(
            f"the sensitivity in {request.sensitivity} is that of another model "
            f"({sensitivity.origin.source}): leave it out"
        )
    return sensitivity


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
    found = needs_of(job, request)
    beside = found.total if found else 0
    most, _ = machine_limit()
    if size + beside > most:
        report.note(
            f"{both(size)} and a context of {request.context} tokens ({both(beside)}) are more "
            f"than this machine can run ({both(most)}): `--fit this-mac` finds what it can"
        )


def _check_source(plan: Plan, source: Source, report: Report) -> None:
    """Say so where a plan was made from other weights than these (another structure fails on its
    layers).
    """
    if not plan.origin.matches(source.origin):
        report.note(
            f"the plan was made from other weights ({plan.origin.source or 'unnamed'}) than "
            f"{source.name}: its sizes hold, its errors may not; `mint-mlx profile` and `allocate` "
            "make a fresh one"
        )


def default_target(job: Job, plan: Plan) -> Path:
    """`NAME-mint-4.5bpw` in the current folder."""
    bits = plan.layout(job.inventory).total * 8 / job.inventory.parameters
    name = job.source.name.rpartition("/")[2]
    return Path(f"{name}-mint-{f'{bits:.2f}'.rstrip('0').rstrip('.')}bpw")
