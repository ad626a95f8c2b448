"""Least loss within bytes and seconds: exact on small problems, within its gap on larger ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_mlx.allocation.knapsack import solve
from mint_mlx.allocation.two_limits import Limits, solve_both, total

Problem = tuple[Limits, list[np.ndarray]]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    columns: list[list[np.ndarray]] = [[], [], []]
    for _ in range(draw(st.integers(1, 5))):
        n = draw(st.integers(1, 4))
        for column in columns:
            values = draw(st.lists(st.integers(1, 30), min_size=n, max_size=n))
            column.append(np.array(values))
    sizes, seconds, losses = columns
    most_bytes = draw(st.integers(1, 150))
    most_seconds = float(draw(st.integers(1, 150)))
    limits = Limits(sizes, [s.astype(float) for s in seconds], most_bytes, most_seconds)
    return limits, [v.astype(float) for v in losses]


@settings(max_examples=200, deadline=None)
@given(problems())
def test_small_problems_are_solved_exactly(problem: Problem) -> None:
    limits, losses = problem
    choices = map(np.array, itertools.product(*(range(len(v)) for v in losses)))
    best = min((total(losses, c) for c in choices if limits.allow(c)), default=np.inf)
    solution = solve_both(limits, losses)
    if solution is None:
        assert best == np.inf
        return
    assert limits.allow(np.array(solution.choice)) or best == np.inf
    if best < np.inf:
        assert solution.loss == pytest.approx(best)
        assert solution.bound <= best + 1e-9


def realistic(layers: int, seed: int, options: int = 12) -> Problem:
    """Layers of very different sizes; some bits are slow, as odd shapes make them."""
    rng = np.random.default_rng(seed)
    sizes, seconds, losses = [], [], []
    for _ in range(layers):
        size = int(10 ** rng.uniform(3.5, 7.5))
        bits = np.sort(rng.uniform(2.2, 9.0, options))
        sizes.append((size * bits / 8).astype(np.int64))
        seconds.append(size * bits / 8 / 1e11 * rng.choice([1.0, 1.3], options))
        losses.append(
            size * 10 ** rng.uniform(-1, 1) * 4.0**-bits * rng.uniform(0.8, 1.25, options)
        )
    low, high = (sum(int(pick(c)) for c in sizes) for pick in (np.min, np.max))
    budget = int(low + 0.4 * (high - low))
    unlimited = solve(sizes, losses, budget)
    assert unlimited is not None
    return Limits(sizes, seconds, budget, 0.93 * total(seconds, unlimited.choice)), losses


@pytest.mark.parametrize("seed", range(2))
def test_the_reported_gap_holds_against_an_exact_solver(seed: int) -> None:
    limits, losses = realistic(25, seed, options=6)
    solution = solve_both(limits, losses)
    assert solution is not None
    assert limits.allow(np.array(solution.choice))
    best = milp(limits, losses)
    assert solution.bound <= best * (1 + 1e-6)
    assert best * (1 - 1e-5) <= solution.loss <= best * (1 + solution.gap + 1e-5)
    assert solution.gap < 0.05
    assert solution.loss <= best * 1.01


def milp(limits: Limits, losses: list[np.ndarray]) -> float:
    import highspy

    h = highspy.Highs()
    h.setOptionValue("output_flag", False)
    h.setOptionValue("mip_rel_gap", 1e-6)
    scale = float(np.median(np.concatenate(losses))) / 100
    picks = [[h.addBinary(obj=float(x) / scale) for x in v] for v in losses]
    for row in picks:
        h.addConstr(sum(row[1:], row[0]) == 1)
    for values, most in (
        (limits.bytes, limits.most_bytes),
        (limits.seconds, limits.most_seconds),
    ):
        terms = [
            x * float(value / most)
            for row, column in zip(picks, values, strict=True)
            for x, value in zip(row, column, strict=True)
        ]
        h.addConstr(sum(terms[1:], terms[0]) <= 1)
    h.minimize()
    chosen = [int(np.argmax([h.val(x) for x in row])) for row in picks]
    return total(losses, chosen)


def test_a_whole_model_is_allocated_closely_and_the_same_every_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mint_mlx.allocation.two_limits.SOLVES", 20_000)
    limits, losses = realistic(60, 0)
    first = solve_both(limits, losses)
    assert first is not None
    assert first.gap < 2e-2
    assert first == solve_both(limits, losses)


def test_seconds_that_don_t_bind_change_nothing() -> None:
    limits, losses = realistic(30, 5)
    free = Limits(limits.bytes, limits.seconds, limits.most_bytes, 1e9)
    assert solve_both(free, losses) == solve(limits.bytes, losses, limits.most_bytes)


def test_what_no_choice_is_fast_enough_for_is_refused() -> None:
    limits, losses = realistic(30, 6)
    assert solve_both(Limits(limits.bytes, limits.seconds, limits.most_bytes, 0.0), losses) is None
