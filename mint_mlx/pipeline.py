"""The main job: a checkpoint and a budget in, a verified mixed-precision checkpoint out.

Order -> (download, profile) -> allocate, or a given plan -> write
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import begun, cache, efforts, mlxlm
from .allocate import allocate, list_candidates, parse_override
from .efforts import effort_name
from .errors import MintError, UsageError
from .files import REFINED_FILE, check_file, check_target, write_whole
from .kept import PROFILE_FILE, SENSITIVITY_FILE, find_kept
from .layers import Inventory
from .load import load_source
from .lowdisk import Waves, at_once, shard_by_shard
from .memory import fits_here
from .objectives import NEEDS_SENSITIVITY
from .order import Job, Order, Request, announce, default_target, place_order, prepare
from .parts import PARTS
from .peak import check_room, peak
from .plan import Plan, write_plan
from .profile import Profile, load_profile, profile, save_profile
from .quant import KEEP, QuantConfig
from .ranks import ranks
from .recipes import find_recipe
from .report import Report, Silent
from .sample import parse_sample
from .sensitivity import Sensitivity, load_sensitivity, save_sensitivity
from .uniform import active_ratio
from .units import both, human, parse_budget

if TYPE_CHECKING:
    from .refine import Refined

PROFILE_MARKER, PLAN_MARKER = "mint_mlx_profile", "mint_mlx_plan"


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


def choose_plan(
    order: Order, curves: Callable[[], Profile], weigh: Callable[[], Sensitivity | None] = lambda: None
) -> Plan:
    """The plan that carries an order out: the fixed one, or the budget allocated on a profile.

    Args:
        order: what is asked for.
        curves: gets the profile, where one is needed.
        weigh: gets the sensitivity, where the objective needs one; without one `prior` takes its place.

    Raises:
        MintError: the safety floor forbids the budget.
    """
    plan = order.fixed
    if plan is None:
        assert order.budget is not None
        job, objective = order.job, order.objective
        weights = weigh() if objective in NEEDS_SENSITIVITY else None
        if objective in NEEDS_SENSITIVITY and weights is None:
            objective = "prior"
        guards = order.request.ignore_guards
        plan = allocate(curves(), order.budget, job.recipe, objective, order.overrides, guards, weights)
        plan = replace(plan, parts=job.parts, effort=effort_name(order.request.effort))
    return replace(plan, quantizer=order.quantizer)


def get_sensitivity(
    job: Job, report: Report | None = None, count: int | None = None
) -> tuple[np.ndarray, Sensitivity] | None:
    """The model's own tokens and its sensitivity on them: from the cache, else measured and kept there.

    Args:
        job: the model.
        report: receives progress.
        count: tokens; those of the default level by default.

    Returns:
        None where the model is built in a way that can't be walked through; the report is told so.
    """
    return _measure_sensitivity(job, report, count) if ranks().size == 1 else _first_measures(job, report, count)


def _measure_sensitivity(job: Job, report: Report | None, count: int | None) -> tuple[np.ndarray, Sensitivity] | None:
    """As `get_sensitivity`, in this process."""
    from .blocks import NoChain
    from .sensitivity import check_chain, measure
    from .tokens import write_tokens

    report = report or Silent()
    count = count or efforts.EFFORTS[efforts.DEFAULT].tokens
    found = cache.cached_sensitivity(job.source, count)
    if found is not None:
        return found
    try:
        check_chain(job.source)
        report.stage("write tokens")
        first = first_token(job)
        place = cache.sensitivity_path(job.source, count)
        tokens, how = write_tokens(job.source, vocabulary(job), count, first, progress=report.step, place=place)
        report.stage("sensitivity")
        made = measure(job.source, job.inventory, tokens, how, progress=report.step, key=place.stem)
    except NoChain as error:
        report.note(f"{job.source.name} cannot be walked through ({error}): it is converted as with --effort fast")
        return None
    try:
        cache.keep_sensitivity(job.source, count, tokens, made)
        begun.clear(place)
    except OSError as error:
        report.note(f"the sensitivity could not be kept in {cache.cache_dir()} ({error.strerror}): set MINT_MLX_CACHE")
    return tokens, made


def _first_measures(job: Job, report: Report | None, count: int | None) -> tuple[np.ndarray, Sensitivity] | None:
    """The first rank's sensitivity, for all: the walk through the model is one after the other in any case."""
    with tempfile.TemporaryDirectory(prefix="mint-mlx-") as folder:
        file, data = Path(folder) / SENSITIVITY_FILE, b""
        if ranks().first:
            found = _measure_sensitivity(job, report, count)
            if found is not None:
                save_sensitivity(*found, file)
                data = file.read_bytes()
        data = ranks().gather_bytes(data)[0]
        if not data:
            return None
        file.write_bytes(data)
        return load_sensitivity(file)


