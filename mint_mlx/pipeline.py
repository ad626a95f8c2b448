"""The main job: a checkpoint and a budget in, a verified mixed-precision checkpoint out.

    prepare -> get_profile -> allocate (or a given plan) -> write

Everything that can be refused is refused before the step that costs time: shapes and sizes come from headers alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import cache, mlxlm
from .allocate import Override, allocate, apply_overrides, check_feasible, list_candidates, parse_override, uniform
from .errors import MintError, UsageError
from .layers import Inventory, list_layers
from .load import Source, load_source, open_model
from .memory import fits_here
from .plan import Plan, check_plan, read_plan
from .profile import Profile, profile
from .quant import QuantConfig, parse_config
from .recipes import Recipe, find_recipe
from .report import Report, Silent
from .units import Budget, both, human, parse_budget
from .versions import versions


@dataclass(frozen=True)
class Job:
    """A source with everything that its headers tell."""

    source: Source
    inventory: Inventory
    recipe: Recipe


@dataclass(frozen=True)
class Result:
    """A finished conversion."""

    path: Path
    plan: Plan
    inventory: Inventory
    bytes: int
    active_bytes: int
    active_ratio: float
    sentence: str | None
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        return self.bytes * 8 / self.inventory.parameters


def prepare(model: str, recipe: str | None = None, weights: bool = True) -> Job:
    """Find a model and take stock of its layers, from headers alone (and no download unless `weights`).

    Raises:
        MintError: no such model or recipe, or one that mlx-lm can't build.
    """
    source = load_source(model, weights=weights)
    chosen = find_recipe(recipe, source.config)
    return Job(source, list_layers(open_model(source), source.config), chosen)


def refuse_quantized(job: Job) -> None:
    """Refuse a source that is quantized already.

    Raises:
        MintError: naming the first such layer.
    """
    stored = [layer for layer in job.inventory.layers if layer.stored]
    if stored:
        raise MintError(
            f"{job.source.name} is quantized already ({stored[0].path} is {stored[0].stored}): give the original "
            "checkpoint in bf16, fp16 or fp32"
        )


def get_profile(job: Job, report: Report | None = None) -> Profile:
    """The source's profile: from the cache, else measured and kept there."""
    report = report or Silent()
    wanted = profile_candidates(job)
    found = cache.cached_profile(job.source, wanted)
    if found is not None:
        return found
    report.stage("profile")
    made = profile(job.source, job.inventory, wanted, job.recipe.name, report.step)
    cache.keep_profile(made, job.source, wanted)
    return made


def profile_candidates(job: Job) -> dict[str, tuple[QuantConfig, ...]]:
    """What a profile measures: all that the recipe names, guards aside, so that it serves overrides too."""
    return list_candidates(job.inventory, job.recipe, ignore_guards=True)


def make_plan(
    job: Job,
    budget: Budget,
    objective: str | None = None,
    overrides: Sequence[Override] = (),
    ignore_guards: bool = False,
    report: Report | None = None,
) -> Plan:
    """Profile (or find the profile of) a source and allocate the budget; impossible budgets are refused first.

    Raises:
        MintError: see allocate.allocate.
    """
    forced = apply_overrides(overrides, job.inventory, ignore_guards)
    limit = budget.resolve(job.inventory.parameters)
    if limit is not None:
        check_feasible(limit, job.inventory, list_candidates(job.inventory, job.recipe, forced, ignore_guards))
    if not job.source.has_weights:
        raise MintError(f"{job.source.name} has not been downloaded: its profile cannot be measured")
    curves = get_profile(job, report)
    return allocate(curves, budget, job.recipe, objective, overrides, ignore_guards)


