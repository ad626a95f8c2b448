"""Chat text for a comparison: the source's own greedy replies to a few bundled prompts, through its
chat template.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from ..base.errors import MintError
from ..base.files import read_json, write_text
from ..base.report import Report
from ..checkpoint.mlxlm import generate_tokens
from ..checkpoint.source import Source
from ..checkpoint.tokenizer import chat_prompt
from ..measure import cache
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
_MARKS = (
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
    """The source's replies as windows in which only the reply is scored, and which of its tokens
    are control tokens.

    Raises:
        MintError: the model has no chat template, or is too large for this machine.
    """
    if tokenizer.chat_template is None:
        raise MintError(
            "--chat needs a model with a chat template, which this one lacks: leave it out"
        )
    prompts = [chat_prompt(source.path, tokenizer, text) for text in PROMPTS]
    vocabulary = tokenizer.get_vocab()
    control = {vocabulary[mark] for mark in _MARKS if mark in vocabulary} | set(
        tokenizer.eos_token_ids
    )
    parts, marks = [], []
    for prompt, reply in zip(prompts, _greedy(source, prompts, report), strict=True):
        tokens = np.array([prompt + reply], dtype=np.int32)
        parts.append(Windows(tokens, first=len(prompt)))
        marks.append(np.isin(np.array(reply), list(control)))
    return parts, marks


def _greedy(source: Source, prompts: list[list[int]], report: Report) -> list[list[int]]:
    """The replies, generated once: another run might break ties otherwise."""
    key = hashlib.blake2b(json.dumps([prompts, REPLY]).encode(), digest_size=6).hexdigest()
    path = cache.cache_dir() / "replies" / f"{source.fingerprint}-{key}.json"
    found = read_json(path)
    if found is None:
        if not fits(source.path):
            raise MintError(
                "--chat lets the source write in memory, which this one is too large for: leave "
                "it out"
            )
        found = generate_tokens(source.path, prompts, REPLY)
        with cache.report_write_errors("replies", report):
            write_text(path, json.dumps(found))
    return [[int(token) for token in reply] for reply in found]
