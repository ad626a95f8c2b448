"""Tokenizers: code that one brings is never run, and a template may want more than a message."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import OLD_MLX_LM, Maker, Notes, edit_config, llama, qwen3_moe

from mint_mlx.base.errors import MintError
from mint_mlx.base.side_files import code_files
from mint_mlx.checkpoint.chat_template import TemplateProblem
from mint_mlx.checkpoint.tokenizer import PROMPT, load_tokenizer, tokenizer_is_code
from mint_mlx.converters.output.small_files import copy_small_files
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.request import Request, check_request
from mint_mlx.jobs.sizes import size_table


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


def test_a_template_that_fails_is_a_note_and_the_sentence_goes_on_from_a_plain_prompt(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def fail(folder: Path, texts: list[str]) -> list[list[int]]:
        asked.append(folder)
        raise TemplateProblem("the chat template fails (it wants more than a message)")

    monkeypatch.setattr("mint_mlx.checkpoint.tokenizer.chat_prompts", fail)
    folder = str(make(llama(1)))
    (Path(folder) / "chat_template.jinja").write_text("{{ messages[1] }}")
    notes = Notes()
    result = convert(folder, "5bpw", tmp_path / "out", report=notes)
    assert result.sentence is not None and result.sentence.startswith(PROMPT)
    assert sum("a plain prompt" in note for note in notes.said) == 1
    assert len(asked) == 1

    # No sentence, no rendering; nor for the table of sizes.
    convert(folder, "5bpw", tmp_path / "silent", smoke=False)
    size_table(check_request(Request(folder, budget="smallest")))
    assert len(asked) == 1


@pytest.mark.parametrize(
    "text", ["[]", "3", "{", '{"auto_map": 3}', '{"auto_map": [null]}', "[" * 100_000]
)
def test_malformed_settings_are_no_code_and_stop_no_copy(text: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "tokenizer_config.json").write_text(text)
    assert not tokenizer_is_code(tmp_path)
    assert code_files(tmp_path) == set()
    source = SimpleNamespace(path=tmp_path, config={})
    copy_small_files(source, tmp_path / "out", "text")  # type: ignore[arg-type]
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == text


@pytest.mark.parametrize("table", ['{"AutoTokenizer": ["own.Own", null]}', '["own.Own", null]'])
def test_a_tokenizer_that_is_code_is_known_in_both_forms(table: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("")
    (tmp_path / "tokenizer_config.json").write_text(f'{{"auto_map": {table}}}')
    assert tokenizer_is_code(tmp_path)
    assert code_files(tmp_path) == {"own.py"}


@pytest.mark.skipif(OLD_MLX_LM, reason="transformers 4 checks no values")
def test_a_value_that_transformers_refuses_is_not_the_tokenizers_fault(make: Maker) -> None:
    folder = make(llama(1))
    edit_config(folder, hidden_act=None)
    with pytest.raises(MintError, match=r"^config\.json of .* 'hidden_act' expected str"):
        load_tokenizer(folder)
