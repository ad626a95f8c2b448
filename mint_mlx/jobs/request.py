"""A request as a user words it, checked once and read into typed values.

    Request (words) -> check_request -> CheckedRequest -> order.place_order -> Order

What words alone can get wrong is refused here, before MLX is imported, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..allocation.artifacts import find_artifact
from ..allocation.pace import Goal, parse_goal
from ..allocation.plan import Plan
from ..allocation.plan_file import read_plan
from ..allocation.search_space import Override, parse_override
from ..base.distributed import ranks
from ..base.errors import UsageError
from ..base.files import PLAN_FILE
from ..base.folders import is_checkpoint
from ..base.hf_config import HALVES
from ..base.quant_config import KEEP, QuantConfig, parse_config
from ..base.targets import check_target
from ..base.units import Budget, parse_budget
from ..checkpoint.hub import parse_repo
from ..checkpoint.towers import check_parts
from ..converters.quantizers.registry import BASELINE, find_quantizer
from ..measure.sample import Sample, parse_sample
from ..rules.efforts import EFFORTS, check_tokens, effort_name
from ..rules.objectives import find_objective
from ..runtime.machine import CONTEXT, Machine, check_context, parse_machine
from ..runtime.table_names import check_table_name


@dataclass(frozen=True)
class Request:
    """What a user asks for, in words.

    Exactly one of `budget`, `fit`, `plan`, `uniform` and `dequantize` says how to quantize.

    Attributes:
        model: a folder or a Hub id.
        budget: `19GB`, `17.5GiB`, `4.5bpw`, `smallest`, ...
        fit: `this-mac` or a memory size such as `32GiB` or `32`: the largest size that such a
            machine runs.
        context: tokens of the context that the cache must hold.
        kv_bits: bits of a quantized cache, or None.
        plan: a plan, its file, or a checkpoint or repository that holds one; carried out as it is.
        uniform: the same configuration for every layer, such as `4bit-g64`.
        out: the folder to write, `NAME-mint-4.5bpw` by default.
        parts: `text`, `mtp`, `mtp-8bit` or `all`; what the plan says, else `text`, by default.
        recipe: a recipe's name or file.
        objective: a name of objectives.OBJECTIVES.
        effort: a name of efforts.EFFORTS: the objective and the quantizer where they aren't given.
        quantizer: a name of registry.QUANTIZERS.
        sensitivity: a sensitivity's file, or a checkpoint or repository that holds one; measured by
            default.
        tokens: how much text of its own the model writes; what the effort says by default.
        overrides: `REGEX=CONFIG`, later ones win.
        ignore_guards: allow what the guards forbid.
        force: replace a checkpoint of ours at `out`, and unfinished work of another kind.
        sample: how much of each layer the profile measures (measure/sample.py).
        allow_nonfinite: take NaN and infinite weights as they are.
        low_disk: fetch a Hub model shard by shard (checkpoint/low_disk.py).
        card_name: the result's name in its model card, the folder's by default.
        keep_nvfp4: leave experts of NVFP4 packed, which no CPU runs.
        dequantize: write every layer in 16 bits.
        dtype: `float16` or `bfloat16`, of all 16-bit tensors; what the model states by default.
        base_model: the Hub's name of a model that is given as a folder, for the card; what its own
            card tells by default.
        measurements: write profile and sensitivity beside the weights.
        min_speed: tokens per second that the result must be predicted to decode at a context of
            `context`, or None.
        speed: the same as a multiple of uniform 4bit-g64's, such as `0.95x`.
        speed_table: of the machine that speeds are predicted for: a file, or an Apple chip; this
            machine's by default.
        twin: an MLX checkpoint of the same model, which writes the text in its place (twin.py).
        keep_twin: the folder for a twin that is written for that, and stays.
        no_twin: the model writes its text itself, also where it doesn't fit in memory.
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
    card_name: str | None = None
    keep_nvfp4: bool = False
    dequantize: bool = False
    dtype: str | None = None
    base_model: str | None = None
    measurements: bool = True
    min_speed: float | None = None
    speed: str | None = None
    speed_table: str | None = None
    twin: str | None = None
    keep_twin: str | Path | None = None
    no_twin: bool = False


