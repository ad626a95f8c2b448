"""The steps of a conversion, each alone with a file as its result, and the distillation of a finished checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import cache, efforts, mlxlm
from .allocate import allocate, parse_override
from .config import text_config
from .errors import MintError, UsageError
from .files import REFINED_FILE, check_file, check_rights, check_target, write_whole
from .kept import PROFILE_FILE, find_kept, kept_sensitivity
from .layers import Inventory
from .load import load_source
from .measured import first_token, get_profile, get_sensitivity, vocabulary
from .objectives import NEEDS_SENSITIVITY
from .order import announce, prepare
from .parts import check_parts
from .peak import check_room, peak
from .plan import Plan, write_plan
from .profile import Profile, load_profile, save_profile
from .quant import KEEP
from .ranks import ranks
from .recipes import find_recipe
from .report import Report, Silent
from .sample import parse_sample
from .sensitivity import Sensitivity
from .sensitivity_file import is_sensitivity, save_sensitivity
from .units import parse_budget

if TYPE_CHECKING:
    from .refine import Refined

PROFILE_MARKER, PLAN_MARKER = "mint_mlx_profile", "mint_mlx_plan"


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
    check_parts(parts)
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


def write_sensitivity(
    model: str, out: Path | None = None, report: Report | None = None, tokens: int | None = None
) -> tuple[Path, Sensitivity]:
    """Measure a model's sensitivity and write it (`NAME.sensitivity.npz` by default); `tokens` as in `Request`.

    Raises:
        MintError: the model or the file is wrong, or the model can't be walked through.
    """
    report = report or Silent()
    efforts.check_tokens(tokens)
    job = prepare(model)
    announce(job, report)
    path = out or Path(f"{job.source.name.rpartition('/')[2]}.sensitivity.npz")
    if path.exists() and not is_sensitivity(path):
        raise MintError(f"{path} exists and is something else: choose another file with -o")
    if not path.absolute().parent.is_dir():
        raise MintError(f"the folder of {path} does not exist: make it first")
    check_rights(path.absolute().parent)
    check_room(peak(job.inventory, tokens or efforts.TOKENS, True, "rtn"), "take a larger machine")
    own = get_sensitivity(job, report, tokens)
    if own is None:
        raise MintError(
            f"{job.source.name} is built in a way that no sensitivity can be measured for: give --effort fast"
        )
    save_sensitivity(*own, path)
    return path, own[1]


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

    A checkpoint or repository that keeps a profile may keep a sensitivity beside it, which is used as well.

    Raises:
        MintError: the profile, the budget, an override or the file is wrong.
    """
    size = parse_budget(budget)
    parsed = [parse_override(text) for text in overrides]
    if out is not None:
        check_file(out, PLAN_MARKER, force)
    curves = load_profile(find_kept(path, PROFILE_FILE))
    chosen = find_recipe(recipe, {}) if recipe is not None else curves.recipe
    objective, weights = objective or chosen.objective, None
    if objective in (None, *NEEDS_SENSITIVITY):
        weights = kept_sensitivity(path, sensitivity)
    elif sensitivity is not None:
        raise UsageError(f"the objective {objective} does not look at a sensitivity: leave --sensitivity out")
    level = efforts.level_with(weights is not None)
    objective = objective or efforts.EFFORTS[level].objective
    plan = allocate(curves, size, chosen, objective, parsed, ignore_guards, weights)
    parts = "all" if curves.inventory.carried else "text"
    plan = replace(plan, effort=level, quantizer=efforts.EFFORTS[level].quantizer, parts=parts)
    if out is not None:
        write_plan(plan, curves.inventory, out)
    return plan, curves.inventory


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
    from .converters.card import refined_card
    from .refine import can_refine, put_refined, refine_own
    from .tokens import write_tokens

    report = report or Silent()
    given = load_source(checkpoint)
    target = out or Path(f"{given.name.rpartition('/')[2]}-refined")
    check_target(target, given.path, force)
    if not any(name.endswith(".biases") for table in given.headers.values() for name in table):
        raise MintError(f"{given.name} has no layer with scales and biases: give a quantized MLX checkpoint")
    made = prepare(checkpoint).inventory
    if not can_refine(made, {layer.path: layer.stored or KEEP for layer in made.layers}):
        raise MintError(f"refining {given.name} takes more memory than this machine has: do it on a larger one")
    job = prepare(model)
    if job.source.fingerprint == given.fingerprint:
        raise MintError(f"{given.name} is its own source: give the model that it was made from with --source")
    check_target(target, job.source.path, force)
    same = [text_config(source.config) for source in (given, job.source)]
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
        place = cache.sensitivity_path(job.source, count)
        first = first_token(job)
        tokens, _ = write_tokens(job.source, vocabulary(job), count, first, progress=report.step, place=place)
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
        card = work / "README.md"
        if card.is_file():
            told = refined_card(card.read_text(encoding="utf-8"), target.name, found.before, found.after)
            write_whole(card, told)
        write_whole(work / REFINED_FILE, json.dumps(facts, indent=2) + "\n")
    return target, found
