"""What `--dtype` does to a model: how far its weights move, and what that costs in KL."""

from __future__ import annotations

import shlex

import numpy as np

from ..base.hf_config import HALVES
from ..base.report import Report
from ..checkpoint.cast_change import cast_change
from ..measure.sensitivity import Sensitivity
from .measurements import first_token, vocabulary
from .model import Job
from .order import Order
from .stages import CAST, measures_cast

LENGTH, TOKENS = 64, 128  # of a short text: tokens a window, and in all


def tell_cast(job: Job, report: Report) -> bool:
    """Say how much another 16-bit type changes the weights; returns whether it does.

    Raises:
        MintError: one is too large for it.
    """
    dtype = job.source.dtype
    if dtype is None or not job.source.has_weights:
        return False
    report.stage(f"cast to {dtype}")
    change = cast_change(job.source, job.inventory, HALVES[dtype], report.step)
    if change is None:
        report.note(f"all weights are in {dtype} already: --dtype changes nothing")
    else:
        report.note(
            f"--dtype {dtype} changes {change.name} by {change.relative:.2g} of its norm, all "
            f"other tensors by less; {change.zeros} numbers become zeros"
        )
    return change is not None


def tell_divergence(order: Order, sensitivity: Sensitivity | None, report: Report) -> None:
    """Say what the cast costs in KL, on text that the model wrote, or how that can be measured.

    Args:
        order: of which the weights are on this machine.
        sensitivity: has text; without one the model writes a short one, where that is quick.
        report: is told.
    """
    from ..checkpoint.layer_stream import written_dtypes
    from ..runtime.cast_divergence import ROUNDING, cast_divergence

    job, dtype = order.job, order.job.source.dtype
    assert dtype is not None
    if sensitivity is None and not measures_cast(order):
        words = ["mint-mlx", "convert", order.request.model, "--dequantize", "--dtype", dtype]
        report.note(
            "what the cast costs in KL was not measured: `mint-mlx eval --source "
            f"{shlex.quote(order.request.model)}` of what `{shlex.join(words)}` writes tells it"
        )
        return

    report.stage(CAST)
    tokens = sensitivity.tokens if sensitivity is not None else _short_text(job)
    divergence = cast_divergence(job.source.path, dtype, written_dtypes(job.inventory), tokens)
    figure = f"{divergence:.2g}" if divergence > ROUNDING else f"less than {ROUNDING:.0g}"
    report.note(f"the cast to {dtype} costs a KL of {figure} nats a token, on the model's own text")


def _short_text(job: Job) -> np.ndarray:
    """A few tokens that the model writes, int32 (windows, LENGTH)."""
    from ..measure.self_text import random_windows, write_tokens

    windows = random_windows(vocabulary(job), TOKENS, first_token(job), length=LENGTH)
    return write_tokens(job.source, windows, streamed=False)[0]
