"""Predicted quality against size: what each further byte buys, and which Mac each size fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..base.errors import UsageError
from ..base.one_line import one_line
from ..base.units import Budget, human, parse_budget
from ..checkpoint.layers import Inventory
from ..measure.profile import Profile
from ..measure.profile_file import load_profile
from ..measure.sensitivity import Sensitivity
from ..rules.efforts import EFFORTS, band, band_text, expected_kl, level_with
from ..rules.objectives import needs_sensitivity
from ..runtime.machine import CONTEXT, check_context
from ..runtime.memory import GIB, MAC_SIZES, RESERVE, gpu_limit
from ..runtime.speed_table import Speed
from ..runtime.table_names import check_table_name
from .allocate import allocate
from .artifacts import PROFILE_FILE, find_artifact, find_sensitivity
from .pace import Pace
from .pace_source import pace_from
from .plan import Plan
from .search_space import SearchSpace, list_candidates, size_range
from .speed_map import MapPoint, speed_map

POINTS = 24
SMALLEST = Budget("smallest")


@dataclass(frozen=True)
class Point:
    """One size on the curve.

    Attributes:
        bytes: of all safetensors files.
        bits_per_weight: the same over the number of weights.
        loss: expected KL in nats per token with a sensitivity, else the objective's value.
        band: the lowest and the highest true KL that an expected one stands for; None without a
            sensitivity.
        speed: how fast it is predicted to decode; None without a speed table.
    """

    bytes: int
    bits_per_weight: float
    loss: float
    band: tuple[float, float] | None = None
    speed: Speed | None = None


@dataclass(frozen=True)
class Measured:
    """A perplexity that somebody measured at a size."""

    bytes: int
    perplexity: float


@dataclass(frozen=True, repr=False)
class Sweep:
    """A curve of sizes with its knee.

    Attributes:
        source: the model's name.
        objective: what `loss` is.
        points: from the smallest size to the largest.
        knee: the index of the point after which a byte buys less than average.
        macs: memory in GiB of the Macs whose GPU limit, less a reserve, lies on the curve, with
            that size in bytes.
        measured: perplexities given by the user.
        map: plans of several sizes and speeds; empty without a speed table.
    """

    source: str
    objective: str
    points: list[Point]
    knee: int
    macs: list[tuple[int, int]]
    measured: list[Measured]
    map: tuple[MapPoint, ...] = ()

    def __repr__(self) -> str:
        sizes = f"{human(self.points[0].bytes)} to {human(self.points[-1].bytes)}"
        knee = f"knee at {self.points[self.knee].bits_per_weight:.2f} bits per weight"
        return one_line(self, self.source, f"{len(self.points)} sizes from {sizes}", knee)


def parse_measured(text: str) -> tuple[Budget, float]:
    """Read `SIZE:PPL`.

    Raises:
        UsageError: it isn't that.
    """
    size, colon, value = text.rpartition(":")
    try:
        perplexity = float(value)
    except ValueError:
        perplexity = math.nan
    if not colon or not 1 <= perplexity < math.inf:
        raise UsageError(f"--measured must be SIZE:PERPLEXITY, such as 4.5bpw:7.31 (got {text})")
    budget = parse_budget(size)
    if budget == SMALLEST:
        raise UsageError(f"--measured needs a size such as 4.5bpw or 19GB (got {size})")
    return budget, perplexity


def sweep(
    profile: str | Path,
    sensitivity: str | Path | None = None,
    measured: Sequence[str] = (),
    speed_table: str | None = None,
    context: int = CONTEXT,
) -> Sweep:
    """Allocate a profile at sizes from the smallest to the largest.

    Args:
        profile: a profile's file, or a checkpoint or repository that holds one.
        sensitivity: the same of a sensitivity; by default the one that the checkpoint or repository
            holds, if any.
        measured: `SIZE:PPL`, perplexities that somebody measured.
        speed_table: whose speed is told: a file, or an Apple chip; this machine's from the cache by
            default.
        context: tokens in the cache while a token is decoded.

    Raises:
        MintError: a file or a size is wrong.
    """
    # Words are checked before a profile is read, which may be downloaded.
    given = [parse_measured(text) for text in measured]
    check_table_name(speed_table)
    check_context(context, None)
    curves = load_profile(find_artifact(profile, PROFILE_FILE))
    pace = pace_from(curves.inventory, curves.origin.source, speed_table, context)
    curve = sweep_profile(curves, find_sensitivity(profile, sensitivity), pace=pace)

    known = []
    for budget, perplexity in given:
        limit = budget.resolve(curves.inventory.parameters)
        assert limit is not None
        known.append(Measured(limit, perplexity))
    return replace(curve, measured=known)


def sweep_profile(
    profile: Profile,
    sensitivity: Sensitivity | None = None,
    objective: str | None = None,
    quantizer: str = EFFORTS["balanced"].quantizer,
    with_sensitivity: bool | None = None,
    pace: Pace | None = None,
) -> Sweep:
    """The curve of a profile, without figures of the user.

    Args:
        profile: the measured errors.
        sensitivity: what they cost.
        objective: what plans minimise; by default the recipe's, else that of the level of effort.
        quantizer: whose expected KL the curve tells.
        with_sensitivity: whether experts have the lower floor that goes with a sensitivity, as for
            `allocate`.
        pace: what predicts speeds, if anything.

    Raises:
        MintError: the files don't belong together.
    """
    level = EFFORTS[level_with(sensitivity is not None)]
    objective = objective or profile.recipe.objective or level.objective

    # One plan for each size.
    space = SearchSpace(profile.inventory, profile.recipe)

    def plan(budget: Budget, pace: Pace | None = pace) -> Plan:
        return allocate(profile, budget, space, objective, sensitivity, with_sensitivity, pace)

    smallest = plan(SMALLEST)
    sizes = _sizes(smallest.layout(profile.inventory).total, space)
    plans = [smallest, *(plan(Budget(f"{size}B", bytes=size)) for size in sizes)]
    points = [_point(plan, profile.inventory, quantizer) for plan in plans]

    # What people know of these sizes is their Mac.
    limits = [(gib, gpu_limit(gib * GIB) - RESERVE) for gib in MAC_SIZES]
    macs = [(gib, size) for gib, size in limits if points[0].bytes <= size <= points[-1].bytes]
    by_speed = speed_map(sizes, profile.inventory, pace, plan) if pace is not None else []
    return Sweep(profile.origin.source, objective, points, knee(points), macs, [], tuple(by_speed))


def _sizes(smallest: int, space: SearchSpace) -> list[int]:
    """Bytes at equal ratios from the smallest to the largest, without the smallest."""
    # Beyond the largest quantized size nothing is left to choose.
    options = {
        path: tuple(config for config in configs if config.quantized) or configs
        for path, configs in list_candidates(space).items()
    }
    most = size_range(space.inventory, options)[1]
    sizes: list[int] = np.geomspace(smallest, most, POINTS).astype(int).tolist()
    return sizes[1:]


def _point(plan: Plan, inventory: Inventory, quantizer: str) -> Point:
    """A plan as a point of the curve."""
    total = plan.layout(inventory).total
    expected = expected_kl(plan.objective, quantizer, plan.loss)
    loss = expected or plan.loss or 0.0
    return Point(total, total * 8 / inventory.parameters, loss, band(expected), plan.speed)


def knee(points: list[Point]) -> int:
    """The index of the point farthest below the line from the first to the last.

    The method is Kneedle (Satopaa et al., "Finding a Kneedle in a Haystack", 2011)."""
    size = np.array([point.bytes for point in points], dtype=np.float64)
    loss = np.array([point.loss for point in points])
    if len(points) < 3 or size[-1] == size[0] or loss[0] == loss[-1]:
        return 0
    x = (size - size[0]) / (size[-1] - size[0])
    y = (loss[0] - loss) / (loss[0] - loss[-1])
    return int(np.argmax(y - x))


def sweep_lines(curve: Sweep) -> tuple[list[str], list[list[str]]]:
    """The curve as a table.

    Marks tell the knee, the Macs whose limit lies between a size and the next, and what was
    measured at about this size."""
    nearest = {
        known: min(curve.points, key=lambda point: abs(point.bytes - known.bytes))
        for known in curve.measured
    }
    lines = []
    timed = any(point.speed is not None for point in curve.points)
    for i, point in enumerate(curve.points):
        after = curve.points[i + 1].bytes if i + 1 < len(curve.points) else math.inf
        marks = ["knee"] if i == curve.knee else []
        marks += [f"{gib} GiB Mac" for gib, size in curve.macs if point.bytes <= size < after]
        marks += [
            f"measured {known.perplexity:.4g}"
            for known in curve.measured
            if nearest[known] is point
        ]
        loss = band_text(point.loss) if point.band else f"{point.loss:.3g}"
        line = [human(point.bytes), f"{point.bits_per_weight:.2f}", loss]
        line += [str(point.speed or "-")] if timed else []
        lines.append([*line, ", ".join(marks)])
    predicted = needs_sensitivity(curve.objective)
    return ["size", "bpw", "predicted KL" if predicted else "loss", "note"], lines
