"""Speed of generation."""

from __future__ import annotations

from pathlib import Path

from released import released

from mint_mlx.eval.speed import speed


def test_the_speed_of_a_source_that_mlx_lm_does_not_load(tmp_path: Path) -> None:
    figures = speed(released("qwen3_moe_fp8", tmp_path / "fp8"))
    assert figures["prompt_tokens_per_second"] > 0
    assert figures["decode_tokens_per_second"] > 0
