"""What a source predicts after each token of its own text, for distilling (distil.py).

Streamed where the source is larger than memory, and stored in the work folder until the checkpoint
is finished.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ...base import schema
from ...base.array_files import read_arrays, write_arrays
from ...base.checksum import Damaged, if_sound
from ...base.report import Progress, Report
from ...base.targets import check_space
from ...checkpoint.source import Source
from ...measure.text import Text
from ...runtime.divergence import log_softmax
from ...runtime.forward import forward
from ...runtime.runner import load_runner

TOP = 1024  # of the source's most likely tokens kept for each position


@dataclass(frozen=True)
class Targets:
    """What the source predicts after each token.

    Attributes:
        text: the source's own.
        ids: int32 (windows, tokens, K), its K most likely tokens: TOP, or the whole vocabulary
            where that is less.
        logp: float32 (windows, tokens, K), their log-probabilities.
    """

    text: Text
    ids: np.ndarray
    logp: np.ndarray


def predict(source: Source, text: Text, progress: Progress = lambda *_: None) -> Targets:
    """The source's predictions.

    Args:
        source: a checkpoint whose weights are on this machine.
        text: its own.
        progress: called with (what, windows done, windows in all).
    """
    runner = load_runner(source.path, dtype=source.dtype)
    count, length = text.tokens.shape
    targets: Targets | None = None
    for piece in forward(runner, text.tokens, max(1, 2048 // length)):
        progress("source", piece.rows.start, count)
        width = min(TOP, piece.logits.shape[-1])
        if targets is None:  # the width is known after the first piece
            shape = (count, length, width)
            ids = np.zeros(shape, dtype=np.int32)
            targets = Targets(text, ids, np.zeros(shape, dtype=np.float32))

        logp = log_softmax(piece.logits)
        best = mx.argpartition(-logp, width - 1, axis=-1)[..., :width]
        place = piece.rows, piece.columns
        targets.ids[place] = np.array(best).astype(np.int32)
        targets.logp[place] = np.array(mx.take_along_axis(logp, best, axis=-1))
        mx.clear_cache()
    assert targets is not None  # there is a window
    return targets


def stored_targets(source: Source, text: Text, report: Report, resume_file: Path) -> Targets:
    """The source's predictions, from the file of an interrupted run or else written there."""
    stored = if_sound(resume_file, lambda file: read_targets(file, text))
    if stored is not None:
        return stored
    check_space(resume_file.parent, 8 * TOP * text.tokens.size)
    targets = predict(source, text, report.step)
    write_arrays(resume_file, {"ids": targets.ids, "logp": targets.logp})
    return targets


def read_targets(file: Path, text: Text) -> Targets:
    """The source's predictions of this text as `stored_targets` wrote them.

    Raises:
        Damaged: they are something else.
    """
    arrays, _ = read_arrays(file)
    try:
        shape = (*text.tokens.shape, None)
        logp = schema.check_array(arrays["logp"], schema.FLOAT, shape, high=0.1)
        ids = schema.check_array(arrays["ids"], schema.INTEGER, logp.shape, 0, 2**31 - 1)
    except (KeyError, ValueError):
        raise Damaged(f"{file} is damaged") from None
    return Targets(text, ids, logp)