@dataclass(frozen=True)
class Target:
    """Where a result goes.

    Attributes:
        folder: None where it gets a name of the model and its size, once that is known.
        force: replace a checkpoint of ours there, and unfinished work of another kind.
        card_name: the result's name in its model card; the folder's by default.
    """

    folder: Path | None
    force: bool
    card_name: str | None

    def check(self, source: Path | None = None) -> None:
        """Refuse a folder that can't be written to, or that holds the source (a MintError)."""
        if self.folder is not None:
            check_target(self.folder, source, self.force)


@dataclass(frozen=True)
class CheckedRequest:
    """A request whose words are right; whether its model can have it is for `place_order`.

    Attributes:
        request: the words; those that need no reading (switches, counts, places) are used from it.
        budget: the size, where one is given.
        machine: the machine to fit, where one is given.
        uniform: the configuration of all layers, where one is given.
        plan: the plan to carry out, where one is given.
        overrides: in the order given.
        effort: a name of EFFORTS; that of the plan, where one is given.
        quantizer: a name of QUANTIZERS.
        parts: `text`, `mtp`, `mtp-8bit` or `all`.
        sample: None where it follows from the device.
        target: where the result goes.
        goal: the least speed, where one is given.
    """

    request: Request
    budget: Budget | None
    machine: Machine | None
    uniform: QuantConfig | None
    plan: Plan | None
    overrides: tuple[Override, ...]
    effort: str
    quantizer: str
    parts: str
    sample: Sample | None
    target: Target
    goal: Goal | None = None


def check_request(request: Request) -> CheckedRequest:
    """Read a request's words, and refuse those that are wrong or contradict each other.

    Raises:
        MintError: for what is wrong; nothing but a plan's file is read for it.
    """
    # What contradicts itself has no meaning to check further.
    ways = (request.budget, request.fit, request.plan, request.uniform)
    if sum(way is not None for way in ways) + request.dequantize != 1:
        raise UsageError("give exactly one of --budget, --fit, --plan, --uniform and --dequantize")
    check_context(request.context, request.kv_bits)
    budget = parse_budget(request.budget) if request.budget is not None else None
    machine = parse_machine(request.fit) if request.fit is not None else None
    uniform = parse_config(request.uniform) if request.uniform is not None else None
    if uniform is not None and uniform.global_scale:
        raise UsageError(
            f"mint-mlx makes no codes of {uniform}: --keep-nvfp4 leaves those that a source holds"
        )
    if request.dtype not in (None, *HALVES):
        raise UsageError(f"--dtype must be {' or '.join(HALVES)} (got {request.dtype})")
    if request.base_model is not None and parse_repo(request.base_model) is None:
        raise UsageError(f"--base-model must be org/name (got {request.base_model})")
    overrides = tuple(parse_override(text) for text in request.overrides)
    goal = _goal(request)
    _check_choice_is_free(request, uniform)
    effort = effort_name(request.effort)
    if request.objective is not None:
        find_objective(request.objective)

    # A plan brings its own effort, quantizer and parts.
    plan = _read_plan(request.plan)
    plain = uniform is not None or request.dequantize
    quantizer = BASELINE if plain else _quantizer_of(effort)
    if plan is not None:
        effort = effort_name(plan.effort)
        quantizer = plan.quantizer
    quantizer = request.quantizer or quantizer
    _check_quantizer(quantizer)

    target = Target(
        Path(request.out) if request.out is not None else None, request.force, request.card_name
    )
    target.check()
    sample = parse_sample(request.sample) if request.sample is not None else None
    check_tokens(request.tokens)
    check_twin(request.twin, request.keep_twin, request.no_twin, target.folder)
    parts = _parts(request.parts, plan)
    return CheckedRequest(
        request,
        budget,
        machine,
        uniform,
        plan,
        overrides,
        effort,
        quantizer,
        parts,
        sample,
        target,
        goal,
    )


