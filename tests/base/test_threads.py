"""Threads give their results in order, and a failure ends them."""

from __future__ import annotations

import time

import pytest

from mint_mlx.base.threads import in_threads, side_by_side


@pytest.mark.parametrize("most", [1, 4])
def test_results_come_in_order(most: int) -> None:
    def work(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number**2

    pieces = ((number,) for number in range(20))
    assert list(side_by_side(work, pieces, most)) == [number**2 for number in range(20)]


def test_after_a_failure_nothing_goes_on() -> None:
    ran = []

    def work(number: int) -> None:
        ran.append(number)
        if number == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_threads(work, ((number,) for number in range(100)), 4)
    count = len(ran)
    time.sleep(0.01)
    assert len(ran) == count < 100
