"""The bundled tasks, and what counts as an answer."""

from __future__ import annotations

from collections import Counter

import pytest

from mint_mlx.eval.tasks import Task, all_tasks, is_right

CALL = {"name": "set_timer", "arguments": {"minutes": 25}}


def task(*answers: str, call: dict[str, object] | None = None) -> Task:
    return Task("kind", ({"role": "user", "content": "?"},), "base", answers, (), call)


def test_each_kind_has_tasks_in_both_forms() -> None:
    tasks = all_tasks()
    counts = Counter(task.kind for task in tasks)
    assert len(tasks) == 36
    assert len(counts) == 9
    assert min(counts.values()) >= 3
    for each in tasks:
        assert each.answers and each.base and each.messages[-1]["role"] == "user"
        assert (each.call is not None) == (each.kind == "tool call")
        assert not is_right(each, each.messages[-1]["content"].rpartition("\n\n")[2], True) or (
            each.kind == "arithmetic"  # the largest of four numbers is among them
        )


def test_the_long_text_holds_its_needle_once() -> None:
    for each in all_tasks():
        if each.kind == "long context":
            text, _, question = each.messages[-1]["content"].rpartition("\n\n")
            assert question == each.question
            assert len(text.split()) > 600
            assert sum(text.count(answer) for answer in each.answers) == 1


@pytest.mark.parametrize(
    ("reply", "answers", "right"),
    [
        ("The answer is 43.", ("43",), True),
        ("The answer is 143.", ("43",), False),
        ("1,024 bytes", ("1024",), True),
        ("lisboa", ("Lisboa",), True),
        ("Lisboas", ("Lisboa",), False),
        ("green bottle", ("GREEN BOTTLE",), False),
        ("GREEN BOTTLE!", ("GREEN BOTTLE",), True),
        ("首都是巴黎。", ("巴黎",), True),
        ("<think>it may be 7</think> It is 8.", ("7",), False),
        ("", ("7",), False),
    ],
)
def test_an_answer_is_a_word_of_the_reply(
    reply: str, answers: tuple[str, ...], right: bool
) -> None:
    assert is_right(task(*answers), reply, chat=True) == right


def test_of_a_text_that_goes_on_only_the_first_line_counts() -> None:
    assert is_right(task("43"), "\n 43\n18 + 2 = 20", chat=False)
    assert not is_right(task("20"), " 43\n18 + 2 = 20", chat=False)


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ('<tool_call>{"name": "set_timer", "arguments": {"minutes": 25}}</tool_call>', True),
        ('{"name": "set_timer", "parameters": {"minutes": "25"}}', True),
        ('{"name": "set_timer", "arguments": {"minutes": 5}}, in 25 minutes', False),
        ('{"name": "get_weather", "arguments": {"minutes": 25}}', False),
        ("<function=set_timer><parameter=minutes>25</parameter></function>", True),
        ("I start a timer of 25 minutes.", False),
        ('{"name": "set_timer", "arguments": ', False),
    ],
)
def test_a_call_needs_its_name_and_arguments(reply: str, right: bool) -> None:
    assert is_right(task("25", call=CALL), reply, chat=True) == right
