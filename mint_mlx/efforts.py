"""Levels of effort: what a conversion looks at, and how it rounds. Each is a named objective and a named quantizer."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UsageError


@dataclass(frozen=True)
class Effort:
    """One level.

    Attributes:
        sees: what it looks at, for people.
        objective: a name of objectives.OBJECTIVES.
        quantizer: a name of converters.quantizers.QUANTIZERS.
    """

    sees: str
    objective: str
    quantizer: str


EFFORTS = {
    "fast": Effort("weights only", "prior", "rtn"),
    "balanced": Effort("weights, and text that the model wrote itself", "fisher", "gptq"),
}
DEFAULT = "balanced"
TOKENS = 16_384  # of the model's own, that a sensitivity is measured on


def effort_name(name: str | None) -> str:
    """The level asked for, or the default.

    Raises:
        UsageError: there is none of that name.
    """
    name = DEFAULT if name is None else name
    if name not in EFFORTS:
        raise UsageError(f"--effort {name} is unknown: there are {', '.join(EFFORTS)}")
    return name
