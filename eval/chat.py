"""Chat text: the source's own greedy replies to a few bundled prompts, by its chat template."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..base.checksum import Damaged, if_sound, read_checked, with_checksum
from ..base.errors import MintError
from ..base.files import write_text
from ..base.report import Report
from ..checkpoint.chat_template import chat_prompts
from ..checkpoint.source import Source
from ..measure import cache
from ..runtime.replies import generate_replies
from ..runtime.runner import fits
from .protocol import Windows

PROMPTS = (
    "Write a Python function that returns the n-th Fibonacci number, with a short explanation.",
    "A train leaves at 14:05 and arrives at 16:50. How long is the journey? Think step by step.",
    "Summarise in two sentences why the sky is blue.",
    "Translate into French and German: 'The library is closed on Mondays.'",
    "List three differences between a list and a tuple in Python.",
    "Write a polite e-mail that moves a meeting from Tuesday to Thursday.",
)
REPLY = 192  # tokens a reply at most
CONTROL_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "</s>",
    "<end_of_turn>",
    "</think>",
    "<think>",
    "<tool_call>",
    "</tool_call>",
)


def replies(
    source: Source, tokenizer: Any, report: Report
) -> tuple[list[Windows], list[np.ndarray]]:
    """The source's replies as windows, and which of their tokens are control tokens.

    Each reply is a window of its own that begins with the prompt; only the reply is scored.

    Returns:
        The windows, and for each a bool array (scored tokens,).

    Raises:
        MintError: the model has no chat template, or one that fails (an evaluation of other prompts
            would look right); or it is too large for this machine.
    """
    if tokenizer.chat_template is None:
        raise MintError(
            f"--chat needs a model with a chat template, and {source.name} has none: leave --chat "
            "out"
        )

    # Control tokens by number: those of the list that this vocabulary has, and its ends of text.
    vocabulary = tokenizer.get_vocab()
    control = {vocabulary[token] for token in CONTROL_TOKENS if token in vocabulary}
    control |= set(tokenizer.eos_token_ids)

    prompts = chat_prompts(source.path, PROMPTS)
    windows: list[Windows] = []
    is_control: list[np.ndarray] = []
    generated = greedy_replies(source, prompts, REPLY, "--chat", report)
    for prompt, reply in zip(prompts, generated, strict=True):
        tokens = np.array([prompt + reply], dtype=np.int32)
        windows.append(Windows(tokens, first=len(prompt)))
        is_control.append(np.isin(np.array(reply), list(control)))
    return windows, is_control


@cache.using("replies")
def greedy_replies(
    source: Source, prompts: list[list[int]], length: int, option: str, report: Report
) -> list[list[int]]:
    """A source's greedy replies, generated once: another run might break ties otherwise.

    Args:
        source: the model.
        prompts: token ids.
        length: tokens of a reply at most.
        option: that asked for them, for an error's advice.
        report: is told where they can't be stored.

    Raises:
        MintError: the source is too large for this machine.
    """
    key = hashlib.blake2b(json.dumps([prompts, length]).encode(), digest_size=6).hexdigest()
    path = cache.cache_dir() / "replies" / f"{source.fingerprint}-{key}.json"
    generated = if_sound(path, lambda path: _read_replies(path, len(prompts), length))
    if generated is None:
        if not fits(source.path):
            raise MintError(
                f"{option} generates replies with the whole model in memory, and {source.name} is "
                f"too large for this machine: leave {option} out"
            )
        generated = generate_replies(source.path, prompts, length, report.step)
        with cache.report_write_errors("replies", report):
            write_text(path, with_checksum(json.dumps({"replies": generated})))
    return generated


def _read_replies(path: Path, count: int, length: int) -> list[list[int]]:
    """The stored replies to so many prompts, each of so many tokens at most.

    Raises:
        Damaged: they are something else.
    """
    data = read_checked(path, old="[[")
    replies = data.get("replies") if isinstance(data, dict) else data  # a list in older files
    if not isinstance(replies, list) or len(replies) != count:
        raise Damaged(f"{path} is damaged")
    if not all(_is_reply(reply, length) for reply in replies):
        raise Damaged(f"{path} is damaged")
    return replies


def _is_reply(reply: Any, length: int) -> bool:
    """Whether it is a list of so many tokens at most."""
    if not isinstance(reply, list) or not 0 < len(reply) <= length:
        return False
    return all(type(token) is int and 0 <= token < 2**31 for token in reply)
