"""Speed of a checkpoint on this machine: tokens per second of mlx-lm's own generation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..checkpoint import mlxlm
from ..checkpoint.tokenizer import load_tokenizer

PROMPT = 128  # tokens that are read
DECODE = 48  # tokens that are generated
RUNS = 3
UNSTEADY = 0.05  # of the reference against itself, above which ratios say nothing


def speed(folder: Path) -> dict[str, float]:
    """Median of three runs: `prompt_tokens_per_second` and `decode_tokens_per_second`.

    Of the latter the lowest and the highest run too: `decode_lowest` and `decode_highest`.
    """
    from mlx_lm.generate import generate_step, wired_limit

    # On a CPU gather_mm takes float32 only.
    model = mlxlm.build_model(folder)
    experts = any(type(module).__name__ == "SwitchLinear" for module in model.modules())
    if experts and mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())

    vocabulary = min(1000, load_tokenizer(folder).vocab_size)
    prompt = mx.array(np.random.default_rng(0).integers(0, vocabulary, PROMPT))

    # As mlx-lm generates: without the wired limit a Mac may page a large model out.
    prompts: list[float] = []
    decodes: list[float] = []
    with wired_limit(model):
        for _ in range(RUNS + 1):
            start = time.perf_counter()
            first = 0.0
            for count, _ in enumerate(generate_step(prompt, model, max_tokens=DECODE + 1)):
                if count == 0:
                    first = time.perf_counter()
            prompts.append(PROMPT / (first - start))
            decodes.append(DECODE / (time.perf_counter() - first))

    # The first run warms up.
    return {
        "prompt_tokens_per_second": statistics.median(prompts[1:]),
        "decode_tokens_per_second": statistics.median(decodes[1:]),
        "decode_lowest": min(decodes[1:]),
        "decode_highest": max(decodes[1:]),
    }


def decode_ratios(
    figures: Mapping[str, float], before: float, after: float
) -> dict[str, float] | None:
    """Decoding of a checkpoint over that of a reference, with the spread of its runs.

    Args:
        figures: of `speed`.
        before, after: the reference's tokens per second, measured before and after all others.

    Returns:
        `decode_ratio`, `decode_ratio_lowest`, `decode_ratio_highest`; None where the machine was so
        unsteady that the reference differs from itself by more than UNSTEADY.
    """
    if max(before, after) / min(before, after) - 1 > UNSTEADY:
        return None
    unit = (before + after) / 2
    return {
        "decode_ratio": figures["decode_tokens_per_second"] / unit,
        "decode_ratio_lowest": figures["decode_lowest"] / unit,
        "decode_ratio_highest": figures["decode_highest"] / unit,
    }
