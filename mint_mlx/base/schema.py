"""What numbers in files may be: type, shape, range, and finite. Files may come from strangers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

FLOAT = "f"
INTEGER = "iu"
BOOL = "b"


def number(value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number in a range, as a float.

    Raises:
        ValueError: it is something else.
    """
    is_number = type(value) is float or (type(value) is int and abs(value) < 2**1000)
    if not is_number or not low <= value <= high or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number between {low} and {high}")
    return float(value)


def integer(value: Any, low: int, high: int) -> int:
    """An integer in a range.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{value!r} is no integer between {low} and {high}")
    return value


def text(value: Any) -> str:
    """A string.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def optional_text(value: Any) -> str | None:
    """A string or None.

    Raises:
        ValueError: it is something else.
    """
    return None if value is None else text(value)


def check_array(
    array: np.ndarray,
    kinds: str,
    shape: Sequence[int | None],
    low: float = -math.inf,
    high: float = math.inf,
) -> np.ndarray:
    """An array of a type and a shape with finite values in a range.

    Args:
        array: to check.
        kinds: numpy's letters of the types that are allowed (FLOAT, INTEGER, BOOL).
        shape: None for any size of an axis.
        low, high: the range, both included; low = -inf and high = inf still refuse infinity.

    Raises:
        ValueError: it is something else.
    """
    if array.dtype.kind not in kinds or array.ndim != len(shape):
        raise ValueError(f"{array.dtype} {array.shape} is of another kind")
    if any(size is not None and size != n for size, n in zip(shape, array.shape, strict=True)):
        raise ValueError(f"{array.shape} should be {tuple(shape)}")
    if array.size and array.dtype.kind != BOOL:
        least, most = float(array.min()), float(array.max())  # NaN where one value is NaN
        if not (low <= least and most <= high and math.isfinite(least) and math.isfinite(most)):
            raise ValueError(f"values from {least} to {most} should lie from {low} to {high}")
    return array
