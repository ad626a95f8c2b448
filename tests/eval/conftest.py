"""What tests of comparisons score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mint_mlx.eval.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Eight windows of random letters; baseline.txt beside them has the same ones backwards."""
    letters = np.random.default_rng(0).choice(list("abcdefgh ijkl"), 1500)
    (tmp_path / "scored.txt").write_text("".join(letters))
    (tmp_path / "baseline.txt").write_text("".join(reversed(letters)))
    return Settings(length=64, windows=8, text=str(tmp_path / "scored.txt"))
