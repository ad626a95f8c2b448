"""Predicted quality against size: what each further byte buys, where that stops, and which Mac it
fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import UsageError
from ..base.files import atomic_write
from ..base.units import Budget, human, parse_budget
from ..measure.profile import Profile
from ..measure.profile_file import load_profile
from ..measure.sensitivity import Sensitivity
from ..rules.efforts import EFFORTS, expected_kl, level_with
from ..rules.objectives import needs_sensitivity
from ..runtime.memory import GIB, MAC_SIZES, RESERVE, gpu_limit
from .allocate import allocate
from .artifacts import PROFILE_FILE, find_artifact, find_sensitivity
from .search_space import SearchSpace, list_candidates, size_range

POINTS = 24


@dataclass(frozen=True)
class Point:
    """One size on the curve. `loss` is the expected KL in nats per token with a sensitivity, else
    the objective's.
    """

    bytes: int
    bits_per_weight: float
    loss: float


@dataclass(frozen=True)
class Measured:
    """A perplexity that somebody measured at a size."""

    bytes: int
    perplexity: float


@dataclass(frozen=True)
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
    """

    source: str
    objective: str
    points: list[Point]
    knee: int
    macs: list[tuple[int, int]]
    measured: list[Measured]


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
        raise UsageError(f"--measured {text} is wrong: write SIZE:PERPLEXITY, such as 4.5bpw:7.31")
    return parse_budget(size), perplexity


def sweep(
    profile: str | Path, sensitivity: str | Path | None = None, measured: tuple[str, ...] = ()
) -> Sweep:
    """Allocate a profile at sizes from the smallest to the largest.

    Args:
        profile: a profile's file, or a checkpoint or repository that keeps one.
        sensitivity: the same of a sensitivity; by default the one that the checkpoint or repository
            keeps, if any.
        measured: `SIZE:PPL`, what was measured.

    Raises:
        MintError: a file or a size is wrong.
    """
    curves = load_profile(find_artifact(profile, PROFILE_FILE))
    weights = find_sensitivity(profile, sensitivity)
    objective = curves.recipe.objective or EFFORTS[level_with(weights is not None)].objective
    parameters = curves.inventory.parameters
    found = []
    for size, perplexity in map(parse_measured, measured):
        limit = size.resolve(parameters)
        if limit is None:
            raise UsageError(f"--measured {size.text} is no size: write one such as 4.5bpw or 19GB")
        found.append(Measured(limit, perplexity))
    points = [
        _point(curves, budget, objective, weights)
        for budget in _budgets(curves, objective, weights)
    ]
    macs = [(gib, gpu_limit(gib * GIB) - RESERVE) for gib in MAC_SIZES]
    on_curve = [(gib, size) for gib, size in macs if points[0].bytes <= size <= points[-1].bytes]
    return Sweep(curves.origin.source, objective, points, knee(points), on_curve, found)


def _budgets(curves: Profile, objective: str, weights: Sensitivity | None) -> list[Budget]:
    """Sizes at equal ratios from the smallest to the largest."""
    space = SearchSpace(curves.inventory, curves.recipe)
    smallest = allocate(curves, Budget("smallest"), space, objective, weights)
    least = smallest.layout(curves.inventory).total
    most = size_range(curves.inventory, _quantized(curves))[1]
    sizes = np.geomspace(least, most, POINTS).astype(int).tolist()
    return [Budget("smallest"), *(parse_budget(f"{size}B") for size in sizes[1:])]


def _quantized(curves: Profile) -> dict[str, Any]:
    """Candidates without the unquantized one, where a layer has others: beyond them nothing is left
    to choose.
    """
    options = list_candidates(SearchSpace(curves.inventory, curves.recipe))
    return {
        path: tuple(c for c in configs if c.quantized) or configs
        for path, configs in options.items()
    }


def _point(curves: Profile, budget: Budget, objective: str, weights: Sensitivity | None) -> Point:
    space = SearchSpace(curves.inventory, curves.recipe)
    plan = allocate(curves, budget, space, objective, weights)
    total = plan.layout(curves.inventory).total
    loss = expected_kl(objective, EFFORTS["balanced"].quantizer, plan.loss) or plan.loss or 0.0
    return Point(total, total * 8 / curves.inventory.parameters, loss)


def knee(points: list[Point]) -> int:
    """The point that lies farthest below the line from the first to the last (Satopaa et al.,
    "Kneedle", 2011).
    """
    size = np.array([point.bytes for point in points], dtype=np.float64)
    loss = np.array([point.loss for point in points])
    if len(points) < 3 or size[-1] == size[0] or loss[0] == loss[-1]:
        return 0
    x = (size - size[0]) / (size[-1] - size[0])
    y = (loss[0] - loss) / (loss[0] - loss[-1])
    return int(np.argmax(y - x))


def sweep_rows(found: Sweep) -> tuple[list[str], list[list[str]]]:
    """The curve as a table: marks tell the knee, the Macs whose limit lies between a size and the
    next, and what was measured at about this size."""
    rows = []
    nearest = {
        m: min(found.points, key=lambda point: abs(point.bytes - m.bytes)) for m in found.measured
    }
    for i, point in enumerate(found.points):
        after = found.points[i + 1].bytes if i + 1 < len(found.points) else math.inf
        marks = ["knee"] if i == found.knee else []
        marks += [f"{gib} GiB Mac" for gib, size in found.macs if point.bytes <= size < after]
        marks += [f"measured {m.perplexity:.4g}" for m in found.measured if nearest[m] is point]
        rows.append(
            [
                human(point.bytes),
                f"{point.bits_per_weight:.2f}",
                f"{point.loss:.3g}",
                ", ".join(marks),
            ]
        )
    what = "predicted KL" if needs_sensitivity(found.objective) else "loss"
    return ["size", "bpw", what, "note"], rows


def draw(found: Sweep, path: Path) -> None:
    """Draw the curve: predicted loss against bytes, the knee, the limits of Macs, and measured
    perplexities.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    sizes, losses = [p.bytes for p in found.points], [p.loss for p in found.points]
    known = needs_sensitivity(found.objective)
    label = "predicted KL from the source, --effort balanced" if known else "loss"
    axis.plot(sizes, losses, marker="o", markersize=4, color="tab:blue", label=label)
    at = found.points[found.knee]
    axis.plot(
        [at.bytes], [at.loss], "D", color="tab:red", label=f"knee: {at.bits_per_weight:.2f} bpw"
    )
    for gib, size in found.macs:
        axis.axvline(size, color="grey", linestyle=":")
        axis.annotate(
            f"{gib} GiB Mac", (size, losses[0]), rotation=90, fontsize=8, ha="right", va="top"
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("bytes of all safetensors files")
    axis.set_ylabel("predicted KL (nats per token)" if known else "loss (`prior`)")
    axis.xaxis.set_major_locator(MaxNLocator(7))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
    axis.tick_params(axis="x", rotation=30)
    axis.grid(True, which="both", alpha=0.25)
    handles, names = axis.get_legend_handles_labels()
    if found.measured:
        other = axis.twinx()
        other.set_ylabel("measured perplexity")
        (line,) = other.plot(
            [m.bytes for m in found.measured],
            [m.perplexity for m in found.measured],
            "s",
            color="tab:green",
        )
        handles, names = [*handles, line], [*names, "measured perplexity"]
    axis.legend(handles, names, fontsize=8)
    axis.set_title(found.source)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=130, format=path.suffix[1:])
    pyplot.close(figure)
