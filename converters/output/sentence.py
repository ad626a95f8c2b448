"""The sentence that a finished checkpoint writes, through stock mlx-lm."""

from __future__ import annotations

from pathlib import Path

from ...base.errors import TAKE_BFLOAT16
from ...base.report import Report
from ...checkpoint.generate import generate_sentence
from ...checkpoint.layers import Inventory
from ...checkpoint.tokenizer import encode, load_tokenizer
from ...runtime.overflow import overflow
from ...runtime.runner import load_runner


def write_sentence(folder: Path, inventory: Inventory, report: Report) -> str | None:
    """A sentence that a checkpoint writes; None where its model doesn't run on this machine."""
    report.stage("generate")
    sentence = generate_sentence(folder, report) or None
    if sentence is None:
        report.note("MLX runs parts of this model on a GPU only: no sentence is generated here")
    elif any(layer.dtype == "F16" for layer in inventory.layers):
        _tell_overflow(folder, sentence, report)
    return sentence


def _tell_overflow(folder: Path, sentence: str, report: Report) -> None:
    """Say where float16 can't hold the activations of a checkpoint that wrote a sentence."""
    tokens = encode(load_tokenizer(folder), sentence)[None]
    problem = overflow(load_runner(folder), tokens) if tokens.size else None
    if problem is not None:
        report.note(
            f"the model states float16 and overflows in it, which gives NaN on a GPU ({problem}): "
            f"{TAKE_BFLOAT16}"
        )
