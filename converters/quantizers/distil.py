"""Scales and biases of a finished checkpoint, distilled end to end on text that the source wrote
itself.

The source's predictions are computed once, streamed where it is larger than memory; after that only
the quantized model is needed. What is learned is the divergence of the checkpoint's predictions
from them (distillation: Hinton, Vinyals and Dean, 2015; of scales and biases as mlx-lm's DWQ does),
by Adam on relative offsets of every affine layer's scales and biases. Codes, shapes and bytes stay;
norms and everything unquantized as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

from ...base.errors import MintError
from ...base.files import write_arrays, write_tensors
from ...base.quant_config import QuantConfig
from ...base.report import Progress, Report
from ...base.safetensors_header import read_folder
from ...base.targets import check_space
from ...checkpoint import mlxlm
from ...checkpoint.layers import Inventory
from ...checkpoint.source import Source
from ...runtime.cpu_ops import on_cpu
from ...runtime.divergence import log_softmax, mean_merged_kl
from ...runtime.fast_math import fast_math
from ...runtime.memory import fits_here, workspace
from ...runtime.runner import LOGITS, forward, load_runner, logits_of, trunk_output
from .learn_block import batches, hold_out, moved
from .protocol import SCRATCH

TOP = 1024  # of the source's most likely tokens kept for each position
STEPS = 200
RATE = 1e-3  # of their size, Adam's first rate for scales and biases
LEARNED_RATE = 3e-4  # the same where they were learned block by block before
TOKENS = 1024  # a step
CHECKS = 6  # looks at the held-out windows
NO_ROOM = (
    "there is too little memory here to distil scales and biases end to end: they stay as learned"
)
Params = dict[str, dict[str, mx.array]]


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
    """Scales and biases that were learned, in the types that they are stored in, with the
    divergence on held-out text.

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
        source: a checkpoint whose weights are here.
        tokens: int (windows, tokens).
        progress: called with (what, windows done, windows in all).
    """
    runner = load_runner(source.path)
    count, length = tokens.shape
    shape, width = None, TOP
    for piece in forward(runner, tokens, max(1, 2048 // length)):
        progress("source", piece.rows.start, count)
        width = min(TOP, piece.logits.shape[-1])
        if shape is None:
            shape = (count, length, width)
            ids, logp = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float32)
        found = log_softmax(piece.logits)
        best = mx.argpartition(-found, width - 1, axis=-1)[..., :width]
        ids[piece.rows, piece.columns] = np.array(best).astype(np.int32)
        logp[piece.rows, piece.columns] = np.array(mx.take_along_axis(found, best, axis=-1))
        mx.clear_cache()
    return Targets(tokens, ids, logp)


class _Student:
    """A checkpoint whose scales and biases can move. On a CPU its layers are dense and made anew
    from their codes.
    """

    def __init__(self, folder: Path) -> None:
        self.runner = load_runner(folder, False)
        self.runner.model.train()
        self.modules: dict[str, Any] = dict(self.runner.model.named_modules())
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
            kind = self.stored[path]["scales"].dtype
            scales, biases = moved(
                self.start[path]["scales"], self.start[path]["biases"], offsets, kind
            )
            out[path] = {"scales": scales, "biases": biases}
        return out

    def logits(self, params: Params, tokens: mx.array) -> mx.array:
        """The checkpoint's predictions with these offsets, float32."""
        for path, new in self.moved(params).items():
            stored, module = self.stored[path], self.modules[path]
            if on_cpu():
                module.weight = mx.dequantize(
                    stored.weight, new["scales"], new["biases"], stored.group_size, stored.bits
                )
            else:
                module.scales, module.biases = (
                    new[n].astype(stored[n].dtype) for n in ("scales", "biases")
                )
        with fast_math(self.runner.model):
            return logits_of(self.runner, tokens, trunk_output(self.runner, tokens))


