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
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from ...base import schema
from ...base.array_files import read_arrays, write_arrays, write_tensors
from ...base.checksum import Damaged, if_sound
from ...base.errors import MintError
from ...base.folders import SCRATCH
from ...base.quant_config import QuantConfig
from ...base.report import Progress, Report
from ...base.safetensors_header import read_folder
from ...base.targets import check_space
from ...checkpoint import mlxlm
from ...checkpoint.layers import Inventory
from ...checkpoint.source import Source
from ...runtime.device import on_cpu
from ...runtime.divergence import log_softmax, mean_merged_kl
from ...runtime.fast_math import fast_math
from ...runtime.forward import forward
from ...runtime.memory import fits_here, workspace
from ...runtime.runner import LOGITS, load_runner, logits_of, trunk_output
from .learn_block import batches, hold_out, moved

TOP = 1024  # of the source's most likely tokens kept for each position
STEPS = 200
RATE = 1e-3  # of their size, Adam's first rate for scales and biases
LEARNED_RATE = 3e-4  # the same where they were learned block by block before
TOKENS = 1024  # a step
CHECKS = 6  # evaluations on the held-out windows
NO_ROOM = (
    "this machine has too little memory to distil scales and biases end to end: they stay as "
    "learned"
)
Params = dict[str, dict[str, mx.array]]  # by layer, then by name


@dataclass(frozen=True)
class Targets:
    """What the source predicts after each token.

    Attributes:
        tokens: int32 (windows, tokens).
        ids: int32 (windows, tokens, K), its K most likely tokens: TOP, or the whole vocabulary
            where that is less.
        logp: float32 (windows, tokens, K), their log-probabilities.
    """

    tokens: np.ndarray
    ids: np.ndarray
    logp: np.ndarray


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