def check_twin(
    twin: str | None, keep: str | Path | None, never: bool, out: Path | None = None
) -> None:
    """Refuse what is asked for of a twin where it contradicts itself (a MintError).

    Args:
        twin: a checkpoint that serves as one.
        keep: the folder in which one is to be kept.
        never: none is used.
        out: the folder of the result.
    """
    if (twin is not None) + (keep is not None) + never > 1:
        raise UsageError("give at most one of --twin, --keep-twin and --no-twin")
    if keep is None:
        return
    if out is not None and Path(keep).absolute() == out.absolute():
        raise UsageError(f"--keep-twin and -o name the same folder {out}: give two")
    if not Path(keep).exists():
        check_target(Path(keep), None, force=False, option="--keep-twin")
    elif not is_checkpoint(Path(keep)):
        raise UsageError(
            f"{keep} exists already and is no twin: choose another folder with --keep-twin"
        )
    if ranks().size > 1:
        raise UsageError(
            "several machines write no twin: write one with --effort fast, and give it with --twin"
        )


def _goal(request: Request) -> Goal | None:
    """The least speed that is asked for (a UsageError where it can't be one)."""
    goal = parse_goal(request.min_speed, request.speed)
    check_table_name(request.speed_table)
    chosen = request.budget not in (None, "smallest") or request.fit is not None
    if goal is not None and not chosen:
        raise UsageError("--min-speed and --speed go with a size: give --budget 4.5bpw or --fit")
    return goal


def _check_choice_is_free(request: Request, uniform: QuantConfig | None) -> None:
    """Refuse what steers a choice of layers where none is left to make (a UsageError)."""
    if request.plan is not None and (request.overrides or request.objective or request.effort):
        raise UsageError(
            "a plan is carried out as it is: edit it instead of giving --override, --objective or "
            "--effort"
        )
    uniform = KEEP if request.dequantize else uniform
    if request.dequantize and request.keep_nvfp4:
        raise UsageError("--dequantize leaves nothing packed: leave --keep-nvfp4 out")
    chosen = request.plan is not None or uniform is not None
    if chosen and (request.recipe is not None or request.sample is not None):
        raise UsageError(
            "--recipe and --sample only have an effect with --budget or --fit: leave them out"
        )
    if uniform is not None and (request.objective or request.effort not in (None, "fast")):
        raise UsageError(
            "--uniform and --dequantize choose for themselves: leave --objective and --effort out "
            "(--quantizer says how it is rounded)"
        )


def _read_plan(plan: str | Path | Plan | None) -> Plan | None:
    """The plan itself, read from where it is."""
    if plan is None or isinstance(plan, Plan):
        return plan
    return read_plan(find_artifact(plan, PLAN_FILE))


def _quantizer_of(effort: str) -> str:
    """A level's quantizer, or the one that several machines take in its place."""
    name = EFFORTS[effort].quantizer
    return find_quantizer(name).shared or name if ranks().size > 1 else name


def _check_quantizer(name: str) -> None:
    """Refuse an unknown quantizer, or one that several machines can't share (a UsageError)."""
    entry = find_quantizer(name)
    if entry.sequential and ranks().size > 1:
        instead = f"--quantizer {entry.shared}" if entry.shared else "--effort balanced"
        raise UsageError(
            f"{name} goes from block to block, which machines can't share: give {instead}"
        )


def _parts(parts: str | None, plan: Plan | None) -> str:
    """Which parts of the model are written: what is asked for, else what the plan was made for."""
    chosen = parts or (plan.parts if plan else "text")
    check_parts(chosen)
    if plan is not None and chosen != plan.parts:
        raise UsageError(
            f"the plan was made for --parts {plan.parts}: leave --parts out, or make another plan"
        )
    return chosen
