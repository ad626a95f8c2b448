"""The multiple-choice knapsack: one option per layer, least total loss within a budget of bytes.

Greedy over the lower convex hulls by loss saved per byte (the optimum of the linear relaxation up
to one fractional item: Sinha and Zoltners, 1979), then a fill pass over all options with the bytes
that remain, then, for problems small enough, an exact search: Pareto states layer by layer
(Nemhauser and Ullmann, 1969), cut by the relaxation's bound. Deterministic throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EXACT_LAYERS = 256
EXACT_STATES = 3_000_000  # states generated in all: about half a second
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Solution:
    """A choice of one option per layer.

    Attributes:
        choice: index of the chosen option, by layer.
        bytes: their sum.
        loss: their sum.
        bound: the relaxation's lower bound on the loss of any choice within the budget.
        optimal: whether the choice is proven to be the best.
    """

    choice: tuple[int, ...]
    bytes: int
    loss: float
    bound: float
    optimal: bool

    @property
    def gap(self) -> float:
        """How much better any choice could be: the relative distance to the bound, 0 if proven."""
        if self.optimal or self.loss <= 0:
            return 0.0
        return max(0.0, (self.loss - self.bound) / self.loss)


@dataclass(frozen=True)
class Hull:
    """Corners of one layer's lower convex hull, cheapest first: option indices, bytes, losses."""

    index: np.ndarray
    cost: np.ndarray
    loss: np.ndarray


