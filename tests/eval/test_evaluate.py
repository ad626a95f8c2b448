"""What `eval` refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers import Maker, Notes, llama

from mint_mlx.base.errors import MintError, UsageError
from mint_mlx.eval.check import check
from mint_mlx.eval.evaluate import evaluate
from mint_mlx.eval.settings import Settings
from mint_mlx.jobs.convert import convert

OTHER_WEIGHTS = r"out was made from other weights \(model\) than those of tuned, as its mint-plan"


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


def test_a_source_of_another_model_is_told(make: Maker, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A text of some words. " * 40)
    notes = Notes()
    settings = Settings(text=str(text), length=32, windows=1)
    source, other = str(make(llama(1))), str(make(llama(2), "other"))
    evaluate(other, settings, source, report=notes)
    assert any("their num_hidden_layers is 2 and 1; the divergence is" in n for n in notes.said)
    notes.said.clear()
    evaluate(source, settings, source, report=notes)
    assert not any("between two models" in note for note in notes.said)


def test_a_source_of_other_weights_is_told(make: Maker, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A text of some words. " * 40)
    settings = Settings(text=str(text), length=32, windows=1)
    folder, out = make(llama(1)), tmp_path / "out"
    convert(str(folder), uniform="8bit-g32", out=out, smoke=False)
    for source, is_told in ((folder, False), (make(llama(1), "tuned", seed=1), True)):
        notes = Notes()
        evaluate(str(out), settings, str(source), report=notes)
        assert any(re.match(OTHER_WEIGHTS, n) for n in notes.said) == is_told
        notes = Notes()
        check(str(out), str(source), notes)
        assert any(re.match(OTHER_WEIGHTS, n) for n in notes.said) == is_told


def test_options_that_need_a_source_are_refused_before_the_model_is_opened() -> None:
    with pytest.raises(UsageError, match="--source"):
        evaluate("nowhere/model", Settings(chat=True))
