"""The sentence that a finished checkpoint writes, through stock mlx-lm."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from ...base.errors import TAKE_BFLOAT16
from ...base.quant_config import QuantConfig
from ...base.report import Report
from ...checkpoint.generate import SENTENCE, generate_sentence
from ...checkpoint.layers import Inventory
from ...checkpoint.tokenizer import encode, load_tokenizer
from ...runtime.device import on_cpu
from ...runtime.overflow import overflow
from ...runtime.runner import load_runner

SECONDS = 2.0  # that a sentence may take on a CPU, with loading
PROMPT = 8  # tokens that are read before the first one is written
FEWEST = 6  # tokens that are worth it
PROBE = 2048  # rows and columns of a product that is timed
LOADED = 1e9  # bytes that are loaded in a second


def write_sentence(
    folder: Path, inventory: Inventory, choice: Mapping[str, QuantConfig], report: Report
) -> str | None:
    """A sentence that a checkpoint writes.

    None where its model doesn't run on this machine, or takes longer than SECONDS.
    """
    count = _affordable_tokens(inventory, choice) if on_cpu() else SENTENCE
    if count < FEWEST:
        report.note(
            "no sentence is generated: this machine would take more than "
            f"{SECONDS:.0f} s for it (the command below writes one)"
        )
        return None
    report.stage("generate")
    sentence = generate_sentence(folder, report, min(count, SENTENCE)) or None
    if sentence is None:
        report.note("MLX runs parts of this model on a GPU only: no sentence is generated here")
    elif any(layer.dtype == "F16" for layer in inventory.layers):
        _tell_overflow(folder, sentence, report)
    if sentence is not None and count < SENTENCE:
        report.note(f"the sentence ends after {count} tokens, for it may take {SECONDS:.0f} s")
    return sentence


def _affordable_tokens(inventory: Inventory, choice: Mapping[str, QuantConfig]) -> int:
    """How many tokens of a sentence a CPU writes in SECONDS, by the speed of one product."""
    weight = mx.random.normal((PROBE, PROBE))
    packed = mx.quantize(weight, 64, 4)
    x = mx.random.normal((1, PROBE))
    mx.eval(packed, x)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        mx.eval(mx.quantized_matmul(x, *packed, transpose=True, group_size=64, bits=4))
        times.append(time.perf_counter() - start)

    rate = sum(array.nbytes for array in packed) / min(times)
    left_over = SECONDS - inventory.layout(dict(choice)).total / LOADED
    return int(left_over * rate / inventory.active_bytes(dict(choice))) - PROMPT


def _tell_overflow(folder: Path, sentence: str, report: Report) -> None:
    """Say where float16 can't hold the activations of a checkpoint that wrote a sentence."""
    tokens = encode(load_tokenizer(folder), sentence)[None]
    problem = overflow(load_runner(folder), tokens) if tokens.size else None
    if problem is not None:
        report.note(
            f"the model states float16 and overflows in it, which gives NaN on a GPU ({problem}): "
            f"{TAKE_BFLOAT16}"
        )
