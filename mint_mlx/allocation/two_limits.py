"""The knapsack with a second limit: least total loss within a budget of bytes and one of seconds.

A multiplier turns seconds into loss, and the knapsack of bytes alone is solved for the sum: that
bounds what any choice within both limits can reach (Lagrangian relaxation: Fisher, "The Lagrangian
Relaxation Method for Solving Integer Programming Problems", 1981). The multiplier is searched for
by bisection; the best choice met on the way is improved by exchanges, then, for problems small
enough, an exact search follows, as in knapsack.py. Deterministic throughout.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .knapsack import TOLERANCE, Solution, lower_hull, solve, suffix_bounds

STEPS = 32  # of the bisection
STATES = 2_000_000  # that the search generates in all, about
CLOSE = 1e-5  # a gap that is not worth a search
SOLVES = 200_000  # options that relaxations of branches look at in all, about
NEAR = (0.25, 0.5, 1.0, 2.0, 4.0)  # weights of a second in a branch, in units of the whole's
MOVES = 1000  # changes of one layer of which exchanges of two are made

Values = Sequence[np.ndarray]  # by layer: (options,)


@dataclass(frozen=True)
class Limits:
    """What a choice may take in all.

    Attributes:
        bytes: int64 (options,) by layer, in `costs` of the functions below.
        seconds: float64 (options,) by layer.
        most_bytes, most_seconds: of the sums.
    """

    bytes: Values
    seconds: Values
    most_bytes: int
    most_seconds: float

    def allow(self, choice: np.ndarray) -> bool:
        """Whether a choice, int64 (layers,), is within both."""
        return total(self.bytes, choice) <= self.most_bytes and self.in_time(choice)

    def in_time(self, choice: np.ndarray) -> bool:
        """Whether it is within the seconds, but for rounding of their sum."""
        return total(self.seconds, choice) <= self.most_seconds * (1 + TOLERANCE)


def total(values: Values, choice: Sequence[int] | np.ndarray) -> float:
    """The sum over a choice."""
    return float(sum(v[k] for v, k in zip(values, choice, strict=True)))


def fastest(limits: Limits) -> Solution | None:
    """The choice of least seconds within the bytes, its seconds as `loss`; None where none fits."""
    return solve(limits.bytes, limits.seconds, limits.most_bytes)


def solve_both(limits: Limits, losses: Values, thorough: bool = True) -> Solution | None:
    """Choose one option per layer within both limits.

    Args:
        limits: bytes and seconds of the options, and what they may sum up to.
        losses: float64 (options,), by layer.
        thorough: let searches follow that take seconds.

    Returns:
        The choice, or None where no choice within the bytes was found that is within the seconds.
    """
    # Where the seconds don't bind, the knapsack of bytes has the answer.
    plain = solve(limits.bytes, losses, limits.most_bytes)
    if plain is None or limits.in_time(np.array(plain.choice)):
        return plain
    quick = fastest(limits)
    if quick is None or not limits.in_time(np.array(quick.choice)):
        return None

    # The weight of a second is doubled or halved until it lies between two, then bisected.
    best = np.array(quick.choice)
    bound, bound_weight = plain.bound, 0.0
    weight, low, high = _first_weight(limits, losses), 0.0, math.inf
    for _ in range(STEPS):
        choice, reached = _relaxed(limits, losses, weight)
        if reached > bound:
            bound, bound_weight = reached, weight
        if limits.in_time(choice):
            high = weight
            best = min(best, choice, key=lambda c: total(losses, c))
        else:
            low = weight
        weight = low * 8 if high == math.inf else high / 8 if low == 0 else math.sqrt(low * high)

    price = _price_of_bytes(limits, losses, bound_weight)
    reduced = [
        v + price * c + bound_weight * t
        for v, c, t in zip(losses, limits.bytes, limits.seconds, strict=True)
    ]
    best = _exchanged(limits, losses, reduced, best)
    optimal = False
    if thorough and _gap(total(losses, best), bound) > CLOSE:
        better, optimal = _search(limits, losses, bound_weight, total(losses, best))
        best = _exchanged(limits, losses, reduced, better) if len(better) else best
    if thorough and not optimal and _gap(total(losses, best), bound) > CLOSE:
        best, bound = _branched(limits, losses, reduced, bound_weight, best, bound)
        optimal = _gap(total(losses, best), bound) <= 0
    loss = total(losses, best)
    size = int(total(limits.bytes, best))
    return Solution(tuple(int(k) for k in best), size, loss, min(bound, loss), optimal)


def _gap(loss: float, bound: float) -> float:
    return (loss - bound) / loss if loss > 0 else 0.0


def _first_weight(limits: Limits, losses: Values) -> float:
    """Loss for a second where to begin: the range of all losses over that of all seconds."""
    loss = sum(float(v.max() - v.min()) for v in losses)
    seconds = sum(float(v.max() - v.min()) for v in limits.seconds)
    return max(loss, 1e-300) / max(seconds, 1e-300)


def _relaxed(limits: Limits, losses: Values, weight: float) -> tuple[np.ndarray, float]:
    """The best choice within the bytes where seconds cost loss, and the bound that it proves."""
    summed = [v + weight * t for v, t in zip(losses, limits.seconds, strict=True)]
    solution = solve(limits.bytes, summed, limits.most_bytes, exact=False)
    assert solution is not None  # the cheapest options fit, whatever they lose
    return np.array(solution.choice), solution.bound - weight * limits.most_seconds


def _price_of_bytes(limits: Limits, losses: Values, weight: float) -> float:
    """Loss that a further byte saves, where seconds cost loss."""
    more = max(1, limits.most_bytes // 1000)
    summed = [v + weight * t for v, t in zip(losses, limits.seconds, strict=True)]
    bounds = []
    for budget in (limits.most_bytes, limits.most_bytes + more):
        solution = solve(limits.bytes, summed, budget, exact=False)
        assert solution is not None
        bounds.append(solution.bound)
    return max(0.0, bounds[0] - bounds[1]) / more


def _exchanged(limits: Limits, losses: Values, reduced: Values, choice: np.ndarray) -> np.ndarray:
    """A choice after changes of one layer, then of two at once, that lower the loss.

    Args:
        limits, losses: of the options.
        reduced: losses to which bytes and seconds are added at their prices: where few changes of
            two layers can be looked at, those are that cost least by them.
        choice: to begin with.
    """
    choice = choice.copy()
    layer = np.concatenate([np.full(len(v), i) for i, v in enumerate(losses)])
    option = np.concatenate([np.arange(len(v)) for v in losses])
    flat = [np.concatenate(list(v)) for v in (limits.bytes, limits.seconds, losses, reduced)]
    starts = np.cumsum([0, *(len(v) for v in losses)])[:-1]
    while True:
        size, seconds, loss, cost = (f - f[starts + choice][layer] for f in flat)
        bytes_free = limits.most_bytes - total(limits.bytes, choice)
        seconds_free = limits.most_seconds * (1 + TOLERANCE) - total(limits.seconds, choice)
        gain = np.where((size <= bytes_free) & (seconds <= seconds_free), -loss, 0.0)
        at = int(np.argmax(gain))
        if gain[at] > 0:
            choice[layer[at]] = option[at]
            continue

        # One layer gives, another takes.
        moves = np.argsort(cost, kind="stable")[: MOVES + len(losses)]
        moves = moves[option[moves] != choice[layer[moves]]]
        size, seconds, loss = size[moves], seconds[moves], loss[moves]
        fits = (size[:, None] + size <= bytes_free) & (seconds[:, None] + seconds <= seconds_free)
        fits &= layer[moves][:, None] != layer[moves]
        gain = np.where(fits, -(loss[:, None] + loss), 0.0)
        if not gain.size or not gain.max() > TOLERANCE * total(losses, choice):
            return choice
        for move in np.unravel_index(int(np.argmax(gain)), gain.shape):
            choice[layer[moves[move]]] = option[moves[move]]


def _search(
    limits: Limits, losses: Values, weight: float, incumbent: float
) -> tuple[np.ndarray, bool]:
    """The best choice with a loss below `incumbent`, by states layer by layer.

    Where there are too many states only those go on whose bounds are best.

    Args:
        limits, losses: of the options.
        weight: loss for a second, at which the relaxed rest bounds what a state can reach.
        incumbent: loss of the best choice so far.

    Returns:
        Options by layer, none where no choice was found to be better; and whether no state was
        dropped that could have been better still.
    """
    summed = [v + weight * t for v, t in zip(losses, limits.seconds, strict=True)]
    hulls = [lower_hull(c, v) for c, v in zip(limits.bytes, summed, strict=True)]
    order = sorted(
        range(len(losses)), key=lambda i: (float(hulls[i].loss[-1] - hulls[i].loss[0]), i)
    )
    bounds = suffix_bounds([hulls[i] for i in order])
    least = np.cumsum([0.0, *(float(limits.seconds[i].min()) for i in reversed(order))])[::-1]
    size = np.zeros(1, dtype=np.int64)
    seconds = np.zeros(1)
    loss = np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    width = max(STATES // sum(map(len, losses)), 64)
    complete = True
    for depth, i in enumerate(order):
        options = len(losses[i])
        size = (size[:, None] + limits.bytes[i]).ravel()
        seconds = (seconds[:, None] + limits.seconds[i]).ravel()
        loss = (loss[:, None] + losses[i]).ravel()

        # A state lives if the rest can be within both limits and could beat the incumbent.
        spots, values = bounds[depth + 1]
        room = limits.most_bytes - size
        reached = loss + weight * (seconds - limits.most_seconds) + np.interp(room, spots, values)
        alive = np.flatnonzero(
            (room >= spots[0])
            & (seconds + least[depth + 1] <= limits.most_seconds * (1 + TOLERANCE))
            & (reached < incumbent - TOLERANCE * abs(incumbent))
        )
        if not len(alive):
            return np.zeros(0, dtype=np.int64), complete
        if len(alive) > width:
            alive = alive[np.argsort(reached[alive], kind="stable")[:width]]
            complete = False
        alive = alive[_undominated(size[alive], seconds[alive], loss[alive])]
        trail.append((alive // options, alive % options))
        size, seconds, loss = size[alive], seconds[alive], loss[alive]

    state = int(np.argmin(loss))
    choice = np.zeros(len(losses), dtype=np.int64)
    for i, (parent, option) in zip(reversed(order), reversed(trail), strict=True):
        choice[i] = option[state]
        state = int(parent[state])
    return choice, complete


def _branched(
    limits: Limits,
    losses: Values,
    reduced: Values,
    weight: float,
    best: np.ndarray,
    bound: float,
) -> tuple[np.ndarray, float]:
    """A better choice and a higher bound, by fixing the layers that matter most, best node first.

    One large layer (a head) can't be divided between two options as a relaxation does: with each of
    them fixed, the bounds of the remaining layers are close.

    Args:
        limits, losses, reduced: of the options.
        weight: loss for a second, near which those of the nodes lie.
        best: the best choice so far.
        bound: below the loss of any choice.
    """
    spread = [float(v.max() - v.min()) for v in reduced]
    order = sorted(range(len(losses)), key=lambda i: (-spread[i], i))
    remaining = SOLVES // sum(map(len, losses))
    nodes: list[tuple[float, int, tuple[int, ...]]] = [(bound, 0, ())]
    count = 0
    while nodes:
        lowest, _, fixed = nodes[0]
        layer = order[len(fixed)] if len(fixed) < len(order) else None
        options = [] if layer is None else _worthwhile(limits, losses, layer)
        if lowest >= total(losses, best) or layer is None or remaining < len(options) * len(NEAR):
            break
        heapq.heappop(nodes)
        remaining -= len(options) * len(NEAR)
        for option in options:
            choices = dict(zip(order, (*fixed, option), strict=False))
            reached, choice = _node(limits, losses, choices, weight)
            if choice is not None:
                choice = _exchanged(limits, losses, reduced, choice)
                best = min(best, choice, key=lambda c: total(losses, c))
            if reached < total(losses, best):
                count += 1
                heapq.heappush(nodes, (max(reached, lowest), count, (*fixed, option)))
    return best, min([total(losses, best), *(node[0] for node in nodes)])


def _node(
    limits: Limits, losses: Values, fixed: dict[int, int], weight: float
) -> tuple[float, np.ndarray | None]:
    """The bound where some layers have fixed options, and the best choice met within the limits."""
    held = {i: slice(k, k + 1) for i, k in fixed.items()}
    every = slice(None)
    parts = [
        [v[held.get(i, every)] for i, v in enumerate(values)]
        for values in (limits.bytes, limits.seconds, losses)
    ]
    inside = Limits(parts[0], parts[1], limits.most_bytes, limits.most_seconds)
    if sum(int(c.min()) for c in inside.bytes) > limits.most_bytes:
        return math.inf, None
    bound, best = -math.inf, None
    for factor in NEAR:
        choice, reached = _relaxed(inside, parts[2], weight * factor)
        bound = max(bound, reached)
        for i, k in fixed.items():
            choice[i] = k
        if limits.in_time(choice) and (best is None or total(losses, choice) < total(losses, best)):
            best = choice
    return bound, best


def _worthwhile(limits: Limits, losses: Values, layer: int) -> list[int]:
    """A layer's options that no other one beats in bytes, seconds and loss."""
    table = np.stack([limits.bytes[layer], limits.seconds[layer], losses[layer]])
    beaten = [
        any(
            (table[:, j] <= table[:, k]).all() and ((table[:, j] < table[:, k]).any() or j < k)
            for j in range(table.shape[1])
            if j != k
        )
        for k in range(table.shape[1])
    ]
    return [k for k, is_beaten in enumerate(beaten) if not is_beaten]


def _undominated(size: np.ndarray, seconds: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices of states, of which many that another one beats in all three are left out.

    Each is held against the best of a few hundred, which is cheaper than against all."""
    order = np.lexsort((loss, seconds, size))
    judges = order[:: max(1, len(order) // 256)]
    beaten = np.zeros(len(order), dtype=bool)
    for judge in judges:
        worse = (size >= size[judge]) & (seconds >= seconds[judge]) & (loss >= loss[judge])
        same = (size == size[judge]) & (seconds == seconds[judge]) & (loss == loss[judge])
        beaten |= worse & ~same
        # Of equals the first stays.
        equal = np.flatnonzero(same)
        beaten[equal[1:]] = True
    return order[~beaten[order]]
