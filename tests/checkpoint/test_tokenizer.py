"""Tokenizers: code that one brings is never run, and a template may want more than a message."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Maker, Notes, edit_config, llama, qwen3_moe

from mint_mlx.jobs.convert import convert


def test_code_that_a_checkpoint_brings_is_never_run_and_never_asked_about(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(qwen3_moe(1))
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    edit_config(folder, auto_map=dict.fromkeys(classes, "own.Own"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    for effort in ("fast", "balanced"):
        convert(str(folder), "5bpw", tmp_path / effort, effort=effort)
    assert not ran.exists()


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('a system message comes first') }}", "{{ '' }}"]
)
def test_a_template_that_wants_more_than_a_message_stops_nothing(
    make: Maker, tmp_path: Path, template: str
) -> None:
    folder = make(llama(1))
    notes = Notes()
    (folder / "chat_template.jinja").write_text(template)
    result = convert(str(folder), "5bpw", tmp_path / "out", report=notes)
    assert result.sentence is None
    assert any("no sentence is generated" in note for note in notes.said)
