"""Suites of comparisons."""

from __future__ import annotations

from pathlib import Path

import pytest

from mint_mlx.base.errors import MintError
from mint_mlx.eval import suite
from mint_mlx.eval.suite import read_suite


def test_suites(tmp_path: Path) -> None:
    shipped = Path(suite.__file__).parent / "paper.yaml"
    assert {entry.model for entry in read_suite(shipped)} >= {
        "Qwen/Qwen3-30B-A3B",
        "mistralai/Mixtral-8x7B-v0.1",
    }
    (tmp_path / "s.yaml").write_text("- model: a/b\n  budgets: [5bpw]\n  sizes: 3\n")
    with pytest.raises(MintError, match="line 3"):
        read_suite(tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_text("model: a/b\n")
    with pytest.raises(MintError, match="must be a list"):
        read_suite(tmp_path / "s.yaml")
