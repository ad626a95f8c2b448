"""A checkpoint's greedy replies to prompts, computed as everything is that measures a model."""

from __future__ import annotations

from pathlib import Path

from ..base.report import Progress
from ..checkpoint.generate import generate_tokens
from ..checkpoint.tokenizer import load_tokenizer
from .fast_math import fast_math
from .runner import load_runner


def generate_replies(
    folder: Path, prompts: list[list[int]], max_tokens: int, progress: Progress
) -> list[list[int]]:
    """Greedy replies of a checkpoint that fits in memory, each with the token that ended it.

    Args:
        folder: the checkpoint.
        prompts: token ids.
        max_tokens: of a reply.
        progress: called with (what, tokens done, tokens in all).
    """
    model = load_runner(folder, streamed=False).model
    with fast_math(model):
        return generate_tokens(model, load_tokenizer(folder), prompts, max_tokens, progress)
