"""The steps of a conversion, each alone with a file as its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..allocation import allocate as allocation
from ..allocation.artifacts import PROFILE_FILE, find_artifact, find_sensitivity
from ..allocation.pace import parse_goal
from ..allocation.pace_source import pace_from
from ..allocation.plan import Plan
from ..allocation.plan_file import write_plan
from ..allocation.search_space import parse_override, search_space
from ..base.distributed import ranks
from ..base.errors import MintError, UsageError
from ..base.one_line import one_line
from ..base.report import Report, Silent
from ..base.targets import check_file, check_writable
from ..base.units import human, parse_budget
from ..checkpoint.layers import Inventory
from ..checkpoint.mtp_codes import IN_8_BITS
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
from ..runtime.machine import CONTEXT, check_context
from ..runtime.table_names import check_table_name
from .measurements import get_profile, get_sensitivity
from .model import note_source, prepare
from .request import check_twin
from .twin import wish_of

PROFILE_MARKER = rb'\A\{("checksum": "[0-9a-f]{32}", )?"mint_mlx_profile":'
PLAN_MARKER = rb"^mint_mlx_plan:"


def write_profile(
    model: str,
    out: Path | None = None,
    recipe: str | None = None,
    parts: str = "text",
    report: Report | None = None,
    sample: str | None = None,
) -> tuple[Path, Profile]:
    """Measure a model and write its profile.

    Args:
        model: a folder or a Hub id.
        out: the file to write; `NAME.profile.json` by default. An older profile is replaced.
        recipe: a recipe's name or file; found by the model's type by default.
        parts: `text`, `mtp`, `mtp-8bit` or `all`.
        report: receives progress.
        sample: how much of each layer is measured, as `--sample`.

    Raises:
        MintError: the model or the file is wrong.
    """
    report = report or Silent()
    if out is not None:
        check_file(out, PROFILE_MARKER, force=True)
    check_parts(parts)
    checked_sample = parse_sample(sample) if sample is not None else None

    # The default name is only known with the model's.
    job = prepare(model, recipe, parts=parts)
    note_source(job, report)
    path = out or Path(f"{job.source.name.rpartition('/')[2]}.profile.json")
    check_file(path, PROFILE_MARKER, force=True)
    if path.is_file() and job.source.fingerprint not in _fingerprint(path):
        report.note(
            f"{path} is stale: {job.source.name} or mint-mlx has changed since; it is measured anew"
        )

    profile = get_profile(job, report, checked_sample)
    if ranks().first:
        save_profile(profile, path)
    return path, profile


def _fingerprint(path: Path) -> str:
    """A profile's fingerprint, '' where it can't be read."""
    try:
        return load_profile(path).origin.fingerprint
    except MintError:
        return ""


def write_sensitivity(
    model: str,
    out: Path | None = None,
    report: Report | None = None,
    tokens: int | None = None,
    *,
    twin: str | None = None,
    keep_twin: Path | None = None,
    no_twin: bool = False,
) -> tuple[Path, Sensitivity]:
    """Measure a model's sensitivity and write it.

    Args:
        model: a folder or a Hub id.
        out: the file to write; `NAME.sensitivity.npz` by default.
        report: receives progress.
        tokens: how much text the model writes for it; that of the default effort by default.
        twin, keep_twin, no_twin: as of `convert`.

    Raises:
        MintError: the model or the file is wrong, or the model can't be run block by block.
    """
    report = report or Silent()
    efforts.check_tokens(tokens)
    check_twin(twin, keep_twin, no_twin)
    job = prepare(model)
    note_source(job, report)
    wish = wish_of(job, twin, keep_twin, no_twin)

    # A file that can't be written, or too little memory, is found out before the work.
    path = out or Path(f"{job.source.name.rpartition('/')[2]}.sensitivity.npz")
    if path.exists() and not is_sensitivity(path):
        raise MintError(f"{path} exists and is something else: choose another file with -o")
    if not path.absolute().parent.is_dir():
        raise MintError(f"the folder of {path} does not exist: make it first")
    check_writable(path.absolute().parent)
    check_room(rounding(job.inventory, tokens or efforts.TOKENS, True), "take a larger machine")

    sensitivity = get_sensitivity(job, report, tokens, wish)
    if sensitivity is None:
        raise MintError(
            f"{job.source.name} is built in a way that no sensitivity can be measured for: give "
            "--effort fast"
        )
    save_sensitivity(sensitivity, path)
    return path, sensitivity


@dataclass(frozen=True, repr=False)
class Allocation:
    """A plan that was chosen, with the layers that it is for.

    Attributes:
        plan: the choice.
        inventory: the model's layers.
        out: the file that it was written to, or None.
    """

    plan: Plan
    inventory: Inventory
    out: Path | None = None

    @property
    def bytes(self) -> int:
        """Of all safetensors files."""
        return self.plan.layout(self.inventory).total

    @property
    def bits_per_weight(self) -> float:
        """Bits of all files over the number of weights."""
        return self.bytes * 8 / self.inventory.parameters

    @property
    def expected_kl(self) -> float | None:
        """KL from the source in nats a token, where the objective predicts it."""
        plan = self.plan
        return efforts.expected_kl(plan.objective, plan.quantizer, plan.loss)

    @property
    def expected_kl_band(self) -> tuple[float, float] | None:
        """The lowest and the highest true KL that it stands for (rules/efforts.py)."""
        return efforts.band(self.expected_kl)

    def __repr__(self) -> str:
        return one_line(
            self,
            human(self.bytes),
            f"{self.bits_per_weight:.2f} bits per weight",
            f"{len(self.plan.choice)} layers",
            str(self.plan.objective),
        )


def allocate(
    profile: str | Path,
    budget: str,
    out: str | Path | None = None,
    *,
    recipe: str | None = None,
    objective: str | None = None,
    overrides: Sequence[str] = (),
    ignore_guards: bool = False,
    force: bool = False,
    sensitivity: str | Path | None = None,
    min_speed: float | None = None,
    speed: str | None = None,
    speed_table: str | None = None,
    context: int = CONTEXT,
) -> Allocation:
    """Choose bits and group size of every layer for a budget.

    Args:
        profile: a profile's file, or a checkpoint or repository that holds one; a sensitivity
            beside it is used as well.
        budget: the size of all safetensors files: `19GB`, `17.5GiB`, `4.5bpw`, `smallest`.
        out: the file to write the plan to, if any.
        recipe: a recipe's name or file; that of the profile by default.
        objective: what is minimised; the recipe's by default, else what suits the sensitivity.
        overrides: `REGEX=CONFIG` for all layers that match; later ones win.
        ignore_guards: allow what the guards forbid, such as 4-bit routers.
        force: replace an existing plan.
        sensitivity: a sensitivity's file, or a checkpoint or repository that holds one.
        min_speed: tokens per second that the plan must be predicted to decode at `context`.
        speed: the same as a multiple of uniform 4bit-g64's, such as `0.95x`.
        speed_table: whose speed that is: a file, or an Apple chip (whose time for the cache isn't
            counted here); this machine's from the cache by default.
        context: tokens in the cache.

    Raises:
        MintError: the profile, the budget, an override or the file is wrong.
    """
    # Words and the target are checked before a profile is read, which may be downloaded.
    size = parse_budget(budget)
    parsed = [parse_override(text) for text in overrides]
    goal = parse_goal(min_speed, speed)
    check_table_name(speed_table)
    check_context(context, None)
    plan_file = Path(out) if out is not None else None
    if plan_file is not None:
        check_file(plan_file, PLAN_MARKER, force)

    # The objective decides whether a sensitivity is of interest.
    curves = load_profile(find_artifact(profile, PROFILE_FILE))
    chosen = find_recipe(recipe, {}) if recipe is not None else curves.recipe
    objective = objective or chosen.objective
    weights = None
    if objective is None or needs_sensitivity(objective):
        weights = find_sensitivity(profile, sensitivity)
    elif sensitivity is not None:
        raise UsageError(f"the objective {objective} uses no sensitivity: leave --sensitivity out")
    level = efforts.level_with(weights is not None)
    objective = objective or efforts.EFFORTS[level].objective

    space = search_space(curves.inventory, chosen, parsed, ignore_guards)
    pace = pace_from(curves.inventory, curves.origin.source, speed_table, context, goal)
    plan = allocation.allocate(curves, size, space, objective, weights, pace=pace)
    plan = replace(
        plan,
        effort=level,
        quantizer=efforts.EFFORTS[level].quantizer,
        parts=_parts_of(curves.inventory),
    )
    if plan_file is not None:
        write_plan(plan, curves.inventory, plan_file)
    return Allocation(plan, curves.inventory, plan_file)


def _parts_of(inventory: Inventory) -> str:
    """Which parts of a model an inventory holds, as --parts names them."""
    if inventory.towers:
        return "all"
    if inventory.coded:
        return IN_8_BITS
    return "mtp" if inventory.beside else "text"
