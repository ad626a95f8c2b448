"""Levels of effort: what a conversion sees, and how it rounds.

Each is a named objective and a named quantizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..base.errors import UsageError
from .objectives import OBJECTIVES


@dataclass(frozen=True)
class Effort:
    """One level.

    Attributes:
        sees: what it is made from, for people.
        objective: a name of objectives.OBJECTIVES.
        quantizer: a name of converters.quantizers.registry.QUANTIZERS.
        samples: how much text the model writes for it, in units of TOKENS.
        refine: whether scales and biases are distilled end to end afterwards, where the result fits
            in memory.
    """

    sees: str
    objective: str
    quantizer: str
    samples: int = 1
    refine: bool = False

    def objective_for(self, feedback: bool) -> str:
        """The level's objective, or the one in its place for a quantizer without error feedback."""
        other = OBJECTIVES[self.objective].without_feedback
        return other if other and not feedback else self.objective

    @property
    def tokens(self) -> int:
        """Tokens that the model writes."""
        return self.samples * TOKENS


EFFORTS = {
    "fast": Effort("weights only", "prior", "search"),
    "balanced": Effort(
        "weights, and text that the model wrote itself", "fisher-gptq", "search-gptaq"
    ),
    "best": Effort(
        "weights, and text that the model wrote itself",
        "fisher-gptq",
        "learn",
        samples=4,
        refine=True,
    ),
}
DEFAULT = "balanced"
# On models other than demo-moe the true KL was SPREAD times the expected one
# (docs/research-log.md).
SPREAD = (0.2, 5.5)
# Tokens that go to other experts cost in proportion to the errors, not to their squares as the
# expectation does: the more beyond it, the less is expected. Nats at an expectation of one.
SWAPPED = 0.09
MIN_TOKENS = 1024  # fewest tokens that a sensitivity can be measured on
TOKENS = 16_384  # that the model writes for its sensitivity


def expected_kl(objective: str | None, quantizer: str, loss: float | None) -> float | None:
    """A plan's expected KL divergence from the source, nats per token; None where none is known."""
    if loss is None or objective not in OBJECTIVES:
        return None
    factor = OBJECTIVES[objective].expectation.get(quantizer)
    return None if factor is None else loss * factor


def band(value: float | None) -> tuple[float, float] | None:
    """The lowest and the highest true KL that an expected one stands for; None for None."""
    if value is None:
        return None
    return value * SPREAD[0], max(value * SPREAD[1], value + SWAPPED * value**0.5)


def band_text(value: float) -> str:
    """An expected KL as people read it, e.g. `0.1 to 3`."""
    low, high = band(value) or (0.0, 0.0)
    return f"{low:.2g} to {high:.2g}"


def expectation(objective: str | None, quantizer: str, loss: float | None) -> str:
    """The expected KL as the end of a sentence; '' where none is known."""
    value = expected_kl(objective, quantizer, loss)
    if value is None:
        return ""
    return f"; expected KL from the source {band_text(value)} nats a token"


def refines(effort: str, quantizer: str) -> bool:
    """Whether a plan of this level and quantizer ends with distillation."""
    return effort in EFFORTS and EFFORTS[effort].refine and quantizer == EFFORTS[effort].quantizer


def level_with(sensitivity: bool) -> str:
    """The level that a plan made with, or without, a sensitivity belongs to."""
    return "balanced" if sensitivity else "fast"


def effort_name(name: str | None) -> str:
    """The name of the level asked for, or of the default one.

    Raises:
        UsageError: there is none of that name.
    """
    name = DEFAULT if name is None else name
    if name not in EFFORTS:
        raise UsageError(f"--effort must be one of {', '.join(EFFORTS)} (got {name})")
    return name


def check_tokens(count: int | None) -> None:
    """Refuse a number of tokens that is too small to measure a sensitivity on.

    Raises:
        UsageError: it has fewer than MIN_TOKENS tokens.
    """
    if count is not None and count < MIN_TOKENS:
        raise UsageError(
            f"{count} tokens are too few to measure anything on: give --tokens {MIN_TOKENS} or more"
        )
