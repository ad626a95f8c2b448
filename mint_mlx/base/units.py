"""Sizes: what a user may write as a budget, and how sizes are printed.

"GB" (or "G") is 10^9 bytes, "GiB" is 2^30. A budget is a number of bytes of all safetensors files
together, a number of bits per weight (all file bytes x 8 / parameters), or `smallest`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal

from .errors import UsageError

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_LOWER = {unit.lower(): factor for unit, factor in UNITS.items()}
_SHORT = {"K": "KB", "M": "MB", "G": "GB", "T": "TB"}  # decimal, as 19G of a download page
_BUDGET = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(?P<unit>[A-Za-z]*)")
EXAMPLES = "write it like 19GB, 17.5GiB, 900MB, 123456B, 4.5bpw or smallest"


@dataclass(frozen=True)
class Budget:
    """A size as the user gave it. `text` is the user's own, for plans and messages."""

    text: str
    bytes: int | None = None
    bits_per_weight: Decimal | None = None

    def resolve(self, parameters: int) -> int | None:
        """The budget in bytes for a model of this many parameters; None means `smallest`."""
        if self.bits_per_weight is not None:
            return int(self.bits_per_weight * parameters / 8)
        return self.bytes


def parse_budget(text: str) -> Budget:
    """Read a budget.

    Raises:
        UsageError: the text is negative, zero, has no unit or one that could mean two things.
    """
    text = text.strip()
    if text == "smallest":
        return Budget(text)
    if text.startswith("-"):
        raise UsageError(f"the budget {text!r} is negative: {EXAMPLES}")
    match = _BUDGET.fullmatch(text)
    if not match:
        raise UsageError(f"{text!r} is not a size: {EXAMPLES}")
    number = Decimal(match["number"])
    if number == 0:
        raise UsageError(f"the budget {text!r} is zero: {EXAMPLES}")
    if match["unit"].lower() in ("bpw", "bits"):
        return Budget(text, bits_per_weight=number)

    unit = _unit_bytes(match["unit"], text)
    size = int(number * unit)  # 17.3GiB is no whole number of bytes
    if size > 10**18:
        raise UsageError(f"the budget {text!r} is larger than any model: {EXAMPLES}")
    if size == 0 or (unit == 1 and size != number):
        raise UsageError(f"the budget {text!r} is not a whole number of bytes: {EXAMPLES}")
    return Budget(text, bytes=size)


def _unit_bytes(unit: str, text: str) -> int:
    """Bytes of a unit as written in the budget `text`; capitals may be missing, never mixed.

    Raises:
        UsageError: there is no unit, an unknown one or one that could mean two things.
    """
    unit = _SHORT.get(unit.upper(), unit)
    if unit in UNITS:
        return UNITS[unit]
    if unit == unit.lower() and unit in _LOWER:
        return _LOWER[unit]
    if unit == "kB":
        return UNITS["KB"]
    if not unit:
        raise UsageError(f"the budget {text!r} has no unit: {EXAMPLES}")
    if unit.lower() not in _LOWER:
        raise UsageError(f"{text!r} has an unknown unit: {EXAMPLES}")
    raise UsageError(
        f"the unit of {text!r} is ambiguous (GB is 10^9 bytes, GiB is 2^30): {EXAMPLES}"
    )


def human(size: float, up: bool = False) -> str:
    """A size in decimal units, e.g. `17.18 GB`; `up` rounds up, for sizes that must suffice."""
    unit = decimal_unit(size)
    return f"{size:.0f} B" if unit == "B" else f"{_places(size / UNITS[unit], up)} {unit}"


def _places(value: float, up: bool) -> str:
    return f"{math.ceil(value * 100) / 100 if up else value:.2f}"


def decimal_unit(size: float) -> str:
    """The largest decimal unit that is not larger than a size."""
    return next((unit for unit in ("TB", "GB", "MB", "KB") if abs(size) >= UNITS[unit]), "B")


def both(size: float, up: bool = False) -> str:
    """A size in decimal and binary units, e.g. `17.18 GB (16.00 GiB)`; `up` rounds it up."""
    for decimal, binary in (("TB", "TiB"), ("GB", "GiB"), ("MB", "MiB")):
        if abs(size) >= UNITS[decimal]:
            return (
                f"{_places(size / UNITS[decimal], up)} {decimal} "
                f"({_places(size / UNITS[binary], up)} {binary})"
            )
    return human(size, up)


def count(number: float) -> str:
    """A count of parameters, e.g. `30.5B`."""
    for unit, factor in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(int(number))


def duration(seconds: float) -> str:
    """A duration, e.g. `2 h 05 min`, `3 min 20 s` or `12 s`."""
    total = round(seconds)
    if total >= 3600:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    if total >= 60:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total} s" if seconds >= 10 else f"{seconds:.1f} s"
