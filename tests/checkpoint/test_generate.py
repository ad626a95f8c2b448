"""Replies of several prompts at once are those of each alone."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from families import write_family
from helpers import OLD_MLX_LM, Maker, llama

from mint_mlx.checkpoint import generate
from mint_mlx.checkpoint.mlxlm import build_model
from mint_mlx.checkpoint.tokenizer import load_tokenizer
from mint_mlx.runtime.replies import generate_replies

PROMPTS = [[5, 6, 7, 8], [9, 10], [30, 31, 32, 33, 34, 35, 36], [11]]


@pytest.mark.skipif(OLD_MLX_LM, reason="it answers prompts one by one")
def test_a_batch_gives_the_replies_of_single_prompts(make: Maker) -> None:
    folder = make(llama(1))
    model, tokenizer = build_model(folder), load_tokenizer(folder)
    model.set_dtype(mx.float32)
    alone = generate.one_by_one(model, tokenizer, PROMPTS, 6)
    assert [len(reply) for reply in alone] == [6] * 4
    assert generate.together(model, tokenizer, PROMPTS, 6) == alone
    told: list[tuple[int, int]] = []
    several = generate.generate_tokens(
        model, tokenizer, PROMPTS, 6, lambda _, done, total: told.append((done, total))
    )
    assert several == alone
    total = generate.work([len(prompt) for prompt in PROMPTS], 6)
    assert total == 14 + 6 * (generate.STEP + 4 * generate.EACH)
    shares = [done for done, _ in told]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, total)
    assert len(set(shares)) > 5, "each step is told"
    assert generate_replies(folder, PROMPTS, 6, lambda *_: None) == alone

    # The token that ends a reply is in it.
    tokenizer.eos_token_ids = {alone[0][2]}
    ended = generate.one_by_one(model, tokenizer, PROMPTS, 6)
    assert ended[0][-1] == alone[0][2]
    assert len(ended[0]) < 6
    assert generate.together(model, tokenizer, PROMPTS, 6) == ended


@pytest.mark.skipif(OLD_MLX_LM, reason="it answers prompts one by one")
@pytest.mark.parametrize(
    ("family", "masks"), [("jamba", False), ("bailing_moe_linear", False), ("olmoe", True)]
)
def test_models_that_take_padding_for_text_are_given_none(
    tmp_path: Path, family: str, masks: bool
) -> None:
    folder = write_family(tmp_path / family, family)
    model, tokenizer = build_model(folder), load_tokenizer(folder)
    model.set_dtype(mx.float32)
    prompts = [*PROMPTS, [40, 41], [50, 51, 52, 53]]
    alone = generate.one_by_one(model, tokenizer, prompts, 8)
    assert generate.generate_tokens(model, tokenizer, prompts, 8) == alone
    assert (generate.together(model, tokenizer, prompts, 8) == alone) == masks


def test_prompts_of_one_length_are_answered_together_where_nothing_may_be_padded() -> None:
    assert generate.groups([4, 2, 7, 2, 4, 4], padded=False) == [[1, 3], [0, 4, 5], [2]]


def test_prompts_of_similar_lengths_are_answered_together() -> None:
    lengths = [1500, 10, 400, 300, 12, 500, 5000]
    batches = generate.groups(lengths)
    assert batches == [[1, 4, 3], [2, 5], [0], [6]]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
