"""Which of MLX's Metal kernels multiplies a quantized weight with one token, from its shape alone.

Read at mlx commit 846d176, `backend/metal/quantized.cpp`. The fast kernel of a matrix and a vector
(`qmv_fast`) needs whole steps: eight rows, and in columns what `qmv_fast_k_alignment` says. A
weight that doesn't fit its steps goes to the general kernel, which checks bounds. Rows of 64 or 128
columns have a kernel of their own (`qmv_quad`) where bits are a power of two.
"""

from __future__ import annotations

from ..base.quant_config import QuantConfig

ROWS = 8  # that the fast kernel does at once
QUAD = (64, 128)  # columns
SIMD = 32  # threads that share a row


def column_step(config: QuantConfig) -> int:
    """Columns of which a fast row has a whole number: 512, or 256 at 6 and 8 bits.

    A thread takes two packs of codes a step, at 2 bits one; packs have 32 bits, or as many bytes as
    hold whole codes (8 codes of 3 or 5 bits, 4 of 6).
    """
    packed = {3: 8, 5: 8, 6: 4}.get(config.bits, 32 // config.bits)
    return packed * (1 if config.bits == 2 else 2) * SIMD


def vector_kernel(config: QuantConfig, rows: int, columns: int) -> str:
    """`qmv_quad`, `qmv_fast` or `qmv`."""
    whole_bits = config.bits & (config.bits - 1) == 0
    if columns in QUAD and whole_bits and not config.global_scale:
        return "qmv_quad"
    fast = rows % ROWS == 0 and columns % column_step(config) == 0
    return "qmv_fast" if fast else "qmv"


def is_slow(config: QuantConfig, rows: int, columns: int) -> bool:
    """Whether a token's product runs in the general kernel; never so for dense weights."""
    return config.quantized and vector_kernel(config, rows, columns) == "qmv"
