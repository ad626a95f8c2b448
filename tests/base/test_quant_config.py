"""Quantization configurations as they are written, and what layers can take them."""

from __future__ import annotations

import pytest

from mint_mlx.base.errors import UsageError
from mint_mlx.base.quant_config import KEEP, MX_MODES, QuantConfig, affine, mx_mode, parse_config


@pytest.mark.parametrize("config", [*affine(), *map(mx_mode, MX_MODES), KEEP], ids=str)
def test_a_configuration_is_read_as_it_is_written(config: QuantConfig) -> None:
    assert parse_config(str(config)) == config


@pytest.mark.parametrize("text", ["", "4bit", "7bit-g64", "4bit-g48", "mxfp3", "Keep", "4bit-g64 "])
def test_what_mlx_does_not_have_is_refused_with_what_it_has(text: str) -> None:
    with pytest.raises(UsageError, match="such as 4bit-g64"):
        parse_config(text)


def test_groups_must_divide_a_row() -> None:
    assert QuantConfig(4, 64).divides(192)
    assert not QuantConfig(4, 128).divides(192)
    assert KEEP.divides(7)


def test_mlx_gets_three_keys_and_no_other() -> None:
    assert QuantConfig(4, 64).as_mlx() == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert mx_mode("nvfp4").as_mlx() == {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    assert not KEEP.quantized