def refine(
    folder: Path,
    targets: Targets,
    steps: int | None = None,
    progress: Progress = lambda *_: None,
    rate: float | None = None,
    place: Path | None = None,
) -> Refined:
    """Distil a checkpoint's scales and biases; the best on the last eighth of the windows is
    returned.

    Args:
        folder: any MLX checkpoint of the same vocabulary that fits in memory.
        targets: the source's predictions.
        steps: of Adam.
        progress: called with (what, done, total).
        rate: Adam's first, of the size of scales and biases; RATE by default.
        place: a file, .safetensors, where it is kept at each look at the held-out windows how far
            this is; the same call goes on from there.

    Raises:
        MintError: it holds no affine layer, or the model has an operation without a gradient.
    """
    steps, rate = steps or STEPS, RATE if rate is None else rate
    student = _Student(folder)
    student.check_names(folder)
    train, valid = hold_out(len(targets.tokens))
    length = targets.tokens.shape[1]
    params: Params = {
        path: {name: mx.zeros_like(array) for name, array in start.items()}
        for path, start in student.start.items()
    }
    vocabulary = int(student.logits(params, mx.array(targets.tokens[:1, :1])).shape[-1])
    size = max(1, min(TOKENS // length, 2 * LOGITS // (length * vocabulary), len(train)))

    def loss(params: Params, rows: np.ndarray) -> mx.array:
        tokens, ids, logp = (mx.array(a[rows]) for a in (targets.tokens, targets.ids, targets.logp))
        return mean_merged_kl(student.logits(params, tokens), ids, logp)

    def total(params: Params) -> float:
        parts = [valid[i : i + size] for i in range(0, len(valid), size)]
        return sum(float(loss(params, rows)) * len(rows) for rows in parts) / len(valid)

    optimizer = optim.Adam(
        learning_rate=optim.linear_schedule(rate, 0.0, steps), bias_correction=True
    )
    slope = mx.value_and_grad(loss)
    if place is not None and place.is_file():
        done, before, lowest, params, best = _go_on(place, optimizer, params)
    else:
        done, before, best = 0, total(params), params
        lowest = before
    for step, rows in islice(enumerate(batches(train, size, steps)), done, None):
        progress("distil", step, steps)
        try:
            _, grads = slope(params, rows)
        except ValueError as error:
            sentence = (
                f"{folder.name} can't be refined: one of its operations has no gradient in MLX"
            )
            raise MintError(f"{sentence} ({str(error).splitlines()[0]})") from error
        params = optimizer.apply_gradients(grads, params)
        mx.eval(params, optimizer.state)
        if (step + 1) % max(1, steps // CHECKS) == 0:
            if (now := total(params)) < lowest:
                lowest, best = now, params
            if place is not None:
                _note(place, optimizer, (step + 1, before, lowest), params, best)
    kinds = {path: module["scales"].dtype for path, module in student.stored.items()}
    found = {
        path: {n: a.astype(kinds[path]) for n, a in new.items()}
        for path, new in student.moved(best).items()
    }
    return Refined(dict(tree_flatten(found)), before, lowest)


def _note(
    place: Path, optimizer: optim.Adam, figures: tuple[float, ...], params: Params, best: Params
) -> None:
    """Keep how far distilling is: (steps, divergence before, lowest), and all that Adam goes on
    with.
    """
    kept = {"figures": np.array(figures)}
    for path, offsets in params.items():
        for name, array in offsets.items():
            state = optimizer.state[path][name]
            kept |= {
                f"{what}.{path}.{name}": np.array(a) for what, a in {"at": array, **state}.items()
            }
            kept[f"best.{path}.{name}"] = np.array(best[path][name])
    write_arrays(place, kept)


def _go_on(
    place: Path, optimizer: optim.Adam, params: Params
) -> tuple[int, float, float, Params, Params]:
    """Steps done, divergence before, lowest, parameters and the best of them (see `_note`)."""
    kept = load_file(place)
    done, before, lowest = kept["figures"].tolist()
    optimizer.init(params)
    optimizer.state["step"] = mx.array(int(done), dtype=optimizer.state["step"].dtype)

    def read(what: str) -> Params:
        return {
            path: {name: mx.array(kept[f"{what}.{path}.{name}"]) for name in offsets}
            for path, offsets in params.items()
        }

    for what in ("m", "v"):
        for path, offsets in read(what).items():
            for name, array in offsets.items():
                optimizer.state[path][name][what] = array
    return int(done), before, lowest, read("at"), read("best")


def refine_own(
    source: Source,
    tokens: np.ndarray,
    folder: Path,
    progress: Progress = lambda *_: None,
    steps: int | None = None,
    rate: float | None = None,
) -> Refined | None:
    """Refine on the source's own tokens; None where nothing was gained."""
    found = refine(folder, predict(source, tokens, progress), steps, progress, rate)
    return found if found.after < found.before else None


def refine_written(
    source: Source, tokens: np.ndarray, report: Report, work: Path, learned: Path
) -> None:
    """Refine what was learned block by block and written, before it gets its name
    (converters/checkpoint.py).

    Args:
        source: what it was made from.
        tokens: int (windows, tokens), the source's own.
        report: receives progress.
        work: the folder.
        learned: where the result is kept, for `replace_tensors` to write into the shards, so
            that an interruption between two of them loses nothing; absent where nothing was gained.
    """
    if learned.is_file():
        return
    report.stage("refine")
    targets = _kept_targets(source, tokens, report, work / f"{SCRATCH}targets.safetensors")
    place = work / f"{SCRATCH}refining.safetensors"
    found = refine(work, targets, None, report.step, LEARNED_RATE, place)
    if found.after >= found.before:
        report.note("distilling scales and biases gained nothing: they stay as they were")
        return
    write_tensors(learned, found.tensors)


def _kept_targets(source: Source, tokens: np.ndarray, report: Report, place: Path) -> Targets:
    """The source's predictions, from a file that an interrupted run left or else made and kept
    there.
    """
    if not place.is_file():
        check_space(place.parent, 8 * TOP * tokens.size)
        made = predict(source, tokens, report.step)
        write_arrays(place, {"ids": made.ids, "logp": made.logp})
        return made
    return Targets(tokens, **load_file(place))


def can_refine(inventory: Inventory, choice: Mapping[str, QuantConfig]) -> bool:
    """Whether a checkpoint of these configurations can be refined in the memory of this machine,
    roughly.
    """
    return fits_here(refining(inventory, choice))


def refining(inventory: Inventory, choice: Mapping[str, QuantConfig]) -> int:
    """Bytes that refining holds, roughly.

    Dense weights with gradients on a CPU, else the weights as stored and fourteen floats a group;
    and of one step's tokens what the blocks' layers return, many times where numpy's exponential
    keeps it all, and five arrays of logits (measured on the three reference models: 0.7 to 0.9
    times as much is held)."""
    cpu = on_cpu()
    total = 0
    for layer in inventory.layers:
        config = choice[layer.path]
        if cpu:
            total += (12 if config.quantized else 4) * layer.size
        else:
            total += layer.bytes(config) + (
                56 * layer.size // config.group_size if config.quantized else 0
            )
    ends = [layer.shape[-2] for layer in inventory.layers if layer.role in ("embedding", "head")]
    vocabulary = max(ends, default=1)
    tokens = min(TOKENS, max(1, 2 * LOGITS // vocabulary))
    arrays = (
        (24 if cpu else 4) * inventory.blocks * workspace(inventory, tokens)
    )  # of 16 bits, float32 on a CPU
    return total + arrays + 5 * 4 * tokens * vocabulary