def write_sensitivity(
    model: str, out: Path | None = None, report: Report | None = None, tokens: int | None = None
) -> tuple[Path, Sensitivity]:
    """Measure a model's sensitivity and write it (`NAME.sensitivity.npz` by default); `tokens` as in `Request`.

    Raises:
        MintError: the model or the file is wrong, or the model can't be walked through.
    """
    report = report or Silent()
    job = prepare(model)
    announce(job, report)
    path = out or Path(f"{job.source.name.rpartition('/')[2]}.sensitivity.npz")
    if path.exists():
        load_sensitivity(path)  # only one of ours is replaced
    if not path.absolute().parent.is_dir():
        raise MintError(f"the folder of {path} does not exist: make it first")
    check_room(peak(job.inventory, tokens or efforts.TOKENS, True, "rtn"), "take a larger machine")
    own = get_sensitivity(job, report, tokens)
    if own is None:
        raise MintError(
            f"{job.source.name} is built in a way that no sensitivity can be measured for: give --effort fast"
        )
    save_sensitivity(*own, path)
    return path, own[1]


def vocabulary(job: Job) -> int:
    """How many tokens the model knows: what its config says, or the rows of its embedding."""
    rows = next(layer.shape[0] for layer in job.inventory.layers if layer.role == "embedding")
    said = (job.source.config.get("text_config") or job.source.config).get("vocab_size")
    return min(said, rows) if type(said) is int and said > 0 else rows


def first_token(job: Job) -> int | None:
    """What a text of the model starts with, or None."""
    if mlxlm.tokenizer_is_code(job.source.path):
        return None
    ids = mlxlm.encode(mlxlm.load_tokenizer(job.source.path), "")
    return int(ids[0]) if len(ids) else None


def _can_refine(inventory: Inventory, choice: Mapping[str, QuantConfig]) -> bool:
    from .refine import bytes_needed

    return fits_here(bytes_needed(inventory, choice))


def refine_checkpoint(
    checkpoint: str,
    model: str,
    out: Path | None = None,
    steps: int | None = None,
    force: bool = False,
    report: Report | None = None,
) -> tuple[Path, Refined]:
    """Distil the scales and biases of any MLX checkpoint on text that its source wrote (refine.py): a new checkpoint.

    Raises:
        MintError: an input is wrong, the checkpoint doesn't fit in memory, or nothing was gained; nothing is written
            then.
    """
    from .converters import checkpoint as writer
    from .refine import put_refined, refine_own
    from .tokens import write_tokens

    report = report or Silent()
    given = load_source(checkpoint)
    target = out or Path(f"{given.name.rpartition('/')[2]}-refined")
    check_target(target, given.path, force)
    if not any(name.endswith(".biases") for table in given.headers.values() for name in table):
        raise MintError(f"{given.name} has no layer with scales and biases: give a quantized MLX checkpoint")
    made = prepare(checkpoint).inventory
    if not _can_refine(made, {layer.path: layer.stored or KEEP for layer in made.layers}):
        raise MintError(f"refining {given.name} takes more memory than this machine has: do it on a larger one")
    job = prepare(model)
    check_target(target, job.source.path, force)
    same = [source.config.get("text_config") or source.config for source in (given, job.source)]
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        one, two = (text.get(key) for text in same)
        if one != two:
            raise MintError(f"{given.name} was not made from {job.source.name}: their {key} is {one} and {two}")
    count = efforts.EFFORTS["best"].tokens
    known = cache.cached_sensitivity(job.source, count)
    if known is not None:
        tokens = known[0]
    else:
        report.stage("write tokens")
        tokens, _ = write_tokens(job.source, vocabulary(job), count, first_token(job), progress=report.step)
    with writer.copied(given.path, target, force) as work:
        report.stage("refine")
        found = refine_own(job.source, tokens, work, report.step, steps)
        if found is None:
            raise MintError(
                f"refining {given.name} gained nothing on text that it was not trained on: nothing was written"
            )
        put_refined(work, found.tensors)
        mlxlm.build_model(work)
        facts = {"source": job.source.name, "kl_before": found.before, "kl_after": found.after}
        write_whole(work / REFINED_FILE, json.dumps(facts, indent=2) + "\n")
    return target, found


