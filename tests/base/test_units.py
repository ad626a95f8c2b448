"""Budgets as users write them."""

from __future__ import annotations

import pytest

from mint_mlx.base.errors import UsageError
from mint_mlx.base.units import both, parse_budget


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("19GB", 19 * 10**9),
        ("17.5GiB", 17.5 * 2**30),
        ("17.3GiB", 18_575_733_555),
        ("900MB", 900 * 10**6),
        ("900 MB", 900 * 10**6),
        ("123456B", 123456),
        ("1.5gb", 15 * 10**8),
        ("2gib", 2**31),
        ("700kB", 700_000),
        ("19G", 19 * 10**9),
        ("900m", 900 * 10**6),
    ],
)
def test_sizes(text: str, size: float) -> None:
    assert parse_budget(text).resolve(10) == size


def test_bits_per_weight_count_the_parameters() -> None:
    assert parse_budget("4.5bpw").resolve(1_000_000) == 562_500
    assert parse_budget("smallest").resolve(1_000_000) is None


@pytest.mark.parametrize(
    "text",
    [
        "19",
        "19Gb",
        "-3GB",
        "0GB",
        "",
        "GB",
        "nine GB",
        "1e9B",
        "1.5B",
        "0.0004KB",
        "9" * 420 + "GiB",
        "4,5bpw",
        "nan",
        "4xb",
    ],
)
def test_ambiguous_or_impossible_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write it like"):
        parse_budget(text)


def test_sizes_are_printed_in_both_units() -> None:
    assert both(17_179_869_184) == "17.18 GB (16.00 GiB)"


def test_a_smallest_size_is_one_that_can_be_typed() -> None:
    """Rounded down it would be refused."""
    text = both(6_720_992, up=True).split(" (")[0]
    assert text == "6.73 MB"
    assert parse_budget(text).bytes >= 6_720_992
