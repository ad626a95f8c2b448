"""How much of each layer a profile measures: as much as it takes (`auto`), or a share of its rows.

(mlx is imported on use: --sample is checked before it is loaded.)
"""

from __future__ import annotations

from ..base.errors import UsageError

AUTO = "auto"
EXACT = "1"


def parse_sample(text: str | None) -> str:
    """`auto`, or a share in (0, 1] in its shortest form.

    Args:
        text: as the user gave it; None for `auto` on a CPU and `1` (exact) on Metal.

    Raises:
        UsageError: it is neither.
    """
    if text is None:
        import mlx.core as mx

        return EXACT if mx.default_device() == mx.gpu else AUTO
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
    return f"{share:g}"