def _frontier(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices of the options that no other one beats in both bytes and loss, cheapest first."""
    order = np.lexsort((np.arange(len(cost)), loss, cost))
    best = np.minimum.accumulate(np.concatenate([[np.inf], loss[order]]))[:-1]
    return order[loss[order] < best]


def lower_hull(cost: np.ndarray, loss: np.ndarray) -> Hull:
    """The corners of one layer's lower convex hull."""
    keep: list[int] = []
    points = [int(i) for i in _frontier(cost, loss)]
    for i in points:
        while len(keep) >= 2:
            a, b = keep[-2], keep[-1]
            # b stays a corner only if the way to it falls more steeply than the way on to i
            if (loss[a] - loss[b]) * float(cost[i] - cost[b]) > (loss[b] - loss[i]) * float(
                cost[b] - cost[a]
            ):
                break
            keep.pop()
        keep.append(i)
    index = np.array(keep)
    return Hull(index, cost[index], loss[index])


def _segments(hulls: Sequence[Hull]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All steps between neighbouring corners, steepest first: layer, extra bytes, loss saved."""
    layer = np.repeat(np.arange(len(hulls)), [len(h.index) - 1 for h in hulls])
    cost = np.concatenate([np.zeros(0, dtype=np.int64), *(np.diff(h.cost) for h in hulls)])
    gain = np.concatenate([np.zeros(0), *(-np.diff(h.loss) for h in hulls)])
    step = np.concatenate(
        [np.zeros(0, dtype=np.int64), *(np.arange(len(h.index) - 1) for h in hulls)]
    )
    order = np.lexsort((step, layer, -gain / np.maximum(cost, 1)))
    return layer[order], cost[order], gain[order]


def solve(
    costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], budget: int, exact: bool = True
) -> Solution | None:
    """Choose one option per layer.

    Args:
        costs: int64 (options,) bytes, by layer.
        losses: float64 (options,), by layer.
        budget: bytes in all.
        exact: let an exact search follow where the problem is small enough for one.

    Returns:
        The choice, or None where even the cheapest options don't fit.
    """
    hulls = [lower_hull(c, v) for c, v in zip(costs, losses, strict=True)]
    position = np.zeros(len(hulls), dtype=np.int64)
    loss = sum(float(h.loss[0]) for h in hulls)
    remaining = budget - sum(int(h.cost[0]) for h in hulls)
    if remaining < 0:
        return None

    # Steps in order of loss saved per byte; the first that doesn't fit bounds every choice.
    layer, cost, gain = _segments(hulls)
    fits = int(np.searchsorted(np.cumsum(cost), remaining, side="right"))
    bound = loss - float(gain[:fits].sum())
    if fits < len(cost):
        bound -= float(gain[fits]) * (remaining - int(cost[:fits].sum())) / int(cost[fits])
    np.add.at(position, layer[:fits], 1)
    remaining -= int(cost[:fits].sum())

    # Smaller steps of other layers may still fit.
    blocked: set[int] = set()
    smallest = np.minimum.accumulate(cost[::-1])[::-1] if len(cost) else cost
    for i in range(fits, len(cost)):
        if smallest[i] > remaining:
            break
        if int(layer[i]) in blocked or cost[i] > remaining:
            blocked.add(int(layer[i]))
        else:
            position[layer[i]] += 1
            remaining -= int(cost[i])

    # What hulls leave out may fill the rest, and where few layers do, all choices can be searched.
    choice = np.array([h.index[p] for h, p in zip(hulls, position, strict=True)], dtype=np.int64)
    _fill(costs, losses, choice, remaining)
    best = _solution(costs, losses, choice, bound, fits == len(cost))
    if exact and not best.optimal and best.gap > TOLERANCE and len(costs) <= EXACT_LAYERS:
        better = _exact(costs, losses, hulls, budget, best.loss)
        if better is not None:
            return _solution(costs, losses, better if len(better) else choice, bound, True)
    return best


def _solution(
    costs: Sequence[np.ndarray],
    losses: Sequence[np.ndarray],
    choice: np.ndarray,
    bound: float,
    optimal: bool,
) -> Solution:
    total = sum(int(c[k]) for c, k in zip(costs, choice, strict=True))
    loss = sum(float(v[k]) for v, k in zip(losses, choice, strict=True))
    return Solution(tuple(int(k) for k in choice), total, loss, min(bound, loss), optimal)


def _fill(
    costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], choice: np.ndarray, remaining: int
) -> None:
    """Spend the remaining bytes on the upgrades that save most, one by one; changes `choice`."""
    width = max((len(c) for c in costs), default=0)
    cost = np.array(
        [np.pad(c, (0, width - len(c)), constant_values=np.iinfo(np.int64).max // 2) for c in costs]
    )
    loss = np.array([np.pad(v, (0, width - len(v)), constant_values=np.inf) for v in losses])
    layers = np.arange(len(costs))
    while len(costs):
        extra = cost - cost[layers, choice][:, None]
        saved = np.where(extra <= remaining, loss[layers, choice][:, None] - loss, -np.inf)
        i, k = divmod(int(np.argmax(saved)), width)
        if not saved[i, k] > 0:
            return
        remaining -= int(extra[i, k])
        choice[i] = k


def _exact(
    costs: Sequence[np.ndarray],
    losses: Sequence[np.ndarray],
    hulls: Sequence[Hull],
    budget: int,
    incumbent: float,
) -> np.ndarray | None:
    """The best choice with a loss below `incumbent`.

    Returns:
        Indices of options by layer; empty where no choice is better, None if the search grows too
        large.
    """
    # Layers with the most to lose come first, so that bad states are cut early.
    order = sorted(
        range(len(costs)), key=lambda i: (float(hulls[i].loss[-1] - hulls[i].loss[0]), i)
    )
    bounds = suffix_bounds([hulls[i] for i in order])
    state_cost = np.zeros(1, dtype=np.int64)
    state_loss = np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    generated = 0
    for depth, i in enumerate(order):
        options = _frontier(costs[i], losses[i])
        generated += len(state_cost) * len(options)
        if generated > EXACT_STATES:
            return None
        cost = (state_cost[:, None] + costs[i][options]).ravel()
        loss = (state_loss[:, None] + losses[i][options]).ravel()

        # A state lives if even the relaxed rest could beat the incumbent, and no other beats it.
        spots, values = bounds[depth + 1]
        rest = budget - cost
        lower = np.where(rest >= spots[0], loss + np.interp(rest, spots, values), np.inf)
        alive = np.flatnonzero(lower < incumbent * (1 - TOLERANCE))
        if not len(alive):
            return np.zeros(0, dtype=np.int64)
        best = alive[_frontier(cost[alive], loss[alive])]
        trail.append((best // len(options), options[best % len(options)]))
        state_cost = cost[best]
        state_loss = loss[best]

    # From the best final state back to the choices that led there.
    state = int(np.argmin(state_loss))
    choice = np.zeros(len(costs), dtype=np.int64)
    for i, (parent, option) in zip(reversed(order), reversed(trail), strict=True):
        choice[i] = option[state]
        state = int(parent[state])
    return choice


def suffix_bounds(hulls: Sequence[Hull]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The relaxation's least loss for each suffix of the layers.

    Returns:
        For each, a piecewise linear function of the remaining bytes: its corners and values.
    """
    result = []
    for start in range(len(hulls) + 1):
        rest = hulls[start:]
        _, cost, gain = _segments(rest)
        least = sum(int(h.cost[0]) for h in rest)
        worst = sum(float(h.loss[0]) for h in rest)
        spots = least + np.concatenate([[0.0], np.cumsum(cost)])
        result.append((spots, worst - np.concatenate([[0.0], np.cumsum(gain)])))
    return result
