"""Levels of effort: what a conversion looks at, and how it rounds. Each is a named objective and a
named quantizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..base.errors import UsageError


@dataclass(frozen=True)
class Effort:
    """One level.

    Attributes:
        sees: what it looks at, for people.
        objective: a name of objectives.OBJECTIVES.
        quantizer: a name of converters.quantizers.QUANTIZERS.
        samples: how much text of its own the model writes for it, in units of TOKENS.
        refine: whether scales and biases are distilled end to end afterwards, where the result fits
            in memory.
    """

    sees: str
    objective: str
    quantizer: str
    samples: int = 1
    refine: bool = False

    def objective_for(self, quantizer: str) -> str:
        """The objective where another quantizer than the level's own is named: without feedback
        nothing is left out.
        """
        return (
            "fisher" if self.objective == "fisher-gptq" and quantizer == "rtn" else self.objective
        )

    @property
    def tokens(self) -> int:
        """Tokens that the model writes."""
        return self.samples * TOKENS


EFFORTS = {
    "fast": Effort("weights only", "prior", "rtn"),
    "balanced": Effort("weights, and text that the model wrote itself", "fisher-gptq", "gptq"),
    "best": Effort(
        "weights, and text that the model wrote itself",
        "fisher-gptq",
        "learn",
        samples=4,
        refine=True,
    ),
}
DEFAULT = "balanced"
# Measured KL over what the objective predicts, by quantizer, fitted on demo-moe from 3 to 5 bits
# per weight. On other models the true KL lay between SPREAD times the product
# (docs/research-log.md).
LEFT = {
    "fisher": {"rtn": 1.0, "gptq": 0.65, "learn": 0.35},
    "fisher-gptq": {"gptq": 1.2, "learn": 0.6},
}
SPREAD = (0.2, 5.5)
LEAST = 1024  # tokens that say anything
TOKENS = 16_384  # of the model's own, that a sensitivity is measured on


def expected_kl(objective: str | None, quantizer: str, loss: float | None) -> float | None:
    """The KL divergence from the source that a plan is expected to have, in nats per token, where
    it can be told.
    """
    factor = LEFT.get(objective or "", {}).get(quantizer)
    return loss * factor if loss is not None and factor is not None else None


def expectation(objective: str | None, quantizer: str, loss: float | None) -> str:
    """The same as a sentence's end, with the error of such predictions; '' where there is none."""
    value = expected_kl(objective, quantizer, loss)
    if value is None:
        return ""
    low, high = SPREAD
    return (
        f"; expected KL from the source {value:.2g} nats a token (on other models the true one was "
        f"{low} to {high}x)"
    )


def refines(effort: str, quantizer: str) -> bool:
    """Whether a plan of this level and quantizer ends with distillation."""
    return effort in EFFORTS and EFFORTS[effort].refine and quantizer == EFFORTS[effort].quantizer


def level_with(sensitivity: bool) -> str:
    """The level whose objective and quantizer serve where a sensitivity is there, or isn't."""
    return "balanced" if sensitivity else "fast"


def effort_name(name: str | None) -> str:
    """The level asked for, or the default.

    Raises:
        UsageError: there is none of that name.
    """
    name = DEFAULT if name is None else name
    if name not in EFFORTS:
        raise UsageError(f"--effort {name} is unknown: there are {', '.join(EFFORTS)}")
    return name


def check_tokens(count: int | None) -> None:
    """Refuse to look at too little text (a UsageError)."""
    if count is not None and count < LEAST:
        raise UsageError(
            f"{count} tokens are too few to learn anything from: give --tokens {LEAST} or more"
        )
