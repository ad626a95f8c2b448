"""Threads give their results in order, and a failure ends them."""

from __future__ import annotations

import time

import pytest
from threadpoolctl import threadpool_info

from mint_mlx.base.threads import in_threads, share_blas, side_by_side, single_blas


@pytest.mark.parametrize("most", [1, 4])
def test_results_come_in_order(most: int) -> None:
    def work(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number**2

    pieces = ((number,) for number in range(20))
    assert list(side_by_side(work, pieces, most)) == [number**2 for number in range(20)]


def test_work_within_work_waits_for_no_thread() -> None:
    def outer(number: int) -> list[int]:
        return list(side_by_side(lambda inner: number * inner, ((i,) for i in range(3)), 4))

    assert list(side_by_side(outer, ((n,) for n in range(8)), 4)) == [
        [0, n, 2 * n] for n in range(8)
    ]


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


def test_the_blas_has_all_its_threads_again() -> None:
    def threads() -> set[int]:
        return {a["num_threads"] for a in threadpool_info() if a["user_api"] == "blas"}

    share_blas(True)
    before = threads()
    share_blas(False)
    assert threads() == {1}
    with single_blas():
        assert threads() == {1}
    share_blas(True)
    assert threads() == before
