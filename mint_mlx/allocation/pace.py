"""How fast a plan should decode: what a user asks for, and what that leaves for the layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..base.errors import MintError, UsageError
from ..base.quant_config import QuantConfig
from ..base.units import both
from ..checkpoint.layers import Inventory
from ..runtime.speed_table import (
    Speed,
    SpeedTable,
    decode_seconds,
    figure,
    is_timed,
    layer_seconds,
    predict,
    rest_seconds,
)
from .two_limits import Limits, fastest
from .uniform import comparable_choice

BASELINE = QuantConfig(4, 64)
_RATIO = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)x")


@dataclass(frozen=True)
class Goal:
    """A least speed, as a user words it.

    Attributes:
        text: `40 tokens/s`, or `0.95x`.
        tokens_per_second: the least; None where it is a ratio.
        ratio: of the speed that uniform 4bit-g64 is predicted to have.
    """

    text: str
    tokens_per_second: float | None = None
    ratio: float | None = None


def parse_goal(min_speed: float | None, speed: str | None) -> Goal | None:
    """Read --min-speed and --speed; None where neither is given.

    Raises:
        UsageError: both are given, or one is no speed.
    """
    if min_speed is not None and speed is not None:
        raise UsageError("give either --min-speed or --speed")
    if min_speed is not None:
        if not 0 < min_speed < math.inf:
            raise UsageError(f"--min-speed must be tokens per second above 0 (got {min_speed:g})")
        return Goal(f"{min_speed:g} tokens/s", tokens_per_second=float(min_speed))
    if speed is None:
        return None
    match = _RATIO.fullmatch(speed.strip())
    if match is None or not float(match[1]) > 0:
        raise UsageError(
            f"--speed must be a multiple of uniform 4bit-g64's, such as 0.95x (got {speed})"
        )
    return Goal(f"{speed.strip()} of uniform 4bit-g64", ratio=float(match[1]))


@dataclass(frozen=True)
class Pace:
    """What a choice is predicted to decode at, and the least that is asked for.

    Attributes:
        table: of the machine.
        context: tokens in the cache.
        goal: None where speeds are only told.
        thorough: let searches follow that take seconds, for the best choice.
    """

    table: SpeedTable
    context: int
    goal: Goal | None = None
    thorough: bool = True


def predicted(
    pace: Pace | None, inventory: Inventory, choice: Mapping[str, QuantConfig]
) -> Speed | None:
    """How fast a choice decodes; None where the table doesn't know one of its layers."""
    if pace is None:
        return None
    timed = all(is_timed(pace.table, layer, choice[layer.path]) for layer in inventory.layers)
    return predict(pace.table, inventory, choice, pace.context) if timed else None


def goal_speed(pace: Pace, inventory: Inventory) -> float:
    """The least tokens per second that are asked for.

    Raises:
        MintError: the table doesn't know what uniform 4bit-g64 takes.
    """
    assert pace.goal is not None
    if pace.goal.tokens_per_second is not None:
        return pace.goal.tokens_per_second
    assert pace.goal.ratio is not None
    baseline = comparable_choice(inventory, BASELINE)
    return pace.goal.ratio / decode_seconds(pace.table, inventory, baseline, pace.context)


def timed_candidates(
    pace: Pace, inventory: Inventory, options: dict[str, tuple[QuantConfig, ...]]
) -> dict[str, tuple[QuantConfig, ...]]:
    """The candidates whose times the table knows.

    Raises:
        MintError: a layer has none.
    """
    timed = {}
    for layer in inventory.layers:
        known = tuple(c for c in options[layer.path] if is_timed(pace.table, layer, c))
        if not known:
            layer_seconds(pace.table, layer, options[layer.path][0])  # says what is missing
        timed[layer.path] = known
    return timed


def candidate_seconds(
    pace: Pace, inventory: Inventory, options: Mapping[str, Sequence[QuantConfig]]
) -> list[np.ndarray]:
    """Seconds of each candidate, float64 (candidates,), by layer."""
    return [
        np.array([layer_seconds(pace.table, layer, c) for c in options[layer.path]])
        for layer in inventory.layers
    ]


def seconds_for_layers(pace: Pace, inventory: Inventory) -> float:
    """What all layers together may take, so that the goal is reached; below 0 where none is.

    Raises:
        MintError: the table is of another model.
    """
    rest = rest_seconds(pace.table, inventory, pace.context)
    return 1 / goal_speed(pace, inventory) - rest


def too_fast(pace: Pace, inventory: Inventory, limits: Limits, size: int) -> MintError:
    """Why no choice within a size is fast enough, and what is possible.

    Args:
        pace: has the goal.
        inventory: the model's layers.
        limits: bytes and seconds of the candidates.
        size: bytes that were asked for.
    """
    rest = rest_seconds(pace.table, inventory, pace.context)
    quick = fastest(limits)
    anywhere = sum(float(seconds.min()) for seconds in limits.seconds)
    best = 1 / (anywhere + rest)
    within = 1 / (quick.loss + rest) if quick is not None else 0.0
    larger = ""
    if best > 1.01 * within:
        larger = f", and {figure(best)} at a larger size"
    assert pace.goal is not None
    goal = pace.goal.text
    if pace.goal.ratio is not None:
        goal += f" ({figure(goal_speed(pace, inventory))} tokens/s)"
    return MintError(
        f"{goal} at a context of {pace.context} "
        f"is more than this model is predicted to decode on {pace.table.machine} in {both(size)}: "
        f"at most {figure(within)} tokens/s are possible there{larger}"
    )
