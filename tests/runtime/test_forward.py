"""Forward passes, whole and streamed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from families import write_family

from mint_mlx.base.errors import MintError
from mint_mlx.runtime import runner
from mint_mlx.runtime.forward import forward


def test_a_block_that_is_called_twice_is_not_streamed(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm.models.nanbeige")
    loaded = runner.load_runner(write_family(tmp_path / "model", "nanbeige"), streamed=True)
    with pytest.raises(MintError, match="calls one twice"):
        list(forward(loaded, np.zeros((2, 4), dtype=np.int32), 2))
