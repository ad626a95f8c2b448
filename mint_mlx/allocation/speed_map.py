"""Loss over size and speed: what plans of one model can be had, and which no other one beats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..base.errors import MintError
from ..base.units import Budget, human, parse_budget
from ..checkpoint.layers import Inventory
from ..runtime.speed_table import figure
from .pace import Goal, Pace
from .plan import Plan

SIZES = 6
SPEEDS = 3  # faster than the unlimited plan, at each size
FASTEST = 0.98  # of the greatest speed: at all of it nothing is left to choose

Allocate = Callable[[Budget, Pace], Plan]


@dataclass(frozen=True)
class MapPoint:
    """A plan by its three figures.

    Attributes:
        bytes: of all safetensors files.
        tokens_per_second: of decoding, as predicted.
        loss: of the objective.
        best: whether no other plan of the map is as small, as fast and as good.
    """

    bytes: int
    tokens_per_second: float
    loss: float
    best: bool = False


def speed_map(
    sizes: Sequence[int], inventory: Inventory, pace: Pace, allocate: Allocate
) -> list[MapPoint]:
    """Plans of several sizes and speeds, the best of each.

    Args:
        sizes: bytes, from the smallest to the largest.
        inventory: the model's layers.
        pace: predicts speeds; its goal doesn't count.
        allocate: makes a plan of a size and a pace.
    """
    pace = replace(pace, thorough=False)
    chosen = sizes if len(sizes) <= SIZES else [sizes[i] for i in _spread(len(sizes))]
    points = []
    for size in chosen:
        budget = parse_budget(f"{size}B")
        free = allocate(budget, replace(pace, goal=None))
        if free.speed is None:
            continue
        slowest = free.speed.tokens_per_second
        plans = [free, *_faster(budget, pace, slowest, allocate)]
        points += [_point(plan, inventory) for plan in plans]
    return [replace(point, best=not _is_beaten(point, points)) for point in dict.fromkeys(points)]


def _spread(count: int) -> list[int]:
    return [int(i) for i in np.linspace(0, count - 1, SIZES).round()]


def _faster(budget: Budget, pace: Pace, slowest: float, allocate: Allocate) -> list[Plan]:
    """Plans of a size that decode faster than the unlimited one, up to the fastest."""
    fastest = _fastest(budget, pace, slowest, allocate)
    if fastest <= slowest * 1.01:
        return []
    plans = []
    for speed in np.geomspace(slowest, fastest * FASTEST, SPEEDS + 1)[1:]:
        goal = Goal(f"{figure(speed)} tokens/s", tokens_per_second=float(speed))
        plans.append(allocate(budget, replace(pace, goal=goal)))
    return plans


def _fastest(budget: Budget, pace: Pace, slowest: float, allocate: Allocate) -> float:
    """The greatest speed at a size, to a hundredth, by bisection between reached and refused."""
    reached, refused = slowest, slowest * 16
    while refused > reached * 1.02:
        speed = (reached * refused) ** 0.5
        try:
            plan = allocate(budget, replace(pace, goal=Goal("faster", tokens_per_second=speed)))
        except MintError:
            refused = speed
            continue
        assert plan.speed is not None
        reached = max(speed, plan.speed.tokens_per_second)
    return reached


def _point(plan: Plan, inventory: Inventory) -> MapPoint:
    assert plan.speed is not None
    size = plan.layout(inventory).total
    return MapPoint(size, plan.speed.tokens_per_second, plan.loss or 0.0)


def _is_beaten(point: MapPoint, others: Sequence[MapPoint]) -> bool:
    """Whether another plan is no larger, no slower and no worse, and not the same."""
    return any(
        other.bytes <= point.bytes
        and other.tokens_per_second >= point.tokens_per_second
        and other.loss <= point.loss
        and other != point
        for other in others
    )


def map_lines(points: Sequence[MapPoint]) -> tuple[list[str], list[list[str]]]:
    """The map as a table, those plans alone that no other one beats."""
    lines = [
        [human(p.bytes), figure(p.tokens_per_second), f"{p.loss:.3g}"] for p in points if p.best
    ]
    return ["size", "tokens/s", "loss"], lines