def predict(source: Source, tokens: np.ndarray, progress: Progress = lambda *_: None) -> Targets:
    """The source's predictions.

    Args:
        source: a checkpoint whose weights are on this machine.
        tokens: int (windows, tokens).
        progress: called with (what, windows done, windows in all).
    """
    runner = load_runner(source.path, dtype=source.dtype)
    count, length = tokens.shape
    targets: Targets | None = None
    for piece in forward(runner, tokens, max(1, 2048 // length)):
        progress("source", piece.rows.start, count)
        width = min(TOP, piece.logits.shape[-1])
        if targets is None:  # the width is known after the first piece
            shape = (count, length, width)
            ids = np.zeros(shape, dtype=np.int32)
            targets = Targets(tokens, ids, np.zeros(shape, dtype=np.float32))

        logp = log_softmax(piece.logits)
        best = mx.argpartition(-logp, width - 1, axis=-1)[..., :width]
        place = piece.rows, piece.columns
        targets.ids[place] = np.array(best).astype(np.int32)
        targets.logp[place] = np.array(mx.take_along_axis(logp, best, axis=-1))
        mx.clear_cache()
    assert targets is not None  # there is a window
    return targets


class _Student:
    """A checkpoint whose scales and biases can change.

    On a CPU its layers are dense, and computed anew from their codes at each step.
    """

    def __init__(self, folder: Path) -> None:
        self.runner = load_runner(folder, False)
        self.runner.model.train()
        self.modules: dict[str, nn.Module] = dict(self.runner.model.named_modules())
        self.stored = {
            path: module
            for path, module in mlxlm.build_model(folder).named_modules()
            if "scales" in module and module.get("biases") is not None
        }
        self.start = {
            path: {name: module[name].astype(mx.float32) for name in ("scales", "biases")}
            for path, module in self.stored.items()
        }
        if not self.stored:
            raise MintError(
                f"{folder.name} has no layer with scales and biases: there is nothing to refine"
            )

    def check_names(self, folder: Path) -> None:
        """Refuse a checkpoint that stores its scales in another form than mlx-lm's modules have.

        Raises:
            MintError: naming the first such tensor.
        """
        sizes = {
            name: t.end - t.start
            for table in read_folder(folder).values()
            for name, t in table.items()
        }
        for path, module in self.stored.items():
            for name in ("scales", "biases"):
                if sizes.get(f"{path}.{name}") != module[name].nbytes:
                    raise MintError(
                        f"{folder.name} doesn't store {path}.{name} as mlx-lm names it: only "
                        "checkpoints that mlx-lm or mint-mlx wrote can be refined"
                    )

    def moved(self, params: Params) -> Params:
        """Scales and biases after their offsets, rounded to the types that they are stored in."""
        out: Params = {}
        for path, offsets in params.items():
            dtype = self.stored[path]["scales"].dtype
            start = self.start[path]
            scales, biases = moved(start["scales"], start["biases"], offsets, dtype)
            out[path] = {"scales": scales, "biases": biases}
        return out

    def logits(self, params: Params, tokens: mx.array) -> mx.array:
        """The checkpoint's predictions with these offsets, float32."""
        for path, new in self.moved(params).items():
            stored = self.stored[path]
            module = self.modules[path]
            if on_cpu():
                module.weight = mx.dequantize(
                    stored.weight, new["scales"], new["biases"], stored.group_size, stored.bits
                )
            else:
                module.scales = new["scales"].astype(stored["scales"].dtype)
                module.biases = new["biases"].astype(stored["biases"].dtype)
        with fast_math(self.runner.model):
            return logits_of(self.runner, tokens, trunk_output(self.runner, tokens))


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
    student = _Student(folder)
    student.check_names(folder)
    train, valid = hold_out(len(targets.tokens))
    params: Params = {
        path: {name: mx.zeros_like(array) for name, array in start.items()}
        for path, start in student.start.items()
    }
    size = _step_windows(student, params, targets, len(train))

    def loss(params: Params, rows: np.ndarray) -> mx.array:
        tokens, ids, logp = (mx.array(a[rows]) for a in (targets.tokens, targets.ids, targets.logp))
        return mean_merged_kl(student.logits(params, tokens), ids, logp)

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
        noted = if_sound(resume_file, lambda file: _read_note(file, params, steps))
    if noted is not None:
        done, before, lowest, params, best = _resume(noted, optimizer, params)
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
                _note(resume_file, optimizer, (step + 1, before, lowest), params, best)

    dtypes = {path: module["scales"].dtype for path, module in student.stored.items()}
    tensors = {
        path: {name: array.astype(dtypes[path]) for name, array in new.items()}
        for path, new in student.moved(best).items()
    }
    return Refined(dict(tree_flatten(tensors)), before, lowest)


def _step_windows(student: _Student, params: Params, targets: Targets, train: int) -> int:
    """Windows of a step: TOKENS of them, or fewer where their logits would be too large."""
    length = targets.tokens.shape[1]
    vocabulary = int(student.logits(params, mx.array(targets.tokens[:1, :1])).shape[-1])
    return max(1, min(TOKENS // length, 2 * LOGITS // (length * vocabulary), train))


def _note(
    resume_file: Path,
    optimizer: optim.Adam,
    figures: tuple[float, ...],
    params: Params,
    best: Params,
) -> None:
    """Write how far distilling is.

    Args:
        resume_file: to write.
        optimizer: whose moments are written too.
        figures: steps done, divergence before, lowest so far.
        params: of this moment.
        best: those of the lowest divergence.
    """
    arrays = {"figures": np.array(figures)}
    for path, offsets in params.items():
        for name, array in offsets.items():
            state = optimizer.state[path][name]
            for what, value in {"at": array, **state, "best": best[path][name]}.items():
                arrays[f"{what}.{path}.{name}"] = np.array(value)
    write_arrays(resume_file, arrays)


def _read_note(resume_file: Path, params: Params, steps: int) -> dict[str, np.ndarray]:
    """What `_note` wrote for these parameters.

    Raises:
        Damaged: it is something else.
    """
    arrays, _ = read_arrays(resume_file)
    try:
        figures = schema.check_array(arrays["figures"], schema.FLOAT, (3,), -1)
        if not (0 <= figures[0] <= steps and figures[0] == int(figures[0])):
            raise ValueError("no number of steps")
        for path, offsets in params.items():
            for name, array in offsets.items():
                for what in ("at", "m", "v", "best"):
                    schema.check_array(arrays[f"{what}.{path}.{name}"], schema.FLOAT, array.shape)
    except (KeyError, ValueError):
        raise Damaged(f"{resume_file} is damaged") from None
    return arrays


def _resume(
    arrays: Mapping[str, np.ndarray], optimizer: optim.Adam, params: Params
) -> tuple[int, float, float, Params, Params]:
    """Steps done, divergence before, lowest, parameters and the best of them (see `_note`)."""
    done, before, lowest = arrays["figures"].tolist()
    optimizer.init(params)
    optimizer.state["step"] = mx.array(int(done), dtype=optimizer.state["step"].dtype)

    def read(what: str) -> Params:
        return {
            path: {name: mx.array(arrays[f"{what}.{path}.{name}"]) for name in offsets}
            for path, offsets in params.items()
        }

    for moment in ("m", "v"):
        for path, offsets in read(moment).items():
            for name, array in offsets.items():
                optimizer.state[path][name][moment] = array
    return int(done), before, lowest, read("at"), read("best")


def refine_own(
    source: Source,
    tokens: np.ndarray,
    folder: Path,
    progress: Progress = lambda *_: None,
    steps: int | None = None,
    rate: float | None = None,
) -> Refined | None:
    """Refine a checkpoint on its source's own tokens; None where nothing is gained.

    Nothing is written.

    Args:
        source: what it was made from.
        tokens: int (windows, tokens), the source's own.
        folder: the checkpoint.
        progress, steps, rate: as for `refine`.
    """
    targets = predict(source, tokens, progress)
    refined = refine(folder, targets, steps, progress, rate)
    return refined if refined.after < refined.before else None


def refine_written(
    source: Source, tokens: np.ndarray, report: Report, work: Path, refined_file: Path
) -> None:
    """Refine what was learned block by block and written, before the folder gets its name.

    Args:
        source: what it was made from.
        tokens: int (windows, tokens), the source's own.
        report: receives progress.
        work: the folder.
        refined_file: where the result is stored, for `replace_tensors` to write into the shards, so
            that an interruption between two of them loses nothing; absent where nothing is gained.
    """
    report.stage("refine")
    targets = _stored_targets(source, tokens, report, work / f"{SCRATCH}targets.safetensors")
    resume_file = work / f"{SCRATCH}refining.safetensors"
    refined = refine(work, targets, None, report.step, LEARNED_RATE, resume_file)
    if refined.after >= refined.before:
        report.note("distilling scales and biases gained nothing: they stay as they were")
        return
    write_tensors(refined_file, refined.tensors)


def _stored_targets(
    source: Source, tokens: np.ndarray, report: Report, resume_file: Path
) -> Targets:
    """The source's predictions, from the file of an interrupted run or else written there."""
    stored = if_sound(resume_file, lambda file: _read_targets(file, tokens))
    if stored is not None:
        return stored
    check_space(resume_file.parent, 8 * TOP * tokens.size)
    targets = predict(source, tokens, report.step)
    write_arrays(resume_file, {"ids": targets.ids, "logp": targets.logp})
    return targets


def _read_targets(file: Path, tokens: np.ndarray) -> Targets:
    """The source's predictions of these tokens as `_stored_targets` wrote them.

    Raises:
        Damaged: they are something else.
    """
    arrays, _ = read_arrays(file)
    try:
        logp = schema.check_array(arrays["logp"], schema.FLOAT, (*tokens.shape, None), high=0.1)
        ids = schema.check_array(arrays["ids"], schema.INTEGER, logp.shape, 0, 2**31 - 1)
    except (KeyError, ValueError):
        raise Damaged(f"{file} is damaged") from None
    return Targets(tokens, ids, logp)


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
