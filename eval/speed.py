"""Speed of a checkpoint on this machine, by mlx-lm's own generation: tokens per second of prompt
and of decoding.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..checkpoint import mlxlm
from ..checkpoint.tokenizer import load_tokenizer

PROMPT, DECODE, RUNS = 128, 48, 3


def speed(folder: Path) -> dict[str, float]:
    """Median of three runs: `prompt_tokens_per_second` and `decode_tokens_per_second`."""
    from mlx_lm.generate import generate_step, wired_limit

    model, tokenizer = mlxlm.build_model(folder), load_tokenizer(folder)
    if mx.default_device() == mx.cpu and any(
        type(m).__name__ == "SwitchLinear" for m in model.modules()
    ):
        model.set_dtype(mx.float32)  # gather_mm takes float32 only there
    mx.eval(model.parameters())
    prompt = mx.array(np.random.default_rng(0).integers(0, min(1000, tokenizer.vocab_size), PROMPT))
    prompts, decodes = [], []
    with wired_limit(model):  # as mlx-lm generates: without it a Mac may page a large model out
        for _ in range(RUNS + 1):  # the first one warms up
            start = time.perf_counter()
            first = 0.0
            for count, _ in enumerate(generate_step(prompt, model, max_tokens=DECODE + 1)):
                if count == 0:
                    first = time.perf_counter()
            prompts.append(PROMPT / (first - start))
            decodes.append(DECODE / (time.perf_counter() - first))
    return {
        "prompt_tokens_per_second": statistics.median(prompts[1:]),
        "decode_tokens_per_second": statistics.median(decodes[1:]),
    }
