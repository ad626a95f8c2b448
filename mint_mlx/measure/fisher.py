"""Measures the sensitivity of every layer: the Fisher information on the model's own tokens.

An error dW in a layer's weight changes the prediction by a Kullback-Leibler divergence of about

    KL = 1/2 E[(g . dW x)^2]        nats per token

(the second-order expansion; the first order vanishes), where x is the layer's input and g the
gradient of the negative log-likelihood at its output, with labels drawn from the model itself
(Martens, "New insights and perspectives on the natural gradient method", 2020). For rounding
errors, which are nearly independent of each other, this is 1/2 the mean squared error of a weight
times the trace `sum over tokens of |g|^2 |x|^2`, kept for every expert.

It takes one pass forward and one back, a block in memory at a time; the blocks' hidden states wait
on disk between the two, from where an interrupted pass is resumed (pass_state.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..base.errors import MintError, is_passing
from ..base.report import Progress
from ..base.targets import check_space
from ..base.versions import stamp
from ..checkpoint.layers import Inventory
from ..checkpoint.source import Source
from ..runtime.blocks import (
    NoChain,
    Step,
    backward_blocks,
    forward_blocks,
    names_of,
    pull_back,
)
from ..runtime.gradients import from_logits, to_embedding
from ..runtime.runner import Runner, load_runner
from ..runtime.taps import Activations
from . import pass_state
from .accumulator import Accumulator, Layers, followed_layers
from .moments import gram, remaining
from .pass_state import Contribution, RowWeights
from .sensitivity import SCHEMA, Sensitivity, TokenWeights, compacted
from .text import Text

WHOLE_METRIC = 1024  # the hidden size up to which a block's whole metric is kept
SEED = 0  # of the labels
NO_HEAD = "its head is no layer that can be followed"


def measure(
    source: Source,
    inventory: Inventory,
    text: Text,
    batch: int = 8,
    progress: Progress = lambda *_: None,
    streamed: bool | None = None,
    key: str | None = None,
) -> Sensitivity:
    """Measure every layer on windows of tokens.

    Args:
        source: a checkpoint whose weights are on this machine.
        inventory: its layers.
        text: the model's own.
        batch: windows at once.
        progress: called with (what, done, total).
        streamed: whether blocks are read one at a time; by default where the model is larger than
            memory.
        key: a name for this model; an interrupted pass is resumed by the next run of the same key
            and tokens (pass_state.py).

    Raises:
        NoChain: the model is built in a way that can't be run block by block (blocks.py).
        MintError: activations overflow, or the hidden states don't fit on the disk.
    """
    layers = followed_layers(inventory)
    what = f"{SCHEMA} {stamp()} {source.identity}".encode()
    what += text.tokens.tobytes() + text.given.tobytes()
    digest = hashlib.blake2b(what, digest_size=8)
    key = key and f"{key}-{digest.hexdigest()}"
    with pass_state.pass_folder(key, refused=(NoChain, MintError)) as folder:
        runner = _load(source.path, streamed, source.dtype)
        steps, last = forward(runner, text.tokens, batch, folder, progress)
        contributions = backward(runner, steps, last, text, batch, layers, folder, progress)
    return assemble(source, layers, contributions, text)


def forward(
    runner: Runner, tokens: np.ndarray, batch: int, folder: Path, progress: Progress
) -> tuple[list[Step], mx.array]:
    """Run all blocks, and write what each reads and the last returns into a folder.

    Args:
        runner: the loaded model.
        tokens: int (windows, tokens).
        batch: windows at once.
        folder: of the pass; blocks whose output lies there aren't run again.
        progress: called with (what, done, total).

    Returns:
        The blocks with their arguments, but for the hidden states; and the last block's output.

    Raises:
        MintError: the hidden states don't fit on the disk, or aren't finite.
    """
    depth = len(runner.blocks)
    steps = []
    # Deletes a damaged one, which only the way back would meet.
    pass_state.read_hidden(folder, 0, tokens.shape)
    for step, out, _ in forward_blocks(
        runner, tokens, batch, known=lambda i: pass_state.read_hidden(folder, i + 1, tokens.shape)
    ):
        progress(f"block {step.index} forward", step.index, 2 * depth)
        if not mx.isfinite(out).all():
            raise _not_finite(f"block {step.index}")

        # All hidden states are as large as the first: a full disk is known before the work.
        if step.index == 0:
            missing = pass_state.bytes_needed(depth, out.size, out.itemsize)
            missing -= pass_state.bytes_written(folder)
            check_space(folder, missing, "give --work-dir another folder")

        for index, hidden in ((step.index, step.args[0]), (step.index + 1, out)):
            if not pass_state.has_hidden(folder, index):
                pass_state.write_hidden(folder, index, hidden)
        steps.append(step.with_input(None))
    return steps, out


def backward(
    runner: Runner,
    steps: list[Step],
    last: mx.array,
    text: Text,
    batch: int,
    layers: Layers,
    folder: Path,
    progress: Progress,
) -> dict[int, Contribution]:
    """Go back from the model's own predictions to its embedding, through all blocks.

    Args:
        runner: the loaded model, whose blocks were dropped if it is streamed.
        steps, last: of `forward`.
        text: the model's own.
        batch: windows at once.
        layers: which ones are followed.
        folder: of the pass, with the hidden states; what lies there of the way back is not done
            again.
        progress: called with (what, done, total).

    Returns:
        What each block adds, the last first; with the number of blocks as index what comes after
        them, with -1 the embedding.

    Raises:
        NoChain: the head is no layer that can be followed, or an operation has no gradient.
    """
    depth, tokens = len(steps), text.tokens
    accumulator = Accumulator(layers)

    # The head: from predictions to the last block's output.
    contributions, grad = pass_state.read_contributions(folder, depth, tokens.shape, layers.experts)
    if grad is None:
        names = names_of(runner, layers.experts)
        grad = from_logits(runner, tokens, text.counted, last, batch, SEED, accumulator.add, names)
        contributions[depth] = accumulator.finish()
        if not contributions[depth].rows:
            raise NoChain(NO_HEAD)
        pass_state.write_contribution(folder, depth, contributions[depth], grad)

    # Blocks that were dropped can be read again only from a model that is opened anew.
    if runner.streamed:
        runner = _load(runner.folder, True, "bfloat16" if runner.instead_of_half else None)

    def unfinished() -> Iterator[Step]:
        for step in reversed(steps):
            progress(f"block {step.index} back", 2 * depth - step.index - 1, 2 * depth)
            if step.index not in contributions:
                hidden = pass_state.read_hidden(folder, step.index, tokens.shape)
                if hidden is None:
                    raise MintError(
                        f"what block {step.index} reads has vanished from {folder}, or is damaged: "
                        "run the same command again, with TMPDIR in a place that nothing clears"
                    )
                yield replace(step.with_input(hidden), block=runner.blocks[step.index])

    for step, above, below in backward_blocks(
        runner, unfinished(), grad, batch, accumulator.add, layers.experts
    ):
        contribution = accumulator.finish(metric=compacted(_metric(above)))
        pass_state.write_contribution(folder, step.index, contribution, below)
        contributions[step.index] = contribution
        grad = below

    # The embedding: from the first block's input to the rows of the table.
    names = names_of(runner, layers.experts)
    for path, rows in to_embedding(runner, tokens, runner.blocks[0], grad, batch, names):
        accumulator.add_embedding(path, np.asarray(rows))
    contributions[-1] = accumulator.finish()
    return contributions


def assemble(
    source: Source,
    layers: Layers,
    contributions: dict[int, Contribution],
    text: Text,
) -> Sensitivity:
    """The sensitivity that all blocks add up to.

    Args:
        source: the model.
        layers: which ones were followed.
        contributions: of `backward`, the last block's first.
        text: the model's own.

    Raises:
        MintError: the trace of a layer overflows; it is named.
    """
    trace = {path: np.zeros(experts) for path, experts in layers.experts.items()}
    rows: dict[str, list[RowWeights]] = {}
    remaining_shares: dict[str, float] = {}
    for contribution in contributions.values():
        for path, cost in contribution.trace.items():
            trace[path] += cost
        for path, batches in contribution.rows.items():
            rows.setdefault(path, []).extend(batches)
        remaining_shares |= contribution.remaining
    _check_finite(trace)

    metric = {
        index: contribution.metric
        for index, contribution in contributions.items()
        if contribution.metric is not None
    }

    # A tied embedding is visited twice: as the head and as the embedding.
    moments = [c.embedding for c in contributions.values() if c.embedding is not None]
    embedding = compacted(sum(moments[1:], moments[0])) if moments else None
    if embedding is not None:
        remaining_shares |= dict.fromkeys(layers.embeddings, remaining([embedding]))

    return Sensitivity(
        origin=source.origin,
        text=text,
        trace=trace,
        weights={path: _by_token(batches, text.tokens.size) for path, batches in rows.items()},
        metric=metric,
        embedding=embedding,
        remaining=remaining_shares,
    )


def check_chain(source: Source, inventory: Inventory) -> None:
    """Run the first blocks and the head on a handful of tokens, forward and back.

    It finds out in seconds what `measure` would find out after hours.

    Raises:
        NoChain: the model is built in a way that can't be run block by block, or mlx-lm can't run
            it on this machine.
    """
    tokens = np.zeros((2, 4), dtype=np.int32)
    paths = {layer.path for layer in inventory.layers}
    seen: list[Activations] = []
    try:
        runner = _load(source.path, True, source.dtype)
        for step, out, _ in islice(forward_blocks(runner, tokens, 2), 3):
            names = names_of(runner, paths)
            grad = pull_back(step, mx.zeros(out.shape), 2, lambda _: None, names)

        names = names_of(runner, paths)
        from_logits(runner, tokens, tokens == 0, out, 2, SEED, seen.append, names)
        if not seen:
            raise NoChain(NO_HEAD)
        first_block = runner.blocks[0]
        for _ in to_embedding(runner, tokens, first_block, mx.zeros(grad.shape), 2, names):
            pass
    # No list of blocks, one that is never called or twice, a kernel that isn't on this machine, a
    # cache that no block has filled.
    except (ValueError, RuntimeError, AttributeError, TypeError, LookupError) as error:
        if is_passing(error):
            raise
        raise NoChain(str(error).splitlines()[0]) from error


def _load(folder: Path, streamed: bool | None, dtype: str | None) -> Runner:
    """A model in training mode: some families' fused kernels have no gradient."""
    runner = load_runner(folder, streamed, dtype)
    runner.model.train()
    return runner