def get_profile(
    job: Job,
    report: Report | None = None,
    sample: str | None = None,
    allow_nonfinite: bool = False,
    waves: Waves = at_once,
) -> Profile:
    """The source's profile: from the cache, else measured and kept there.

    Args:
        job: the model.
        report: receives progress.
        sample: how much of each layer is measured, for `sample.parse_sample`; an exact profile serves as well.
        allow_nonfinite: don't refuse NaN and infinite weights.
        waves: hands layers over as their shards come (lowdisk.py).
    """
    report = report or Silent()
    wanted, sample = profile_candidates(job), parse_sample(sample)
    found = cache.cached_profile(job.source, wanted, sample)
    if all(ranks().gather(found is not None)) and found is not None:
        return replace(found, recipe=job.recipe, inventory=job.inventory)
    report.stage("profile")
    place = cache.profile_path(job.source, wanted, sample)
    beside = None if allow_nonfinite else place
    made = profile(job.source, job.inventory, wanted, job.recipe, report.step, sample, allow_nonfinite, waves, beside)
    try:
        if ranks().first:
            cache.keep_profile(made, job.source, wanted)
            begun.clear(place)
    except OSError as error:  # a profile that can't be kept is measured again next time; the job goes on
        report.note(f"the profile could not be kept in {cache.cache_dir()} ({error.strerror}): set MINT_MLX_CACHE")
    return made


def write_profile(
    model: str,
    out: Path | None = None,
    recipe: str | None = None,
    parts: str = "text",
    report: Report | None = None,
    sample: str | None = None,
) -> tuple[Path, Profile]:
    """Measure a model and write its profile (`NAME.profile.json` by default); an older one of it is replaced.

    Raises:
        MintError: the model or the file is wrong.
    """
    report = report or Silent()
    if out is not None:
        check_file(out, PROFILE_MARKER, force=True)
    if parts not in PARTS:
        raise UsageError(f"--parts {parts} is unknown: there are {' and '.join(PARTS)}")
    sample = parse_sample(sample)
    job = prepare(model, recipe, parts=parts)
    announce(job, report)
    path = out or Path(f"{job.source.name.rpartition('/')[2]}.profile.json")
    check_file(path, PROFILE_MARKER, force=True)
    if path.is_file() and job.source.fingerprint not in _fingerprint(path):
        report.note(f"{path} is stale: {job.source.name} or mint-mlx has changed since; it is measured anew")
    made = get_profile(job, report, sample)
    if ranks().first:
        save_profile(made, path)
    return path, made


def _fingerprint(path: Path) -> str:
    """A profile's fingerprint, '' where it can't be read."""
    try:
        return load_profile(path).fingerprint
    except MintError:
        return ""


def plan_profile(
    path: Path | str,
    budget: str,
    out: Path | None = None,
    recipe: str | None = None,
    objective: str | None = None,
    overrides: Sequence[str] = (),
    ignore_guards: bool = False,
    force: bool = False,
    sensitivity: Path | str | None = None,
) -> tuple[Plan, Inventory]:
    """Allocate a budget on a profile's file, and write the plan where `out` says so.

    Raises:
        MintError: the profile, the budget, an override or the file is wrong.
    """
    size = parse_budget(budget)
    parsed = [parse_override(text) for text in overrides]
    if out is not None:
        check_file(out, PLAN_MARKER, force)
    curves = load_profile(find_kept(path, PROFILE_FILE))
    chosen = find_recipe(recipe, {}) if recipe is not None else curves.recipe
    weights = load_sensitivity(find_kept(sensitivity, SENSITIVITY_FILE))[1] if sensitivity is not None else None
    level = "balanced" if weights is not None else "fast"
    objective = objective or chosen.objective or efforts.EFFORTS[level].objective
    if weights is not None and objective not in NEEDS_SENSITIVITY:
        raise UsageError(f"the objective {objective} does not look at a sensitivity: leave --sensitivity out")
    plan = allocate(curves, size, chosen, objective, parsed, ignore_guards, weights)
    parts = "all" if curves.inventory.carried else "text"
    plan = replace(plan, effort=level, quantizer=efforts.EFFORTS[level].quantizer, parts=parts)
    if out is not None:
        write_plan(plan, curves.inventory, out)
    return plan, curves.inventory


