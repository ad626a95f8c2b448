"""Renders a chat template in a process of its own, which chat_template.py starts and watches.

A chat template is a program of a stranger: it may fail in any way, never end, or grow without
bound. This process reads {"folder", "conversations"} as JSON from stdin, loads the tokenizer, says
`ready`, and answers with {"tokens"} or {"problem"} in one line. In tokens stands the reason, as a
text, in place of a conversation that the template can't render.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

GROWTH = 1 << 30  # bytes of address space that rendering may take, where the system holds it
SECONDS = 60  # of processor time: should the watching process be killed, this one ends too
MAX_TEXT = 1_000_000  # characters of a rendered prompt


class FixedDay(datetime):
    """The day that templates tell: the same model gives the same prompts, and results, each day."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> FixedDay:
        """The first of January 2026."""
        return cls(2026, 1, 1, tzinfo=tz)


def main() -> None:
    """Answer one request."""
    # What other packages print must not end up in the answer.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.read())

    from transformers.utils import chat_template_utils

    from .tokenizer import load_tokenizer

    chat_template_utils.datetime = FixedDay
    tokenizer = load_tokenizer(Path(request["folder"]))
    _limit()
    print("ready", file=answer, flush=True)
    try:
        tokens = [_render_or_tell(tokenizer, c) for c in request["conversations"]]
        result: dict[str, Any] = {"tokens": tokens}
    except MemoryError:
        result = {"problem": f"it takes more than {GROWTH >> 20} MiB of memory"}
    print(json.dumps(result), file=answer, flush=True)


def _render_or_tell(tokenizer: Any, conversation: dict[str, Any]) -> list[int] | str:
    """Token ids of a conversation, or why the template fails on it."""
    from .tokenizer import first_line

    # Whatever a stranger's program raises is its failure, not ours.
    try:
        return _render(tokenizer, **conversation)
    except MemoryError:
        raise
    except Exception as error:
        return first_line(error)


def _render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    """Token ids of a conversation, ready for a reply.

    Args:
        tokenizer: with the template.
        messages: of the conversation.
        options: what the template is given besides, such as tools.
    """
    options["add_generation_prompt"] = True
    prompt = tokenizer.apply_chat_template(messages, **options, tokenize=False)
    if not isinstance(prompt, str) or len(prompt) > MAX_TEXT:
        raise ValueError(f"it makes more than {MAX_TEXT:,} characters of a message")
    tokens = tokenizer.apply_chat_template(messages, **options)
    return [int(token) for token in tokens]


def _limit() -> None:
    """Hold memory and processor time down, where the system can (macOS holds no address space)."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        size = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + GROWTH, size + GROWTH))
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


if __name__ == "__main__":
    main()