def _check_finite(trace: dict[str, np.ndarray]) -> None:
    """Refuse a trace that overflows (a MintError)."""
    broken = next((path for path, cost in trace.items() if not np.isfinite(cost).all()), None)
    if broken is not None:
        raise _not_finite(broken)


def _not_finite(place: str) -> MintError:
    return MintError(
        f"activations or gradients are not finite (at {place}, among others): they overflow, or a "
        "number in the weights or in config.json is damaged; `mint-mlx profile` names weights that "
        "are no numbers, and `convert --effort fast` runs no model"
    )


def _metric(grad: mx.array) -> np.ndarray:
    """E[g g^T] over tokens, float32 (hidden, hidden), or its diagonal."""
    rows = np.asarray(grad.astype(mx.float32))
    rows = rows.reshape(-1, rows.shape[-1])
    if rows.shape[-1] > WHOLE_METRIC:
        return np.asarray(np.square(rows).mean(axis=0))
    return gram(rows) / np.float32(len(rows))


def _by_token(batches: list[RowWeights], count: int) -> TokenWeights:
    """The rows of all batches, ordered by token (and expert); `count` is the number of tokens."""
    token = np.concatenate([rows.token for rows in batches])
    weight = np.concatenate([rows.weight for rows in batches])
    experts = [rows.expert for rows in batches if rows.expert is not None]

    # Without experts, or where tokens go to unequal numbers of them: one weight a token.
    if not experts or len(token) % count:
        sums = np.bincount(token, weight, minlength=count).astype(np.float32)
        return TokenWeights(compacted(sums[:, None]), None)

    expert = np.concatenate(experts)
    order = np.lexsort((expert, token))
    slots = len(token) // count
    return TokenWeights(
        compacted(weight[order].reshape(count, slots)),
        expert[order].astype(np.int32).reshape(count, slots),
    )
