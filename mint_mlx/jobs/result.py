"""A finished conversion, and how it is told: in one line, and as one JSON object."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..allocation.plan import Plan
from ..base.one_line import one_line
from ..base.units import both, human
from ..checkpoint.layers import Inventory
from ..rules import efforts
from ..runtime.speed_table import describe_speed


@dataclass(frozen=True, repr=False)
class Result:
    """A finished conversion.

    Attributes:
        path: the checkpoint's folder.
        plan: what was carried out.
        inventory: the model's layers.
        bytes: of all safetensors files.
        active_bytes: that a decoded token reads.
        active_ratio: the same relative to uniform 4bit-g64.
        sentence: what the result wrote, where it was asked to and could.
        seconds: that it took.
    """

    path: Path
    plan: Plan
    inventory: Inventory
    bytes: int
    active_bytes: int
    active_ratio: float
    sentence: str | None
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        """Bits of all files over the number of weights."""
        return self.bytes * 8 / self.inventory.parameters

    def __repr__(self) -> str:
        return one_line(
            self,
            human(self.bytes),
            f"{self.bits_per_weight:.2f} bits per weight",
            self.plan.quantizer,
            f"path={str(self.path)!r}",
        )


def summary(result: Result) -> dict[str, Any]:
    """A finished conversion as one JSON object."""
    plan = result.plan
    expected = efforts.expected_kl(plan.objective, plan.quantizer, plan.loss)
    return {
        "path": str(result.path),
        "source": plan.origin.source,
        "revision": plan.origin.revision,
        "bytes": result.bytes,
        "budget_bytes": plan.budget_bytes,
        "bits_per_weight": round(result.bits_per_weight, 4),
        "parameters": result.inventory.parameters,
        "active_bytes": result.active_bytes,
        "active_bytes_ratio": round(result.active_ratio, 4),
        "recipe": plan.recipe,
        "objective": plan.objective,
        "quantizer": plan.quantizer,
        "loss": plan.loss,
        "expected_kl": expected,
        "expected_kl_band": efforts.band(expected),
        "gap": plan.gap,
        **({"predicted_speed": asdict(plan.speed)} if plan.speed else {}),
        "sentence": result.sentence,
        "seconds": round(result.seconds, 2),
    }


def describe(result: Result) -> str:
    """A finished conversion in one line."""
    plan = result.plan
    return (
        f"{result.path}: {both(result.bytes)}, {result.bits_per_weight:.2f} bits per weight; "
        f"decoding reads {human(result.active_bytes)} a token, {result.active_ratio:.2f}x of "
        "uniform 4bit-g64"
        f"{efforts.expectation(plan.objective, plan.quantizer, plan.loss)}{_gap(plan)}"
        f"{f'; {describe_speed(plan.speed)}' if plan.speed else ''}"
    )


def _gap(plan: Plan) -> str:
    """How far the choice may be from the best one, as the end of a sentence."""
    if plan.gap is None:
        return ""
    if plan.gap == 0:
        return "; no choice of layers has a lower loss"
    return f"; at most {plan.gap:.3%} from the best choice"
