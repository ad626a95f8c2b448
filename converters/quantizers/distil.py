"""Distils the scales and biases of a finished checkpoint on text that the source wrote itself.

The source's predictions are computed once, streamed where it is larger than memory; after that only
the quantized model is needed. What is learned is the divergence of the checkpoint's predictions
from them (distillation: Hinton, Vinyals and Dean, 2015; of scales and biases as mlx-lm's DWQ does),
by Adam on relative offsets of every affine layer's scales and biases. Codes, shapes and bytes stay;
norms and everything unquantized as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from ...base.array_files import write_tensors
from ...base.checksum import if_sound
from ...base.errors import MintError
from ...base.folders import SCRATCH
from ...base.quant_config import QuantConfig
from ...base.report import Progress, Report
from ...checkpoint.layers import Inventory
from ...checkpoint.source import Source
from ...measure.text import Text
from ...runtime.device import on_cpu
from ...runtime.divergence import mean_merged_kl
from ...runtime.memory import fits_here, workspace
from ...runtime.runner import LOGITS
from .distil_note import read_note, resume, write_note
from .learn_block import batches, hold_out
from .predictions import Targets, predict, stored_targets
from .student import Params, Student

STEPS = 200
RATE = 1e-3  # of their size, Adam's first rate for scales and biases
LEARNED_RATE = 3e-4  # the same where they were learned block by block before
TOKENS = 1024  # a step
CHECKS = 4  # evaluations on the held-out windows
NO_ROOM = (
    "this machine has too little memory to distil scales and biases end to end: they stay as "
    "learned"
)


@dataclass(frozen=True)
class Refined:
    """Scales and biases that were distilled, in the types that they are stored in.

    Attributes:
        tensors: by name in the checkpoint.
        before, after: KL divergence from the source in nats per token, on windows that it was not
            trained on.
    """

    tensors: dict[str, mx.array]
    before: float
    after: float


def refine(
    folder: Path,
    targets: Targets,
    steps: int | None = None,
    progress: Progress = lambda *_: None,
    rate: float | None = None,
    resume_file: Path | None = None,
) -> Refined:
    """Distil a checkpoint's scales and biases; the best on the last eighth of windows is returned.

    Args:
        folder: any MLX checkpoint of the same vocabulary that fits in memory.
        targets: the source's predictions.
        steps: of Adam; STEPS by default.
        progress: called with (what, done, total).
        rate: Adam's first, of the size of scales and biases; RATE by default.
        resume_file: a .safetensors file, written at each evaluation on the held-out windows; the
            same call resumes from it.

    Raises:
        MintError: it holds no affine layer, or the model has an operation without a gradient.
    """
    steps = steps or STEPS
    student = Student(folder)
    student.check_names(folder)
    train, valid = hold_out(len(targets.text.tokens))
    params: Params = {
        path: {name: mx.zeros_like(array) for name, array in start.items()}
        for path, start in student.start.items()
    }
    size = _step_windows(student, params, targets, len(train))

    arrays = targets.text.tokens, targets.ids, targets.logp, targets.text.counted

    def loss(params: Params, rows: np.ndarray) -> mx.array:
        tokens, ids, logp, counted = (mx.array(array[rows]) for array in arrays)
        return mean_merged_kl(student.logits(params, tokens), ids, logp, counted)

    def total(params: Params) -> float:
        pieces = [valid[i : i + size] for i in range(0, len(valid), size)]
        return sum(float(loss(params, rows)) * len(rows) for rows in pieces) / len(valid)

    # An interrupted run goes on with its parameters and Adam's moments.
    optimizer = optim.Adam(
        learning_rate=optim.linear_schedule(RATE if rate is None else rate, 0.0, steps),
        bias_correction=True,
    )
    noted = None
    if resume_file is not None:
        noted = if_sound(resume_file, lambda file: read_note(file, params, steps))
    if noted is not None:
        done, before, lowest, params, best = resume(noted, optimizer, params)
    else:
        done = 0
        before = lowest = total(params)
        best = params

    gradient = mx.value_and_grad(loss)
    for step, rows in islice(enumerate(batches(train, size, steps)), done, None):
        progress("distil", step, steps)
        try:
            _, grads = gradient(params, rows)
        except ValueError as error:
            sentence = (
                f"{folder.name} can't be refined: one of its operations has no gradient in MLX"
            )
            raise MintError(f"{sentence} ({str(error).splitlines()[0]})") from error
        params = optimizer.apply_gradients(grads, params)
        mx.eval(params, optimizer.state)

        # Later isn't always better: the best of a few evaluations is returned.
        if (step + 1) % max(1, steps // CHECKS) == 0:
            if (now := total(params)) < lowest:
                lowest = now
                best = params
            if resume_file is not None:
                write_note(resume_file, optimizer, (step + 1, before, lowest), params, best)

    dtypes = {path: module["scales"].dtype for path, module in student.stored.items()}
    tensors = {
        path: {name: array.astype(dtypes[path]) for name, array in new.items()}
        for path, new in student.moved(best).items()
    }
    return Refined(dict(tree_flatten(tensors)), before, lowest)


def _step_windows(student: Student, params: Params, targets: Targets, train: int) -> int:
    """Windows of a step: TOKENS of them, or fewer where their logits would be too large."""
    tokens = targets.text.tokens
    length = tokens.shape[1]
    vocabulary = int(student.logits(params, mx.array(tokens[:1, :1])).shape[-1])
    return max(1, min(TOKENS // length, 2 * LOGITS // (length * vocabulary), train))


def refine_own(
    source: Source,
    text: Text,
    folder: Path,
    progress: Progress = lambda *_: None,
    steps: int | None = None,
    rate: float | None = None,
) -> Refined | None:
    """Refine a checkpoint on its source's own tokens; None where nothing is gained.

    Nothing is written.

    Args:
        source: what it was made from.
        text: the source's own.
        folder: the checkpoint.
        progress, steps, rate: as for `refine`.
    """
    targets = predict(source, text, progress)
    refined = refine(folder, targets, steps, progress, rate)
    return refined if refined.after < refined.before else None


def refine_written(
    source: Source, text: Text, report: Report, work: Path, refined_file: Path
) -> None:
    """Refine what was learned block by block and written, before the folder gets its name.

    Args:
        source: what it was made from.
        text: the source's own.
        report: receives progress.
        work: the folder.
        refined_file: where the result is stored, for `replace_tensors` to write into the shards, so
            that an interruption between two of them loses nothing; absent where nothing is gained.
    """
    report.stage("refine")
    targets = stored_targets(source, text, report, work / f"{SCRATCH}targets.safetensors")
    resume_file = work / f"{SCRATCH}refining.safetensors"
    refined = refine(work, targets, learned_steps(), report.step, LEARNED_RATE, resume_file)
    if refined.after >= refined.before:
        report.note("distilling scales and biases gained nothing: they stay as they were")
        return
    write_tensors(refined_file, refined.tensors)


def learned_steps() -> int:
    """Adam's steps for what was learned block by block before: half as many, for all there is."""
    return -(-STEPS // 2)


def can_refine(inventory: Inventory, choice: Mapping[str, QuantConfig]) -> bool:
    """Whether a checkpoint of these configurations can be refined on this machine, roughly."""
    return fits_here(refining(inventory, choice))


def refining(inventory: Inventory, choice: Mapping[str, QuantConfig]) -> int:
    """Bytes that refining holds, roughly.

    Dense weights with gradients on a CPU, else the weights as stored and fourteen floats a group;
    and of one step's tokens what the blocks' layers return, many times where numpy's exponential
    keeps it all, and five arrays of logits (measured on the three reference models: 0.7 to 0.9
    times as much is held).
    """
    cpu = on_cpu()
    weights = 0
    for layer in inventory.layers:
        config = choice[layer.path]
        if cpu:
            weights += (12 if config.quantized else 4) * layer.size
        else:
            weights += layer.bytes(config)
            weights += 56 * layer.size // config.group_size if config.quantized else 0

    # Of 16 bits, float32 on a CPU.
    ends = [layer.shape[-2] for layer in inventory.layers if layer.role in ("embedding", "head")]
    vocabulary = max(ends, default=1)
    tokens = min(TOKENS, max(1, 2 * LOGITS // vocabulary))
    activations = (24 if cpu else 4) * inventory.blocks * workspace(inventory, tokens)
    return weights + activations + 5 * 4 * tokens * vocabulary
