"""Which kernel MLX's Metal backend takes, from shapes."""

from __future__ import annotations

import pytest

from mint_mlx.base.quant_config import KEEP, parse_config
from mint_mlx.runtime.metal_dispatch import column_step, is_slow, vector_kernel


@pytest.mark.parametrize(
    ("config", "step"),
    [
        *((f"{bits}bit-g64", 512) for bits in (2, 3, 4, 5)),
        *((f"{bits}bit-g64", 256) for bits in (6, 8)),
        ("mxfp4", 512),
        ("nvfp4", 512),
        ("mxfp8", 256),
    ],
)
def test_the_step_of_the_fast_kernel(config: str, step: int) -> None:
    assert column_step(parse_config(config)) == step


def test_shapes_that_are_known_to_be_slow_or_fast() -> None:
    def slow_bits(columns: int, rows: int = 2048) -> list[int]:
        configs = {bits: parse_config(f"{bits}bit-g64") for bits in (2, 3, 4, 5, 6, 8)}
        return [bits for bits, config in configs.items() if is_slow(config, rows, columns)]

    assert slow_bits(768) == [2, 3, 4, 5]  # down_proj of Qwen3-30B-A3B
    assert slow_bits(1408) == [2, 3, 4, 5, 6, 8]  # of Qwen1.5-MoE
    for columns in (512, 1024, 1536, 2048):
        assert slow_bits(columns) == []
    assert slow_bits(2048, rows=4100) == [2, 3, 4, 5, 6, 8]
    assert not is_slow(KEEP, 4100, 1408)


def test_narrow_rows_have_a_kernel_of_their_own() -> None:
    assert vector_kernel(parse_config("4bit-g64"), 100, 128) == "qmv_quad"
    assert vector_kernel(parse_config("3bit-g64"), 128, 128) == "qmv"
    assert vector_kernel(parse_config("nvfp4-global"), 128, 128) == "qmv"
