"""Block numbers in the names that families give their modules and tensors."""

from __future__ import annotations

import pytest

from mint_mlx.checkpoint.block_path import any_block, block_of, collapse


@pytest.mark.parametrize(
    ("path", "block", "any_"),
    [
        ("model.layers.3.mlp.up_proj", 3, "model.layers.*.mlp.up_proj"),
        ("h.0.attn.c_attn.weight", 0, "h.*.attn.c_attn.weight"),
        ("transformer.blocks.12.ffn.router", 12, "transformer.blocks.*.ffn.router"),
        ("model.layers.3.mlp.experts.5.up_proj", 3, "model.layers.*.mlp.experts.5.up_proj"),
        ("model.layers.layers.7.mixer", 7, "model.layers.layers.*.mixer"),
        ("model.kv_reuse_layers.0.mlp", None, "model.kv_reuse_layers.0.mlp"),
        ("model.layers.3", None, "model.layers.3"),
        ("lm_head", None, "lm_head"),
    ],
)
def test_the_block_of_a_path(path: str, block: int | None, any_: str) -> None:
    assert block_of(path) == block
    assert any_block(path) == any_


def test_paths_of_several_blocks_are_one() -> None:
    paths = [f"model.layers.{block}.mlp" for block in (0, 1, 2, 5)]
    assert collapse(paths, 6) == "model.layers.[0-2,5].mlp"
    assert collapse(paths, 4) == "model.layers.*.mlp"
    assert collapse(paths[:1], 1) == "model.layers.0.mlp"
    assert collapse(["lm_head"], 4) == "lm_head"
