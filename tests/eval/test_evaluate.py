"""What `eval` refuses."""

from __future__ import annotations

import json

import pytest
from helpers import Maker, llama

from mint_mlx.base.errors import MintError, UsageError
from mint_mlx.eval.evaluate import evaluate
from mint_mlx.eval.settings import Settings


def test_wrong_sources_are_noticed(make: Maker) -> None:
    other = make(llama(1), "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab |= {"a": vocab["b"], "b": vocab["a"]}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(MintError, match="tokenizers"):
        evaluate(str(other), source=str(make(llama(1))))
    with pytest.raises(MintError, match="chat template"):
        evaluate(str(other), Settings(chat=True), source=str(other))


def test_options_that_need_a_source_are_refused_before_the_model_is_opened() -> None:
    with pytest.raises(UsageError, match="--source"):
        evaluate("nowhere/model", Settings(chat=True))