def profile_candidates(job: Job) -> dict[str, tuple[QuantConfig, ...]]:
    """What a profile measures: all that the recipe names, guards aside, so that it serves overrides too."""
    return list_candidates(job.inventory, job.recipe, ignore_guards=True)


def convert(
    model: str,
    budget: str | None = None,
    out: str | Path | None = None,
    *,
    smoke: bool = True,
    report: Report | None = None,
    **more: Any,
) -> Result:
    """Convert a checkpoint.

    Args:
        model: a folder or a Hub id.
        budget: the size, unless `plan` or `uniform` is given.
        out: the folder to write.
        smoke: end with a sentence from the result, where it fits in memory.
        report: receives progress.
        more: the other fields of `Request`.

    Raises:
        MintError: for everything that is wrong with the input; nothing that looks like a result is left then.
    """
    return carry_out(place_order(Request(model, budget=budget, out=out, **more), report), smoke, report)


def carry_out(order: Order, smoke: bool = True, report: Report | None = None) -> Result:
    """Do what a request asks for that was found possible (see `convert`)."""
    from .converters import checkpoint
    from .converters.quantizers import NEEDS_INPUTS

    report = report or Silent()
    started = time.monotonic()
    request, job = order.request, order.job
    order.check_memory()
    waves: Waves = at_once
    if not job.source.has_weights and request.low_disk:
        waves = shard_by_shard(job.source, job.inventory, order.fixed is None, report)
    elif not job.source.has_weights:
        report.stage("download")
        job = replace(job, source=load_source(request.model))
        order = replace(order, job=job)
    kept: dict[str, Callable[[Path], None]] = {}

    def curves() -> Profile:
        made = get_profile(job, report, request.sample, request.allow_nonfinite, waves)
        kept[PROFILE_FILE] = partial(save_profile, made)
        return made

    @lru_cache(maxsize=1)  # measured once, also where it is in vain
    def own() -> tuple[np.ndarray, Sensitivity] | None:
        found = order.own or get_sensitivity(job, report, order.tokens)
        if found is not None:
            kept[SENSITIVITY_FILE] = partial(save_sensitivity, *found)
        return found

    plan = choose_plan(order, curves, lambda: (own() or (None, None))[1])
    looks = plan.quantizer in NEEDS_INPUTS
    if looks and own() is None:
        plan, looks = replace(plan, quantizer="rtn"), False
    if plan.objective not in (None, *NEEDS_SENSITIVITY) and not looks:
        plan = replace(plan, effort="fast")
    target = Path(request.out) if request.out is not None else default_target(job, plan)
    check_target(target, job.source.path, request.force)
    total = plan.layout(job.inventory).total
    say = smoke and fits_here(total) and not mlxlm.tokenizer_is_code(job.source.path)
    mine = own() if looks else None
    refine = mine is not None and efforts.refines(plan.effort, plan.quantizer)
    if refine and not _can_refine(job.inventory, plan.choice):
        report.note("there is too little memory here to distil scales and biases end to end: they stay as learned")
        refine = False
    write = partial(checkpoint.write, job.source, job.inventory, plan, target, request.force, say, report)
    sentence = write(own=mine, kept=kept, refine=refine, allow_nonfinite=request.allow_nonfinite, waves=waves)
    active = job.inventory.active_bytes(plan.choice)
    ratio = active_ratio(job.inventory, plan.choice)
    return Result(target, plan, job.inventory, total, active, ratio, sentence, time.monotonic() - started)


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
        "expected_kl": efforts.expected_kl(plan.objective, plan.quantizer, plan.loss),
        "gap": plan.gap,
        "sentence": result.sentence,
        "seconds": round(result.seconds, 2),
    }


def _gap(plan: Plan) -> str:
    if plan.gap is None:
        return ""
    return f"; at most {plan.gap:.3%} from the best choice" if plan.gap else "; no choice of layers has a lower loss"


def describe(result: Result) -> str:
    """A finished conversion in one line."""
    return (
        f"{result.path}: {both(result.bytes)}, {result.bits_per_weight:.2f} bits per weight; decoding reads "
        f"{human(result.active_bytes)} a token, {result.active_ratio:.2f}x of uniform 4bit-g64"
        + efforts.expectation(result.plan.objective, result.plan.quantizer, result.plan.loss)
        + _gap(result.plan)
    )
