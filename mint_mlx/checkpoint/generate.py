"""Generates with a checkpoint: a sentence by stock mlx-lm, and replies to prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..base.errors import ON_GPU_ONLY, MintError, is_for_metal
from ..base.report import Progress, Report
from .tokenizer import first_line, sentence_prompt

SENTENCE = 40  # tokens that are generated after the prompt
TOGETHER = 1024  # tokens of prompts that are answered at once
LONG = 512  # tokens of a prompt that is answered alone
# A step that writes a token of each reply takes as long as reading STEP tokens, and EACH more for
# each reply (SmolLM2-135M on a CPU: 76 for 19 replies, 28 for one).
STEP, EACH = 24, 3


def generate_sentence(folder: Path, report: Report, max_tokens: int = SENTENCE) -> str:
    """Load a written checkpoint with stock mlx-lm and generate greedily from a short prompt.

    Args:
        folder: of the checkpoint.
        report: is told of a chat template that fails.
        max_tokens: after the prompt.

    Returns:
        The text; '' where the model has parts that mlx-lm runs on Metal only, and there is none.

    Raises:
        MintError: it loads but doesn't generate, or computes no numbers.
    """
    from mlx_lm import load, stream_generate

    try:
        model, tokenizer = load(str(folder))
    except TypeError as error:
        raise MintError(
            f"mlx-lm cannot load the result ({first_line(error)}): check the values of the "
            "source's config.json and generation_config.json, its eos_token_id above all"
        ) from error
    if mx.default_device() == mx.cpu:  # gather_mm takes only float32 there
        model.set_dtype(mx.float32)
    prompt, start = sentence_prompt(folder, tokenizer, report)

    # The forward pass is mlx-lm's, on values of the user's config.json: these are the exceptions
    # with which it fails on bad ones.
    text = ""
    try:
        for response in stream_generate(model, tokenizer, prompt, max_tokens=max_tokens):
            if mx.isnan(response.logprobs).any():
                raise MintError(
                    "the result computes no numbers (NaN): the source's weights or config.json are "
                    "damaged, or this machine's arithmetic overflows: look at the source's own "
                    "text with mlx_lm.generate, or give --no-smoke to keep the result all the same"
                )
            text += response.text
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        if is_for_metal(error) or ON_GPU_ONLY in str(error):
            return ""
        raise MintError(
            f"the result loads but mlx-lm cannot generate from it ({type(error).__name__}: "
            f"{first_line(error)}): check the source's config.json, or give --no-smoke to keep the "
            "result all the same"
        ) from error

    if not text.strip():
        report.note(
            "the result wrote nothing after its prompt: see whether the source writes more with "
            "mlx_lm.generate"
        )
    return " ".join(f"{start} {text}".split())


def generate_tokens(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    max_tokens: int,
    progress: Progress = lambda *_: None,
) -> list[list[int]]:
    """Greedy replies of a loaded model to prompts of token ids, each with the token that ended it.

    Short prompts of similar lengths are answered together where the model's caches can be merged;
    of one length where a cache is no attention's: Mamba and its like take padding for text
    (findings/jamba-replies-depend-on-their-batch-in-mlx-lm.sh).

    Args:
        model: an mlx-lm model.
        tokenizer: its tokenizer.
        prompts: token ids.
        max_tokens: of a reply.
        progress: called with (what, work done, work in all), as of `work`.
    """
    lengths = [len(prompt) for prompt in prompts]
    caches = _caches(model)
    batches = [[i] for i in range(len(prompts))]
    if _answers_together(caches):
        batches = groups(lengths, _masks_padding(caches))
    works = [work([lengths[i] for i in batch], max_tokens) for batch in batches]
    total = sum(works)

    replies: dict[int, list[int]] = {}
    for number, batch in enumerate(batches):
        before = sum(works[:number])

        def tell(done: int, before: int = before) -> None:
            progress("replies", before + done, total)

        tell(0)
        some = [prompts[i] for i in batch]
        replies |= dict(zip(batch, _answer(model, tokenizer, some, max_tokens, tell), strict=True))
    progress("replies", total, total)
    return [replies[i] for i in range(len(prompts))]


def _caches(model: Any) -> list[Any]:
    """What a model keeps between tokens, of each layer."""
    from mlx_lm.models.cache import make_prompt_cache

    return list(make_prompt_cache(model))


def _answers_together(caches: list[Any]) -> bool:
    """Whether several prompts can share a batch: not before mlx-lm 0.32, nor with every cache."""
    from mlx_lm.generate import BatchGenerator

    merges = all(hasattr(cache, "merge") for cache in caches)
    return merges and hasattr(BatchGenerator, "next_generated")


def _masks_padding(caches: list[Any]) -> bool:
    """Whether all state that a model keeps is attention's, which masks the padding of a batch."""
    from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache

    parts = [cache.caches if isinstance(cache, CacheList) else [cache] for cache in caches]
    return all(isinstance(each, (KVCache, RotatingKVCache)) for part in parts for each in part)


def work(lengths: list[int], max_tokens: int) -> int:
    """What it costs to answer prompts together, in tokens that are read.

    A step that writes a token of each reply reads all weights, however few replies there are.
    """
    return sum(lengths) + max_tokens * (STEP + EACH * len(lengths))


def _answer(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    max_tokens: int,
    progress: Callable[[int], None],
) -> list[list[int]]:
    """Greedy replies to prompts at once; `progress` is called with the work done."""
    read = sum(map(len, prompts))
    each = EACH + STEP / len(prompts)
    answer = together if len(prompts) > 1 else one_by_one

    def written(tokens: int) -> None:
        progress(read + round(tokens * each))

    return answer(model, tokenizer, prompts, max_tokens, written)


def groups(lengths: list[int], padded: bool = True) -> list[list[int]]:
    """Indices of prompts that are answered together, by their lengths in tokens.

    A group holds at most TOGETHER tokens, each prompt counted as the longest one. A prompt above
    LONG is alone: its attention needs no mask for the others, which is slow on a CPU. Where nothing
    may be `padded`, those of a group have one length.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        joins = bool(batches) and lengths[index] <= LONG
        joins = joins and (padded or lengths[batches[-1][0]] == lengths[index])
        if joins and (len(batches[-1]) + 1) * lengths[index] <= TOGETHER:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def one_by_one(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    max_tokens: int,
    written: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """Greedy replies of a loaded model, one after the other; `written` is told all their tokens."""
    from mlx_lm import stream_generate

    replies: list[list[int]] = []
    for prompt in prompts:
        replies.append([])
        for response in stream_generate(model, tokenizer, prompt, max_tokens=max_tokens):
            replies[-1].append(int(response.token))
            written(sum(map(len, replies)))
    return replies


def together(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    max_tokens: int,
    written: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """Greedy replies of a loaded model to prompts in one batch; `written` as of `one_by_one`."""
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(model, stop_tokens=[[token] for token in tokenizer.eos_token_ids])
    numbers = generator.insert(prompts, [max_tokens] * len(prompts))
    replies: dict[int, list[int]] = {number: [] for number in numbers}
    while responses := generator.next_generated():
        for response in responses:
            replies[response.uid].append(int(response.token))
        written(sum(map(len, replies.values())))
    generator.close()
    return [replies[number] for number in numbers]
