"""Replies of the source in place of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import Maker, llama
from released import released

from mint_mlx.base.errors import MintError, UsageError
from mint_mlx.checkpoint.tokenizer import load_tokenizer
from mint_mlx.eval import chat
from mint_mlx.eval.evaluate import evaluate
from mint_mlx.eval.settings import Settings
from mint_mlx.measure import cache


@pytest.mark.parametrize("fp8", [False, True])  # which mlx-lm doesn't load by itself
def test_chat_scores_the_sources_own_replies(
    fp8: bool, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = released("qwen3_moe_fp8", tmp_path / "fp8") if fp8 else make(llama(1))
    (source / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    monkeypatch.setattr(chat, "PROMPTS", ("abc", "defg"))
    monkeypatch.setattr(chat, "REPLY", 5)
    monkeypatch.setattr(  # tests/checkpoint/test_chat_template.py renders in a child
        chat, "chat_prompts", lambda folder, texts: list(map(load_tokenizer(folder).encode, texts))
    )
    figures = evaluate(str(source), Settings(chat=True), source=str(source))
    assert 2 <= figures["tokens"] <= 10
    assert figures["kl"] < figures["noise_floor"]
    assert figures["same_top1"] == 1

    assert cache.strangers() == []
    assert (cache.cache_dir() / ".replies.lock").is_file()  # held, so that no one clears it
    assert (cache.cache_dir() / ".references.lock").is_file()
    assert "replies" in {entry.kind for entry in cache.entries()}
    monkeypatch.setenv("MINT_MLX_CACHE", str(source.parent / "empty"))
    monkeypatch.setattr(chat, "fits", lambda folder: False)
    with pytest.raises(MintError, match="too large for"):
        evaluate(str(source), Settings(chat=True), source=str(source))


@pytest.mark.parametrize(
    "other", [{"length": 32}, {"windows": 2}, {"text": "t.txt"}, {"protocol": "llama.cpp"}]
)
def test_options_of_a_text_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--chat scores"):
        Settings(chat=True, **other)
