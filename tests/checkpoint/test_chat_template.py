"""Chat templates run in a child process that is stopped where it hangs or grows.

The children of these tests sleep, fill 64 MB or fail: a hostile template would loop or double a
text without end.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from helpers import Maker, llama

from mint_mlx.checkpoint import chat_renderer, chat_template
from mint_mlx.checkpoint.chat_template import TemplateProblem, chat_prompts, render
from mint_mlx.checkpoint.tokenizer import load_tokenizer

READY = "import sys, time; sys.stdin.read(); print('ready', flush=True); "
CHILDREN = {  # what the child does, and the words for it
    READY + "time.sleep(60)": "does not end within 0.3 seconds",
    "import time; time.sleep(60)": "does not end within 0.4 seconds",
    READY + "x = b'x' * 64_000_000; time.sleep(60)": "MiB of memory",
    READY + "print('x' * 100_000); time.sleep(60)": "a prompt without end",
    READY + "sys.exit(3)": "ended without an answer",
    "import sys; sys.exit(3)": "ended without an answer|could not be loaded",
    READY + 'print(\'{"problem": "it wants two messages"}\')': "it wants two messages",
    READY + "print('{\"tokens\": [[]]}')": "an empty prompt",
    READY + "print('{\"tokens\": []}')": "an empty prompt",
}


@pytest.mark.parametrize("child", CHILDREN)
def test_a_template_that_fails_hangs_or_grows_is_stopped(
    child: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "_command", lambda: [sys.executable, "-S", "-c", child])
    monkeypatch.setattr(chat_template, "RENDERING", 0.3)
    monkeypatch.setattr(chat_template, "LOADING", 0.4 if "ready" not in child else 10)
    if "64_000_000" in child:
        monkeypatch.setattr(chat_template, "RENDERING", 10)
        monkeypatch.setattr(chat_template, "GROWTH", 32 << 20)
    if "100_000" in child:
        monkeypatch.setattr(chat_template, "_MAX_ANSWER", 50_000)
        monkeypatch.setattr(chat_template, "RENDERING", 10)
    started = time.monotonic()
    with pytest.raises(TemplateProblem, match=CHILDREN[child]):
        chat_prompts(tmp_path, ["Hello"])
    assert time.monotonic() - started < 8


def test_a_child_renders_what_the_tokenizer_does(make: Maker) -> None:
    folder = make(llama(1))
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
        "{% if tools %}{{ tools[0].function.name }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    encode = load_tokenizer(folder).encode
    tools = [{"type": "function", "function": {"name": "clock"}}]
    first, second, refused = render(
        folder,
        [
            {"messages": [{"role": "user", "content": "abc"}]},
            {"messages": [{"role": "user", "content": "d"}], "tools": tools},
            {"messages": [{"role": "system", "content": "s"}]},
        ],
    )
    assert first == encode("<user>abc<a>")
    assert second == encode("clock<user>d<a>")
    assert "no system prompts" in refused


def test_the_child_limits_the_length_of_a_prompt(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(llama(1))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content * 20 }}")
    tokenizer = load_tokenizer(folder)
    assert len(chat_renderer._render(tokenizer, [{"role": "user", "content": "abc"}])) == 60
    monkeypatch.setattr(chat_renderer, "MAX_TEXT", 50)
    with pytest.raises(ValueError, match="more than 50 characters"):
        chat_renderer._render(tokenizer, [{"role": "user", "content": "abc"}])


def test_a_template_that_tells_the_date_gives_the_same_prompt_each_day(make: Maker) -> None:
    folder = make(llama(1))
    (folder / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    )
    (prompt,) = chat_prompts(folder, ["Hello"])
    expected = load_tokenizer(folder).encode("01 Jan 2026: Hello", add_special_tokens=False)
    assert prompt == expected
