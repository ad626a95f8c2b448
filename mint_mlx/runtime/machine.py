"""What a user may say of the machine that a model must run on (no MLX is imported here)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..base.errors import UsageError
from ..base.quant_config import AFFINE_BITS
from ..base.units import parse_budget

THIS_MAC = "this-mac"
CONTEXT = 8192  # tokens, where nothing else is said
KV_BITS = AFFINE_BITS  # mlx-lm's --kv-bits quantizes keys and values as weights are


@dataclass(frozen=True)
class Machine:
    """A machine that a model must fit.

    Attributes:
        text: as the user wrote it.
        memory: bytes; None for the machine that this runs on.
    """

    text: str
    memory: int | None = None


def parse_machine(text: str) -> Machine:
    """Read `this-mac`, or the memory of a Mac such as `32GiB` or `32`.

    Raises:
        UsageError: it is neither.
    """
    if text == THIS_MAC:
        return Machine(text)
    # A Mac "with 16" has 16 GiB.
    try:
        memory = parse_budget(f"{text}GiB" if re.fullmatch(r"[0-9]+", text) else text).bytes
    except UsageError:
        memory = None
    if memory is None:
        raise UsageError(f"--fit must be this-mac, or a memory size such as 32GiB (got {text})")
    return Machine(text, memory)


def check_context(context: int, kv_bits: int | None) -> None:
    """Refuse an impossible context, or bits that mlx-lm's cache doesn't have (a UsageError)."""
    if context < 1:
        raise UsageError(
            f"a context of {context} tokens is impossible: give --context 32768, for example"
        )
    if kv_bits is not None and kv_bits not in KV_BITS:
        bits = ", ".join(map(str, KV_BITS))
        raise UsageError(f"--kv-bits must be one of {bits} (got {kv_bits})")
