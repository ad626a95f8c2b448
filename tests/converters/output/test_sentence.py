"""The sentence at the end takes seconds, or is left out with a note."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Maker, llama

from mint_mlx.base.report import Silent
from mint_mlx.converters.output import sentence
from mint_mlx.jobs.convert import convert


class Notes(Silent):
    """A report that keeps its notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize("seconds", [0.0, 10.0])
def test_a_slow_machine_writes_no_sentence_and_says_so(
    seconds: float, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentence, "on_cpu", lambda: True)
    monkeypatch.setattr(sentence, "SECONDS", seconds)
    written: list[int] = []
    monkeypatch.setattr(
        sentence, "generate_sentence", lambda folder, report, count: written.append(count) or "Hi"
    )
    notes = Notes()
    result = convert(str(make(llama(1))), uniform="4bit-g64", out=tmp_path / "o", report=notes)
    assert result.sentence == (None if seconds == 0 else "Hi")
    assert written == ([] if seconds == 0 else [sentence.SENTENCE])
    assert any("no sentence" in text for text in notes.texts) == (seconds == 0)
