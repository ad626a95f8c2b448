"""Windows of a text, and which of their tokens are scored."""

from __future__ import annotations

import numpy as np
import pytest

from mint_mlx.base.errors import MintError, UsageError
from mint_mlx.eval.protocol import cut


def test_windows() -> None:
    ids = np.arange(1000)
    assert cut(ids, "windows", 32).tokens.shape == (31, 32)
    first = cut(ids, "windows", 32, 2)
    assert first.tokens[1, 0] == 32
    assert first.scored == 2 * 31

    # A seed chooses other windows, and the same ones each time.
    some = cut(ids, "windows", 32, 5, seed=1)
    assert np.array_equal(some.tokens, cut(ids, "windows", 32, 5, seed=1).tokens)
    assert not np.array_equal(some.tokens, cut(ids, "windows", 32, 5, seed=2).tokens)

    half = cut(ids, "llama.cpp", 32, bos=7)
    assert (half.tokens[:, 0] == 7).all()
    assert half.positions == slice(16, 32)
    assert half.scored == 31 * 15


def test_impossible_windows_are_refused() -> None:
    with pytest.raises(MintError, match="less than one window"):
        cut(np.arange(10), "windows", 32)
    for protocol, length, limit in (
        ("chunks", 32, None),
        ("windows", 2, None),
        ("windows", 32, 0),
    ):
        with pytest.raises(UsageError, match=r"must be .* \(got"):
            cut(np.arange(1000), protocol, length, limit)