def convert(
    model: str,
    budget: str | None = None,
    out: str | Path | None = None,
    *,
    plan: str | Path | Plan | None = None,
    uniform_config: str | None = None,
    recipe: str | None = None,
    objective: str | None = None,
    quantizer: str | None = None,
    overrides: Sequence[str] = (),
    ignore_guards: bool = False,
    force: bool = False,
    smoke: bool = True,
    report: Report | None = None,
) -> Result:
    """Convert a checkpoint. Exactly one of `budget`, `plan` and `uniform_config` says how.

    Args:
        model: a folder or a Hub id.
        budget: `19GB`, `17.5GiB`, `4.5bpw`, `smallest`, ...
        out: the folder to write, `NAME-mint-4.5bpw` by default.
        plan: a plan or its file, carried out as it is.
        uniform_config: the same configuration for every layer, such as `4bit-g64`.
        recipe: a recipe's name or file.
        objective: a name of objectives.OBJECTIVES.
        quantizer: a name of converters.quantizers.QUANTIZERS.
        overrides: `REGEX=CONFIG`, later ones win.
        ignore_guards: allow what the guards forbid.
        force: replace an existing output folder, and unfinished work of another kind.
        smoke: end with a sentence from the result, where it fits in memory.
        report: receives progress.

    Raises:
        MintError: for everything that is wrong with the input; nothing that looks like a result is left then.
    """
    from .converters import checkpoint

    report = report or Silent()
    started = time.monotonic()
    if sum(x is not None for x in (budget, plan, uniform_config)) != 1:
        raise UsageError("give exactly one of --budget, --plan and --uniform")
    size = parse_budget(budget) if budget is not None else None
    parsed = [parse_override(text) for text in overrides]
    if plan is not None and parsed:
        raise UsageError("a plan is carried out as it is: edit it instead of giving --override")
    given = plan if plan is None or isinstance(plan, Plan) else read_plan(Path(plan))
    fixed = parse_config(uniform_config) if uniform_config is not None else None
    if out is not None:
        check_target(Path(out), force)
    job = prepare(model, recipe, weights=False)
    refuse_quantized(job)
    if size is not None and (limit := size.resolve(job.inventory.parameters)) is not None:
        forced = apply_overrides(parsed, job.inventory, ignore_guards)
        check_feasible(limit, job.inventory, list_candidates(job.inventory, job.recipe, forced, ignore_guards))
    if given is not None:
        check_source(given, job.source, report)
        check_plan(given, job.inventory, ignore_guards)
    if not mlxlm.has_tokenizer(job.source.path):
        raise MintError(
            f"{job.source.name} has no tokenizer (tokenizer.json or tokenizer.model): add the original's files, since "
            "no program could use the result without them"
        )
    if not job.source.has_weights:
        report.stage("download")
        job = replace(job, source=load_source(model))
    if given is not None:
        chosen = replace(given, versions=versions())
    elif fixed is not None:
        chosen = uniform(job.source, job.inventory, fixed, parsed, ignore_guards)
    else:
        assert size is not None
        chosen = make_plan(job, size, objective, parsed, ignore_guards, report)
    if quantizer is not None:
        chosen = replace(chosen, quantizer=quantizer)
    target = Path(out) if out is not None else default_target(job, chosen)
    check_target(target, force)
    total = checkpoint.write(job.source, job.inventory, chosen, target, force, report)
    sentence = None
    if smoke and fits_here(total):
        report.stage("generate")
        sentence = mlxlm.generate_sentence(target)
    active = job.inventory.active_bytes(chosen.choice)
    return Result(
        target, chosen, job.inventory, total, active, active_ratio(job, chosen), sentence, time.monotonic() - started
    )


def active_ratio(job: Job, plan: Plan) -> float:
    """Bytes that a decoded token reads, relative to uniform 4bit-g64: decode speed follows it inversely.

    Rows that groups of 64 don't divide are counted at 4bit-g32 there, so that the ratio compares like with like.
    """
    reference = dict(uniform(job.source, job.inventory, QuantConfig(4, 64)).choice)
    for layer in job.inventory.layers:
        fallback = QuantConfig(4, 32)
        if not reference[layer.path].quantized and not layer.objection(fallback) and fallback.divides(layer.shape[-1]):
            reference[layer.path] = fallback
    return job.inventory.active_bytes(plan.choice) / job.inventory.active_bytes(reference)


def check_source(plan: Plan, source: Source, report: Report) -> None:
    """Say so where a plan was made from other weights than these (another structure fails on its layers)."""
    if plan.content and (plan.structure, plan.content) != (source.structure, source.content):
        report.note(
            f"the plan was made from other weights ({plan.source or 'unnamed'}) than {source.name}: its sizes hold, "
            "its errors may not; `mint-mlx profile` and `allocate` make a fresh one"
        )


def default_target(job: Job, plan: Plan) -> Path:
    """`NAME-mint-4.5bpw` in the current folder."""
    bits = plan.layout(job.inventory).total * 8 / job.inventory.parameters
    name = job.source.name.rpartition("/")[2]
    return Path(f"{name}-mint-{f'{bits:.2f}'.rstrip('0').rstrip('.')}bpw")


def check_target(target: Path, force: bool) -> None:
    """Refuse to overwrite.

    Raises:
        MintError: the target exists and `force` isn't given, or its parent folder is missing.
    """
    if target.exists() and not force:
        raise MintError(f"{target} exists already: choose another folder with -o, or replace it with --force")
    if target.exists() and not target.is_dir():
        raise MintError(f"{target} is a file: choose another folder with -o")
    if not target.resolve().parent.is_dir():
        raise MintError(f"the folder {target.resolve().parent} does not exist: make it, or choose another with -o")


def summary(result: Result) -> dict[str, Any]:
    """A finished conversion as one JSON object."""
    plan = result.plan
    return {
        "path": str(result.path),
        "source": plan.source,
        "revision": plan.revision,
        "bytes": result.bytes,
        "budget_bytes": plan.budget_bytes,
        "bits_per_weight": round(result.bits_per_weight, 4),
        "parameters": result.inventory.parameters,
        "active_bytes": result.active_bytes,
        "active_bytes_ratio": round(result.active_ratio, 4),
        "recipe": plan.recipe,
        "objective": plan.objective,
        "quantizer": plan.quantizer,
        "loss": plan.loss,
        "gap": plan.gap,
        "sentence": result.sentence,
        "seconds": round(result.seconds, 2),
    }


def describe(result: Result) -> str:
    """A finished conversion in one line."""
    return (
        f"{result.path}: {both(result.bytes)}, {result.bits_per_weight:.2f} bits per weight; decoding reads "
        f"{human(result.active_bytes)} a token, {result.active_ratio:.2f}x of uniform 4bit-g64"
    )
