"""How mlx-lm calls its layers of experts (SwitchLinear and what stands in for it)."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np


def rows_and_experts(x: mx.array, indices: Any) -> tuple[tuple[int, ...], mx.array, np.ndarray]:
    """The arguments of a call as single rows, each with the expert that it goes to.

    Args:
        x: (..., 1, inputs), broadcast against `indices`.
        indices: int (..., k), of MLX or numpy.

    Returns:
        Their common shape, whose product is n; rows (n, inputs); experts, int (n,). The call's output is (*shape, 1,
        outputs).
    """
    lead = np.broadcast_shapes(indices.shape, x.shape[:-2])
    rows = mx.broadcast_to(x, (*lead, *x.shape[-2:])).reshape(-1, x.shape[-1])
    return lead, rows, np.broadcast_to(np.asarray(indices), lead).reshape(-1)
