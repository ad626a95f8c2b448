"""Half of a model's own text begins with conversations, where it has a chat template for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import Maker, llama
from hypothesis import given as examples
from hypothesis import strategies as st

from mint_mlx.allocation.artifacts import sensitivity_beside
from mint_mlx.base.report import Silent
from mint_mlx.checkpoint.tokenizer import load_tokenizer
from mint_mlx.eval.tasks import all_tasks
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.measurements import get_text
from mint_mlx.jobs.model import prepare
from mint_mlx.measure.conversations import begin_with, conversation_prompts, conversations
from mint_mlx.measure.self_text import random_windows, write_tokens

TEMPLATE = (
    "{% if tools %}{{ tools[0].function.name }};{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)


class Notes(Silent):
    """Collects notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Collect one."""
        self.notes.append(text)


def chat_model(make: Maker, template: str = TEMPLATE) -> Path:
    folder = make(llama(1))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_conversations_are_of_many_kinds_and_no_task_is_among_them() -> None:
    tools = [c for c in conversations() if "tools" in c]
    roles = [[m["role"] for m in c["messages"]] for c in conversations()]
    assert len(conversations()) >= 32
    assert len(tools) >= 4
    assert any("system" in r for r in roles)
    assert any(r[-1] == "tool" for r in roles)
    assert any(r.count("user") > 1 for r in roles)
    assert all(r[-1] in ("user", "tool") for r in roles)

    asked = {m["content"] for task in all_tasks() for m in task.messages}
    assert not asked & {m["content"] for c in conversations() for m in c["messages"]}


def test_what_a_template_refuses_is_left_out(make: Maker) -> None:
    folder = chat_model(make)
    prompts = conversation_prompts(folder, Silent())
    systems = [c for c in conversations() if c["messages"][0]["role"] == "system"]
    assert len(prompts) == len(conversations()) - len(systems)

    tokenizer = load_tokenizer(folder)
    first = conversations()[0]["messages"][0]["content"]
    assert prompts[0] == tokenizer.encode(f"<user>{first}<assistant>", add_special_tokens=False)


def test_a_template_that_cannot_be_used_is_noted(make: Maker) -> None:
    notes = Notes()
    folder = chat_model(make, "{% for i in range(400000) %}abcdefgh{% endfor %}")
    assert conversation_prompts(folder, notes) == []
    assert conversation_prompts(chat_model(make, "{{ undefined.attribute }}"), notes) == []
    assert len(notes.notes) == 2
    assert all("no conversation is among" in note for note in notes.notes)


@examples(st.integers(1, 20), st.integers(8, 40), st.lists(st.integers(1, 60), max_size=9))
def test_one_window_of_each_two_begins_with_a_prompt(
    count: int, length: int, lengths: list[int]
) -> None:
    windows = random_windows(50, count * length, start=3, length=length)
    prompts = [[(7 * i + j) % 50 for j in range(n)] for i, n in enumerate(lengths)]
    begun, given = begin_with(windows, prompts, 50)
    assert begun.shape == windows.shape
    longest = length - length // 4
    changed = [row for row in range(count) if (begun[row] != windows[row]).any()]
    pairs = [row // 2 for row in changed]
    assert len(set(pairs)) == len(pairs)

    in_turn = iter(range(count))
    for row in range(count):
        assert 1 <= given[row] <= longest
        np.testing.assert_array_equal(begun[row, given[row] :], windows[row, given[row] :])
        if row in changed:
            prompt = prompts[next(in_turn) % len(prompts)][-longest:]
            np.testing.assert_array_equal(begun[row, : given[row]], prompt)
    assert not prompts or count < 2 or changed


def test_a_prompt_with_tokens_that_the_model_lacks_is_left_out() -> None:
    windows = random_windows(50, 64, length=16)
    begun, given = begin_with(windows, [[1, 2, 50]], 50)
    np.testing.assert_array_equal(begun, windows)
    assert (given == 1).all()


@pytest.mark.parametrize("streamed", [False, True])
def test_given_tokens_stay_and_replies_follow_from_them(make: Maker, streamed: bool) -> None:
    source = prepare(str(chat_model(make))).source
    windows, given = begin_with(random_windows(96, 64, length=16), [[5, 6, 7, 8], [9] * 12], 96)
    text, how = write_tokens(source, windows, streamed=streamed, given=given)
    assert how.endswith("2 of 4 windows in conversations")
    for row, count in enumerate(given):
        np.testing.assert_array_equal(text[row, :count], windows[row, :count])
    drawn = np.arange(16) >= given[:, None]
    assert (text != windows)[drawn].mean() > 0.5

    # Drawn by the same numbers after other tokens: another reply.
    other = windows.copy()
    other[given > 1, 1] = 20
    replies, _ = write_tokens(source, other, streamed=streamed, given=given)
    np.testing.assert_array_equal(replies[given == 1], text[given == 1])
    assert (replies != text)[drawn].any()


def test_a_models_own_text_has_conversations_only_with_a_template(make: Maker) -> None:
    plain = get_text(prepare(str(make(llama(1)))), 256, Silent())
    assert plain.how == "sampled, seed 0"
    assert plain.counted.all()

    chat = prepare(str(chat_model(make)))
    text = get_text(chat, 256, Silent())
    assert text.how == "sampled, seed 0, 2 of 4 windows in conversations"
    assert sorted(text.given > 1) == [False, False, True, True]
    np.testing.assert_array_equal(get_text(chat, 256, Silent()).tokens, text.tokens)


@pytest.mark.parametrize("effort", ["balanced", "best"])
def test_a_chat_model_is_converted_by_its_replies(make: Maker, tmp_path: Path, effort: str) -> None:
    folder = str(chat_model(make))
    result = convert(folder, "4bpw", tmp_path / "out", effort=effort, smoke=False)
    artifact = sensitivity_beside(result.path)
    assert artifact is not None
    windows = len(artifact.tokens)
    half = f"{windows // 2} of {windows} windows in conversations"
    assert (artifact.text.given > 1).sum() == windows // 2
    assert artifact.text.how == f"sampled, seed 0, {half}"

    # The next run takes it as it is, and makes the same.
    again = convert(folder, "4bpw", tmp_path / "again", sensitivity=str(result.path), effort=effort)
    for file in sorted(result.path.glob("*.safetensors")):
        assert (again.path / file.name).read_bytes() == file.read_bytes()
