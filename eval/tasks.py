"""Short bundled tasks of several kinds (data/tasks.yaml), and whether a reply solves one.

A model with a chat template gets a conversation; any other gets a text to go on with. Replies are
compared with strings: nothing that a model writes is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.chat_template import as_messages, tool_schema

FILE = Path(__file__).parent / "data" / "tasks.yaml"
SENTENCES = 60  # of the long text
PLACES = ("island", "harbour", "mill", "market", "bridge", "orchard", "school")
GOODS = ("apples", "bricks", "letters", "lamps", "nets", "clocks", "barrels", "coats", "maps")


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        kind: what it has in common with others.
        messages: the conversation, as chat templates take it.
        base: the same as a text to go on with.
        answers: a reply that holds one of these is right.
        tools: the tools that a chat template is given, as JSON schemas.
        call: the call of a tool that is right, if one is wanted.
    """

    kind: str
    messages: tuple[dict[str, str], ...]
    base: str
    answers: tuple[str, ...]
    tools: tuple[dict[str, Any], ...] = ()
    call: dict[str, Any] | None = field(default=None, hash=False)

    @property
    def question(self) -> str:
        """What was asked last."""
        return self.messages[-1]["content"].rpartition("\n\n")[2]


@cache
def all_tasks() -> tuple[Task, ...]:
    """The tasks, in the order of their file."""
    data = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    tools = {name: tool_schema(name, **tool) for name, tool in data["tools"].items()}
    return tuple(_task(entry, tools) for entry in data["tasks"])


def _task(entry: dict[str, Any], tools: dict[str, dict[str, Any]]) -> Task:
    turns = list(entry.get("turns") or [entry["ask"]])
    base = entry["base"]
    if "needle" in entry:
        text = " ".join(long_text(entry["needle"], entry["depth"]))
        turns[0] = f"{text}\n\n{turns[0]}"
        base = f"{text}\n\n{base}"
    return Task(
        entry["kind"],
        tuple(as_messages(turns, entry.get("system"))),
        base,
        tuple(map(str, entry["answers"])),
        tuple(tools[name] for name in entry.get("tools", ())),
        entry.get("call"),
    )


def long_text(needle: str, depth: float) -> Iterator[str]:
    """Sentences of which none tells anything, with a needle among them."""
    at = round(depth * SENTENCES)
    for i in range(SENTENCES):
        if i == at:
            yield needle
        place, goods = PLACES[i % len(PLACES)], GOODS[i % len(GOODS)]
        yield f"On day {i + 1} a cart with {(i * 37) % 90 + 10} {goods} left for the {place}."


def is_right(task: Task, reply: str, chat: bool) -> bool:
    """Whether a reply solves a task.

    Args:
        task: the task.
        reply: what the model wrote.
        chat: whether it was asked in a conversation; else only the first line counts.
    """
    if not chat:
        lines = [line for line in reply.splitlines() if line.strip()]
        return bool(lines) and _holds(lines[0], task.answers)
    if task.call is None:
        return _holds(reply.rpartition("</think>")[2], task.answers)
    calls = [call for call in _objects(reply) if call.get("name") == task.call["name"]]
    return any(_has_arguments(call, task.call["arguments"]) for call in calls) or (
        # Some models write calls in another form than JSON.
        task.call["name"] in reply and not calls and _holds(reply, task.answers)
    )


def _holds(text: str, answers: tuple[str, ...]) -> bool:
    """Whether a text holds one of the answers, a word as a whole word.

    The case of letters counts only where an answer is in capitals.
    """
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    for answer in answers:
        whole = answer.isascii() and answer.isalnum()
        pattern = rf"(?<![^\W_]){answer}(?![^\W_])" if whole else re.escape(answer)
        if re.search(pattern, text, 0 if answer.isupper() else re.IGNORECASE):
            return True
    return False


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, the outermost ones."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            if isinstance(value, dict):
                yield value
        start = text.find("{", end)


def _has_arguments(call: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a call has these arguments, numbers also as text."""
    given = call.get("arguments", call.get("parameters"))
    if not isinstance(given, dict):
        return False
    return all(
        str(given.get(key)).casefold() == str(value).casefold() for key, value in wanted.items()
    )
