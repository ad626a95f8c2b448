"""Products of weights with signs, by which programs in different environments compare them."""

from __future__ import annotations

import numpy as np


def products(weight: np.ndarray) -> np.ndarray:
    """The products (2, rows) of a weight (rows, columns) with two fixed vectors of signs."""
    choices = np.array([-1.0, 1.0], dtype=np.float32)
    signs = [
        np.random.Generator(np.random.PCG64(seed)).choice(choices, size=weight.shape[-1])
        for seed in (7, 11)
    ]
    return np.stack([weight @ sign for sign in signs])
