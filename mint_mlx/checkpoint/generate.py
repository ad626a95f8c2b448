"""Generates with a checkpoint: a sentence by stock mlx-lm, and replies to prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from ..base.errors import NO_METAL, ON_GPU_ONLY, MintError
from ..base.report import Report
from .mlxlm import build_model
from .tokenizer import first_line, load_tokenizer, sentence_prompt

SENTENCE = 40  # tokens that are generated after the prompt
TOGETHER = 4096  # tokens of prompts that are answered at once


def generate_sentence(folder: Path, report: Report, max_tokens: int = SENTENCE) -> str:
    """Load a written checkpoint with stock mlx-lm and generate greedily from a short prompt.

    Args:
        folder: of the checkpoint.
        report: is told of a chat template that fails.
        max_tokens: after the prompt.

    Returns:
        The text; '' where the model has parts that mlx-lm runs on Metal only, and there is none.

    Raises:
        MintError: it loads but doesn't generate.
    """
    from mlx_lm import generate, load

    model, tokenizer = load(str(folder))
    if mx.default_device() == mx.cpu:  # gather_mm takes only float32 there
        model.set_dtype(mx.float32)
    prompt, start = sentence_prompt(folder, tokenizer, report)

    # The forward pass is mlx-lm's, on values of the user's config.json: these are the exceptions
    # with which it fails on bad ones.
    try:
        text: str = generate(model, tokenizer, prompt=prompt, max_tokens=max_tokens, verbose=False)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        if NO_METAL in str(error) or ON_GPU_ONLY in str(error):
            return ""
        raise MintError(
            f"the result loads but mlx-lm cannot generate from it ({type(error).__name__}: "
            f"{first_line(error)}): check the source's config.json, or give --no-smoke to keep the "
            "result all the same"
        ) from error

    return " ".join(f"{start} {text}".split())


def generate_tokens(folder: Path, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy replies of a checkpoint to prompts of token ids, each with the token that ended it.

    Prompts of similar lengths are answered together where the model's caches can be merged.
    """
    from mlx_lm.models.cache import make_prompt_cache

    model, tokenizer = build_model(folder), load_tokenizer(folder)
    if mx.default_device() == mx.cpu:  # gather_mm takes only float32 there
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    if not all(hasattr(cache, "merge") for cache in make_prompt_cache(model)):
        return one_by_one(model, tokenizer, prompts, max_tokens)

    replies: dict[int, list[int]] = {}
    for group in groups([len(prompt) for prompt in prompts]):
        answers = together(model, tokenizer, [prompts[i] for i in group], max_tokens)
        replies |= dict(zip(group, answers, strict=True))
    return [replies[i] for i in range(len(prompts))]


def groups(lengths: list[int]) -> list[list[int]]:
    """Indices of prompts that are answered together, by their lengths in tokens.

    A group holds at most TOGETHER tokens, each prompt counted as the longest one.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= TOGETHER:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def one_by_one(
    model: Any, tokenizer: Any, prompts: list[list[int]], max_tokens: int
) -> list[list[int]]:
    """Greedy replies of a loaded model, one after the other."""
    from mlx_lm import stream_generate

    return [
        [int(r.token) for r in stream_generate(model, tokenizer, p, max_tokens=max_tokens)]
        for p in prompts
    ]


def together(
    model: Any, tokenizer: Any, prompts: list[list[int]], max_tokens: int
) -> list[list[int]]:
    """Greedy replies of a loaded model to prompts in one batch."""
    from mlx_lm.generate import BatchGenerator

    if not hasattr(BatchGenerator, "next_generated"):  # mlx-lm before 0.32
        return one_by_one(model, tokenizer, prompts, max_tokens)
    generator = BatchGenerator(model, stop_tokens=[[token] for token in tokenizer.eos_token_ids])
    numbers = generator.insert(prompts, [max_tokens] * len(prompts))
    replies: dict[int, list[int]] = {number: [] for number in numbers}
    while responses := generator.next_generated():
        for response in responses:
            replies[response.uid].append(int(response.token))
    generator.close()
    return [replies[number] for number in numbers]
