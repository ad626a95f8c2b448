"""Speed of generation."""

from __future__ import annotations

from pathlib import Path

from released import released

from mint_mlx.eval.speed import decode_ratios, speed


def test_the_speed_of_a_source_that_mlx_lm_does_not_load(tmp_path: Path) -> None:
    figures = speed(released("qwen3_moe_fp8", tmp_path / "fp8"))
    assert figures["prompt_tokens_per_second"] > 0
    assert figures["decode_tokens_per_second"] > 0


def test_decoding_is_compared_only_where_the_reference_agrees_with_itself() -> None:
    figures = {"decode_tokens_per_second": 100.0, "decode_lowest": 90.0, "decode_highest": 105.0}
    ratios = decode_ratios(figures, 49.0, 51.0)
    assert ratios == {
        "decode_ratio": 2.0,
        "decode_ratio_lowest": 1.8,
        "decode_ratio_highest": 2.1,
    }
    assert decode_ratios(figures, 47.0, 51.0) is None
    assert decode_ratios(figures, 51.0, 47.0) is None
