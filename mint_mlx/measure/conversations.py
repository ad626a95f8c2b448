"""Conversations in a model's chat template, which half of its own text begins with.

Text that begins with a single token is prose of the kind that a model was trained on. Replies in a
conversation (code, a tool's call, other languages) are what it is used for, and quantized models
lose them first where nothing of the kind was measured (docs/research-log.md).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..base.report import Report
from ..checkpoint.chat_template import TemplateProblem, as_messages, render, tool_schema

FILE = Path(__file__).with_name("conversations.yaml")
WITHOUT = "no conversation is among the model's own text"
REPLY = 4  # at least one of so many parts of a window is left to the reply


def conversation_prompts(folder: Path, report: Report) -> list[list[int]]:
    """Token ids of the conversations, each ready for a reply, as far as a checkpoint knows them.

    None where the template refuses all; of one that refuses some, as many know no system prompt, or
    no tools, the others.

    Args:
        folder: of the checkpoint, with a tokenizer that has a template.
        report: is told of a template that can't be used.
    """
    try:
        rendered = render(folder, conversations())
    except TemplateProblem as problem:
        report.note(f"{problem}; {WITHOUT}")
        return []
    prompts = [prompt for prompt in rendered if not isinstance(prompt, str)]
    if not prompts:
        report.note(f"the chat template of {folder.name} fails ({rendered[0]}); {WITHOUT}")
    return prompts


@cache
def conversations() -> list[dict[str, Any]]:
    """The conversations as chat templates take them, with what these are given besides."""
    data = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    tools = {name: tool_schema(name, **tool) for name, tool in data["tools"].items()}
    return [_conversation(entry, tools) for entry in data["conversations"]]


def _conversation(entry: dict[str, Any], tools: dict[str, Any]) -> dict[str, Any]:
    messages = as_messages(entry["turns"], entry.get("system"))
    if "call" in entry:
        messages += _call(entry["call"])
    conversation: dict[str, Any] = {"messages": messages}
    if "tools" in entry:
        conversation["tools"] = [tools[name] for name in entry["tools"]]
    return conversation


def _call(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a tool's call and of its result."""
    name = entry["name"]
    call = {
        "id": "callaaaa1",  # Mistral's templates want nine letters and digits
        "type": "function",
        "function": {"name": name, "arguments": entry["arguments"]},
    }
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": name, "tool_call_id": call["id"], "content": entry["result"]},
    ]


def begin_with(
    windows: np.ndarray, prompts: list[list[int]], vocabulary: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Windows of which one of each two begins with a prompt, in turn of all.

    Which one of the two is drawn, so that no part of the text that is measured or held out has
    more of either. A prompt that leaves too little of a window to the reply loses its beginning.

    Args:
        windows: int32 (windows, length), of `self_text.random_windows`.
        prompts: token ids.
        vocabulary: tokens that the model knows.
        seed: the same seed chooses the same windows.

    Returns:
        The windows, and how many tokens at the start of each are given: int32 (windows,).
    """
    count, length = windows.shape
    longest = length - length // REPLY
    known = [prompt[-longest:] for prompt in prompts if max(prompt) < vocabulary]
    begun = windows.copy()
    given = np.ones(count, dtype=np.int32)
    if not known:
        return begun, given

    second = np.random.default_rng(seed).integers(0, 2, count // 2)
    for i, row in enumerate(2 * np.arange(count // 2) + second):
        prompt = known[i % len(known)]
        begun[row, : len(prompt)] = prompt
        given[row] = len(prompt)
    return begun, given


def in_words(given: np.ndarray) -> str:
    """How many windows begin with a prompt, to be added to how a text was written."""
    begun = int((given > 1).sum())
    return f", {begun} of {len(given)} windows in conversations" if begun else ""
