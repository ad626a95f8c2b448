"""How much of each layer a profile measures: as much as it takes (`auto`), or a share of its rows.

(mlx is imported on use: --sample is checked before it is loaded.)
"""

from __future__ import annotations

from typing import NewType

from ..base.errors import UsageError

Sample = NewType("Sample", str)  # `auto`, or a share in (0, 1] in its shortest form

AUTO = Sample("auto")
EXACT = Sample("1")


def parse_sample(text: str) -> Sample:
    """Read `auto`, or a share in (0, 1].

    Raises:
        UsageError: it is neither.
    """
    if text == AUTO:
        return AUTO
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(
            f"--sample must be auto, 1.0 (every weight) or a share such as 0.05 (got {text})"
        )
    return Sample(f"{share:g}")


def default_sample() -> Sample:
    """What is measured where the user says nothing: `auto` on a CPU, every weight on Metal."""
    import mlx.core as mx

    return EXACT if mx.default_device() == mx.gpu else AUTO
