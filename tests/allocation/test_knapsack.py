"""The knapsack: feasible, exact on small problems, within its own reported gap on larger ones."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_mlx.allocation.knapsack import solve

Problem = tuple[list[np.ndarray], list[np.ndarray]]


@st.composite
def problems(draw: st.DrawFn, max_layers: int = 6, max_options: int = 4) -> Problem:
    costs, losses = [], []
    for _ in range(draw(st.integers(1, max_layers))):
        n = draw(st.integers(1, max_options))
        cost = draw(st.lists(st.integers(1, 60), min_size=n, max_size=n))
        loss = draw(st.lists(st.integers(0, 60), min_size=n, max_size=n))
        costs.append(np.array(cost, dtype=np.int64))
        losses.append(np.array(loss, dtype=np.float64))
    return costs, losses


def brute_force(costs: list[np.ndarray], losses: list[np.ndarray], budget: int) -> float:
    best = np.inf
    for choice in itertools.product(*(range(len(c)) for c in costs)):
        if sum(c[k] for c, k in zip(costs, choice, strict=True)) <= budget:
            best = min(best, sum(v[k] for v, k in zip(losses, choice, strict=True)))
    return float(best)


@settings(max_examples=300)
@given(problems(), st.integers(0, 400))
def test_small_problems_are_solved_exactly(problem: Problem, budget: int) -> None:
    costs, losses = problem
    solution = solve(costs, losses, budget)
    best = brute_force(costs, losses, budget)
    if solution is None:
        assert best == np.inf
        return
    size = sum(int(c[k]) for c, k in zip(costs, solution.choice, strict=True))
    assert solution.bytes == size <= budget
    assert solution.loss == pytest.approx(best)
    assert solution.bound <= best + 1e-9


def realistic(layers: int, seed: int, options: int = 18) -> Problem:
    """Layers of very different sizes, errors that fall by 6 dB a bit with some noise."""
    rng = np.random.default_rng(seed)
    costs, losses = [], []
    for _ in range(layers):
        size = int(10 ** rng.uniform(3.5, 7.5))
        bits = np.sort(rng.uniform(2.2, 9.0, options))
        costs.append((size * bits / 8).astype(np.int64))
        sensitivity = 10 ** rng.uniform(-1, 1)
        noise = rng.uniform(0.8, 1.25, options)
        losses.append(size * sensitivity * 4.0**-bits * noise)
    return costs, losses


def middle(costs: list[np.ndarray], share: float = 0.4) -> int:
    low, high = sum(int(c.min()) for c in costs), sum(int(c.max()) for c in costs)
    return int(low + share * (high - low))


@pytest.mark.parametrize("seed", range(4))
def test_the_reported_gap_holds_against_an_exact_solver(seed: int) -> None:
    costs, losses = realistic(60, seed, options=8)
    budget = middle(costs)
    solution = solve(costs, losses, budget)
    assert solution is not None
    assert solution.bytes <= budget
    best = milp(costs, losses, budget)
    assert solution.bound <= best * (1 + 1e-6)
    # HiGHS itself stops some 1e-6 above the optimum, or exceeds the budget by as much
    assert best * (1 - 1e-5) <= solution.loss <= best * (1 + solution.gap + 1e-5)
    if solution.optimal:
        assert solution.loss == pytest.approx(best, rel=1e-4)


def milp(costs: list[np.ndarray], losses: list[np.ndarray], budget: int) -> float:
    import highspy

    h = highspy.Highs()
    h.setOptionValue("output_flag", False)
    h.setOptionValue("mip_rel_gap", 1e-8)
    h.setOptionValue("mip_abs_gap", 0.0)

    # One option a layer, within the budget.
    scale = float(np.median(np.concatenate(losses))) / 100
    picks = [[h.addBinary(obj=float(x) / scale) for x in v] for v in losses]
    for row in picks:
        h.addConstr(sum(row[1:], row[0]) == 1)
    terms = [
        x * (float(c) / budget)
        for row, cost in zip(picks, costs, strict=True)
        for x, c in zip(row, cost, strict=True)
    ]
    h.addConstr(sum(terms[1:], terms[0]) <= 1)
    h.minimize()

    chosen = [int(np.argmax([h.val(x) for x in row])) for row in picks]
    assert sum(int(c[k]) for c, k in zip(costs, chosen, strict=True)) <= budget * (1 + 1e-6)
    return float(sum(v[k] for v, k in zip(losses, chosen, strict=True)))


@given(st.integers(0, 10_000), st.floats(0, 0.9), st.floats(0.001, 0.1))
@settings(max_examples=25, deadline=None)
def test_more_bytes_never_cost_more_than_the_gap(seed: int, share: float, more: float) -> None:
    costs, losses = realistic(40, seed, options=6)
    small, large = (solve(costs, losses, middle(costs, s)) for s in (share, share + more))
    assert small is not None
    assert large is not None
    assert large.loss <= small.loss / (1 - min(large.gap, 0.999)) + 1e-12


def test_a_whole_model_is_allocated_closely_and_the_same_every_time() -> None:
    costs, losses = realistic(2400, 0)
    start = time.perf_counter()
    first = solve(costs, losses, middle(costs))
    seconds = time.perf_counter() - start
    assert first is not None
    assert first.gap < 1e-4
    assert first == solve(costs, losses, middle(costs))
    assert seconds < 5  # 0.3 s is the promise, measured by eval/bench; this only catches a blunder


def test_nothing_to_choose() -> None:
    assert solve([], [], 0) is not None
    assert solve([np.array([5])], [np.array([1.0])], 4) is None
    solution = solve([np.array([5])], [np.array([1.0])], 5)
    assert solution is not None
    assert solution.choice == (0,)
    assert solution.optimal
