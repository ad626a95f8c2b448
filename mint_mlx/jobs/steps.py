"""The steps of a conversion, each alone with a file as its result, and the distillation of a
finished checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..allocation.allocate import allocate
from ..allocation.artifacts import PROFILE_FILE, find_artifact, find_sensitivity
from ..allocation.plan import Plan
from ..allocation.plan_file import write_plan
from ..allocation.search_space import parse_override, search_space
from ..base.distributed import ranks
from ..base.errors import MintError, UsageError
from ..base.report import Report, Silent
from ..base.targets import check_file, check_writable
from ..base.units import parse_budget
from ..checkpoint.layers import Inventory
from ..checkpoint.towers import check_parts
from ..converters.quantizers.memory_estimate import check_room, rounding
from ..measure.profile import Profile
from ..measure.profile_file import load_profile, save_profile
from ..measure.sample import parse_sample
from ..measure.sensitivity import Sensitivity
from ..measure.sensitivity_file import is_sensitivity, save_sensitivity
from ..rules import efforts
from ..rules.objectives import needs_sensitivity
from ..rules.recipes import find_recipe
from .measurements import get_profile, get_sensitivity
from .model import announce, prepare

PROFILE_MARKER, PLAN_MARKER = "mint_mlx_profile", "mint_mlx_plan"


def write_profile(
    model: str,
    out: Path | None = None,
    recipe: str | None = None,
    parts: str = "text",
    report: Report | None = None,
    sample: str | None = None,
) -> tuple[Path, Profile]:
    """Measure a model and write its profile (`NAME.profile.json` by default); an older one of it is
    replaced.

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
        report.note(
            f"{path} is stale: {job.source.name} or mint-mlx has changed since; it is measured anew"
        )
    made = get_profile(job, report, sample)
    if ranks().first:
        save_profile(made, path)
    return path, made


def _fingerprint(path: Path) -> str:
    """A profile's fingerprint, '' where it can't be read."""
    try:
        return load_profile(path).origin.fingerprint
    except MintError:
        return ""


def write_sensitivity(
    model: str, out: Path | None = None, report: Report | None = None, tokens: int | None = None
) -> tuple[Path, Sensitivity]:
    """Measure a model's sensitivity and write it (`NAME.sensitivity.npz` by default); `tokens` as
    in `Request`.

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
    check_writable(path.absolute().parent)
    check_room(rounding(job.inventory, tokens or efforts.TOKENS, True), "take a larger machine")
    sensitivity = get_sensitivity(job, report, tokens)
    if sensitivity is None:
        raise MintError(
            f"{job.source.name} is built in a way that no sensitivity can be measured for: give "
            "--effort fast"
        )
    save_sensitivity(sensitivity, path)
    return path, sensitivity


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

    A checkpoint or repository that keeps a profile may keep a sensitivity beside it, which is used
    as well.

    Raises:
        MintError: the profile, the budget, an override or the file is wrong.
    """
    size = parse_budget(budget)
    parsed = [parse_override(text) for text in overrides]
    if out is not None:
        check_file(out, PLAN_MARKER, force)
    curves = load_profile(find_artifact(path, PROFILE_FILE))
    chosen = find_recipe(recipe, {}) if recipe is not None else curves.recipe
    objective, weights = objective or chosen.objective, None
    if objective is None or needs_sensitivity(objective):
        weights = find_sensitivity(path, sensitivity)
    elif sensitivity is not None:
        raise UsageError(
            f"the objective {objective} does not look at a sensitivity: leave --sensitivity out"
        )
    level = efforts.level_with(weights is not None)
    objective = objective or efforts.EFFORTS[level].objective
    space = search_space(curves.inventory, chosen, parsed, ignore_guards)
    plan = allocate(curves, size, space, objective, weights)
    parts = "all" if curves.inventory.carried else "text"
    plan = replace(plan, effort=level, quantizer=efforts.EFFORTS[level].quantizer, parts=parts)
    if out is not None:
        write_plan(plan, curves.inventory, out)
    return plan, curves.inventory
