"""Runs the knapsack for a whole checkpoint: within its bytes, and within a goal of speed if any."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..checkpoint.layers import Inventory
from ..checkpoint.layout import SHARD_BYTES
from .knapsack import Solution, solve
from .pace import Pace, candidate_seconds, seconds_for_layers, too_fast
from .search_space import Candidates
from .two_limits import Limits, fastest, solve_both

Solver = Callable[[int], tuple[list[int], float, float]]  # bytes of layers: choice, loss, gap


def make_solver(
    inventory: Inventory,
    options: Candidates,
    costs: list[np.ndarray],
    losses: list[np.ndarray],
    pace: Pace | None,
) -> Solver:
    """What chooses within a number of bytes for all layers, and within the pace's goal if any."""
    if pace is None or pace.goal is None:

        def within_bytes(room: int) -> tuple[list[int], float, float]:
            return _picks(solve(costs, losses, room), costs, losses)

        return within_bytes
    seconds = candidate_seconds(pace, inventory, options)
    most = seconds_for_layers(pace, inventory)

    def within_both(room: int) -> tuple[list[int], float, float]:
        # Where the reserve alone is too much the cheapest options are the only choice.
        limits = Limits(costs, seconds, room, most)
        if fastest(limits) is None:
            limits = Limits(costs, seconds, sum(int(cost.min()) for cost in costs), most)
        solution = solve_both(limits, losses, pace.thorough)
        if solution is None:
            raise too_fast(pace, inventory, limits, inventory.other_bytes + room)
        return _picks(solution, costs, losses)

    return within_both


def _picks(
    solution: Solution | None, costs: list[np.ndarray], losses: list[np.ndarray]
) -> tuple[list[int], float, float]:
    """A solution's choice, loss and gap; the cheapest options where there is none.

    The smallest size fits (that was checked before), but not with what is reserved."""
    if solution is not None:
        return list(solution.choice), solution.loss, solution.gap
    picks = [int(np.argmin(cost)) for cost in costs]
    return picks, sum(float(values[k]) for values, k in zip(losses, picks, strict=True)), 0.0


def fit_layout(
    inventory: Inventory,
    options: Candidates,
    costs: list[np.ndarray],
    limit: int,
    solver: Solver,
) -> tuple[list[int], float, float]:
    """The knapsack's choice with its loss and gap.

    How many shards there are follows from the choice, so what they cost is reserved, and more of it
    until the whole checkpoint fits."""
    least = sum(int(cost.min()) for cost in costs)
    reserve = SHARD_BYTES
    while True:
        room = limit - inventory.other_bytes - reserve
        picks, loss, gap = solver(room)
        choice = {
            layer.path: options[layer.path][pick]
            for layer, pick in zip(inventory.layers, picks, strict=True)
        }
        excess = inventory.layout(choice).total - limit
        if excess <= 0 or room < least:
            return picks, loss, gap
        reserve += excess
