"""Weights that are not finite are named."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Maker, llama, spoil_weight

from mint_mlx.base.errors import MintError
from mint_mlx.jobs.convert import convert


@pytest.mark.parametrize("how", [{"budget": "5bpw"}, {"uniform": "4bit-g64"}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(
    make: Maker, tmp_path: Path, how: dict[str, str], value: float
) -> None:
    folder = make(llama(1))
    name = "model.layers.0.self_attn.q_proj.weight"
    spoil_weight(folder, name, value)
    with pytest.raises(MintError, match=name):
        convert(str(folder), out=tmp_path / "out", smoke=False, **how)
