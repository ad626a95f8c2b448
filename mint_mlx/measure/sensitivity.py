"""How much a model's output minds an error in each layer: the Fisher information, from tokens that
it wrote itself.

An error dW in a layer's weight changes the prediction by a Kullback-Leibler divergence of about

    KL = 1/2 E[(g . dW x)^2]        nats per token

(the second-order expansion; the first order vanishes), where x is the layer's input and g the
gradient of the negative log-likelihood at its output, with labels drawn from the model itself
(Martens, "New insights and perspectives on the natural gradient method", 2020). For rounding
errors, which are nearly independent of each other, this is 1/2 the mean squared error of a weight
times the trace `sum over tokens of |g|^2 |x|^2`, kept here for every expert.

One pass forward and one back, a block in memory at a time; block inputs wait on disk between the
two."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import MintError
from ..base.report import Progress
from ..base.targets import check_space
from ..base.versions import stamp
from ..checkpoint.layers import Inventory
from ..checkpoint.origin import Origin
from ..checkpoint.source import Source
from . import pass_state
from .moments import WIDE, SampledMoments, remaining
from .pass_state import Found, Part

if TYPE_CHECKING:
    from ..runtime.taps import Rows

SCHEMA = 3
FULL = 1024  # the hidden size up to which a block's whole metric is kept


@dataclass(frozen=True)
class TokenWeights:
    """|g|^2 at one layer's output for each token.

    Attributes:
        weight: float32 (tokens, slots): one slot, or k for routed experts.
        part: int32 (tokens, slots), the expert of each slot; None for other layers.
    """

    weight: np.ndarray
    part: np.ndarray | None


@dataclass(frozen=True)
class Sensitivity:
    """Fisher information of a model.

    Attributes:
        origin: the weights that it belongs to.
        tokens: int32 (windows, tokens), the model's own text that it was measured on.
        how: how these tokens were made (tokens.py).
        trace: float64 (experts,) by layer: the sum over tokens of |g|^2 |x|^2.
        weights: |g|^2 by layer and token, for error feedback.
        metric: by block, E[g g^T] with g the gradient at the block's output: float32 (hidden,
            hidden), its diagonal where that would be large.
        embedding: float32 (hidden, hidden), what the model minds of an error in a row of the
            embedding: the sum over tokens of g g^T at its output and, where it is the head as well,
                of |g|^2 x x^T.
        left: by layer, the share of its errors' cost that error feedback leaves (ldl.py); absent
            where all of it is.
    """

    origin: Origin
    tokens: np.ndarray
    how: str
    trace: dict[str, np.ndarray]
    weights: dict[str, TokenWeights] = field(default_factory=dict)
    metric: dict[int, np.ndarray] = field(default_factory=dict)
    embedding: np.ndarray | None = None
    left: dict[str, float] = field(default_factory=dict)

    def per_weight(self, path: str) -> np.ndarray:
        """Expected KL in nats per token of a mean squared error of one in each weight of a layer,
        by expert.
        """
        return np.asarray(self.trace[path] / (2 * self.tokens.size))


def measure(
    source: Source,
    inventory: Inventory,
    tokens: np.ndarray,
    how: str,
    batch: int = 8,
    seed: int = 0,
    progress: Progress = lambda *_: None,
    streamed: bool | None = None,
    key: str | None = None,
) -> Sensitivity:
    """Measure every layer on windows of tokens.

    Args:
        source: a checkpoint whose weights are here.
        inventory: its layers.
        tokens: int (windows, tokens).
        how: what to say of where they come from.
        batch: windows at once.
        seed: for the labels.
        progress: called with (what, done, total).
        streamed: whether blocks are read one at a time; by default where the model is larger than
            memory.
        key: a name for this model; an interrupted walk goes on in the next run of the same key and
            tokens (walked.py).

    Raises:
        NoChain: the model is built in a way that can't be walked through (blocks.py).
    """
    import mlx.core as mx

    from ..runtime.blocks import (
        NoChain,
        Step,
        forward_blocks,
        from_logits,
        names_of,
        pull_back,
        to_embedding,
    )
    from ..runtime.runner import load_block, load_runner, release_block

    runner = load_runner(source.path, streamed)
    runner.model.train()  # some families' fused kernels have no gradient
    known = {
        layer.path: layer.shape[0] if len(layer.shape) > 2 else 1 for layer in inventory.layers
    }
    embeddings = {layer.path for layer in inventory.layers if layer.role == "embedding"}
    plain = {
        layer.path for layer in inventory.layers if layer.kind == "multi-linear"
    }  # rounded to nearest: trace only

    def names() -> dict[int, str]:
        return names_of(runner, known)

    depth = len(runner.trunk[runner.blocks])
    digest = hashlib.blake2b(f"{SCHEMA} {stamp()}".encode() + tokens.tobytes(), digest_size=8)
    with pass_state.spilled(key and f"{key}-{digest.hexdigest()}", (NoChain, MintError)) as folder:
        steps = []
        for step, out, _ in forward_blocks(
            runner, tokens, batch, known=lambda i: pass_state.hidden(folder, i + 1)
        ):
            progress(f"block {step.index} forward", step.index, 2 * depth)
            if step.index == 0:
                spill = pass_state.needed(depth, out.size, out.itemsize) - pass_state.spent(folder)
                check_space(folder, spill, "give --work-dir another folder")
            for index, array in ((step.index, step.args[0]), (step.index + 1, out)):
                if not pass_state.has_hidden(folder, index):
                    pass_state.keep_hidden(folder, index, array)
            last = out
            steps.append(Step(step.index, step.block, (None, *step.args[1:]), step.kwargs))
        parts, back = pass_state.parts(folder, depth)
        if back is None:
            made = parts[depth] = Part()
            with _visitor(made, known, embeddings, plain) as visit:
                grad = from_logits(runner, tokens, last, batch, mx.random.key(seed), visit, names())
            if not made.rows:
                raise NoChain("its head is no layer that can be followed")
            pass_state.keep_part(folder, depth, made, grad)
        else:
            grad = back
        if runner.streamed:
            runner = load_runner(source.path, True)
            runner.model.train()
        for step in reversed(steps):
            progress(f"block {step.index} back", 2 * depth - step.index - 1, 2 * depth)
            step.block = runner.trunk[runner.blocks][step.index]
            if step.index in parts:
                continue
            kept = pass_state.hidden(folder, step.index)
            assert kept is not None
            step.args = (kept, *step.args[1:])
            load_block(runner, step.block)
            made = parts[step.index] = Part(metric=_compact(_metric(grad)))
            with _visitor(made, known, embeddings, plain) as visit:
                grad = pull_back(step, grad, batch, visit, names())
            pass_state.keep_part(folder, step.index, made, grad)
            release_block(runner, step.block)
        made = parts[-1] = Part()
        for path, rows in to_embedding(runner, tokens, steps[0], grad, batch, names()):
            seen = np.asarray(rows)
            cost = made.trace.setdefault(path, np.zeros(known[path]))
            cost += float(np.sum(np.square(seen), dtype=np.float64))
            if seen.shape[-1] <= WIDE:
                made.embedding = _added(made.embedding, seen)
    return _put_together(source, known, embeddings, parts, tokens, how)


@contextmanager
def _visitor(
    made: Part, known: dict[str, int], embeddings: set[str], plain: set[str]
) -> Iterator[Callable[[Rows], None]]:
    """Adds what layers read and their gradients to a part.

    Args:
        made: the part.
        known: the number of experts by layer.
        embeddings: names of those.
        plain: names of layers of which the cost alone is kept.
    """
    import mlx.core as mx

    moments: dict[str, SampledMoments] = {}

    def visit(rows: Rows) -> None:
        assert rows.grad is not None
        squared = np.asarray(mx.sum(mx.square(rows.grad), axis=-1)).astype(np.float64)
        energy = squared * np.asarray(mx.sum(mx.square(rows.x), axis=-1)).astype(np.float64)
        part = np.zeros(len(energy), dtype=np.int64) if rows.part is None else rows.part
        cost = made.trace.setdefault(rows.path, np.zeros(known[rows.path]))
        cost += np.bincount(part, energy, minlength=len(cost))
        if rows.path in plain:
            return
        x, roots = np.asarray(rows.x), np.sqrt(squared).astype(np.float32)
        if rows.path not in embeddings:
            moments.setdefault(rows.path, SampledMoments()).add(
                x, roots, rows.part, known[rows.path]
            )
        elif x.shape[-1] <= WIDE:
            made.embedding = _added(made.embedding, x * roots[:, None])
        expert = None if rows.part is None else rows.part.astype(np.int32)
        found = Found(squared.astype(np.float32), expert, rows.token.astype(np.int32))
        made.rows.setdefault(rows.path, []).append(found)

    yield visit
    made.left = {path: found.remaining() for path, found in moments.items()}


def _added(moment: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    """A second moment with these rows in it."""
    more: np.ndarray = rows.T @ rows
    return more if moment is None else moment + more


def _put_together(
    source: Source,
    known: dict[str, int],
    embeddings: set[str],
    parts: dict[int, Part],
    tokens: np.ndarray,
    how: str,
) -> Sensitivity:
    """What all blocks added, the last first. `known` has the number of experts, `embeddings` names
    those.

    Raises:
        MintError: naming a layer whose cost overflows.
    """
    trace = {path: np.zeros(experts) for path, experts in known.items()}
    rows: dict[str, list[Found]] = {}
    for part in parts.values():
        for path, cost in part.trace.items():
            trace[path] += cost
        for path, found in part.rows.items():
            rows.setdefault(path, []).extend(found)
    broken = next((path for path, cost in trace.items() if not np.isfinite(cost).all()), None)
    if broken is not None:
        raise MintError(
            f"activations or gradients are not finite (at {broken}, among others): they overflow, "
            "or a weight is damaged, which `mint-mlx profile` would name; `convert --effort fast` "
            "runs no model"
        )
    weights = {path: _by_token(found, tokens.size) for path, found in rows.items()}
    metric = {index: part.metric for index, part in parts.items() if part.metric is not None}
    moments = [part.embedding for part in parts.values() if part.embedding is not None]
    kept = _compact(sum(moments[1:], moments[0])) if moments else None
    left = {path: share for part in parts.values() for path, share in part.left.items()}
    if kept is not None:
        left |= dict.fromkeys(embeddings, remaining([kept]))
    return Sensitivity(
        source.origin,
        tokens,
        how,
        trace,
        weights,
        metric,
        kept,
        left,
    )


def check_chain(source: Source, inventory: Inventory) -> None:
    """Walk through the first blocks and the head with a handful of tokens, forward and back, before
    it costs time.

    Raises:
        NoChain: the model is built in a way that can't be walked through, or mlx-lm can't run it
            here.
    """
    import mlx.core as mx

    from ..runtime.blocks import (
        NoChain,
        forward_blocks,
        from_logits,
        names_of,
        pull_back,
        to_embedding,
    )
    from ..runtime.runner import load_runner

    tokens, known = np.zeros((2, 4), dtype=np.int32), {layer.path for layer in inventory.layers}
    try:
        runner = load_runner(source.path, True)
        runner.model.train()
        steps = []
        for step, out, _ in islice(forward_blocks(runner, tokens, 2), 3):
            grad = pull_back(step, mx.zeros(out.shape), 2, lambda _: None, names_of(runner, known))
            steps.append(step)
        seen: list[Rows] = []
        from_logits(runner, tokens, out, 2, mx.random.key(0), seen.append, names_of(runner, known))
        if not seen:
            raise NoChain("its head is no layer that can be followed")
        for _ in to_embedding(
            runner, tokens, steps[0], mx.zeros(grad.shape), 2, names_of(runner, known)
        ):
            pass
    # No list of blocks, one that is never called or twice, a kernel that isn't here, a cache that
    # no block has filled.
    except (ValueError, RuntimeError, AttributeError, TypeError, LookupError) as error:
        raise NoChain(str(error).splitlines()[0]) from error


def _metric(grad: object) -> np.ndarray:
    """E[g g^T] over tokens, float32 (hidden, hidden), or its diagonal."""
    rows = _numpy(grad)
    rows = rows.reshape(-1, rows.shape[-1])
    if rows.shape[-1] > FULL:
        return np.asarray(np.square(rows).mean(axis=0))
    return np.asarray(rows.T @ rows / len(rows))


def _compact(matrix: np.ndarray) -> np.ndarray:
    """Rounded so that it is kept exactly in 16 bits."""
    half, scale = halved(matrix)
    return half.astype(np.float32) * scale


def halved(matrix: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """As float16, and the power of two that it was divided by."""
    most = float(np.abs(matrix).max())
    scale = np.float32(2.0 ** np.ceil(np.log2(most))) if 0 < most < np.inf else np.float32(1)
    return (matrix / scale).astype(np.float16), scale


def _numpy(array: object) -> np.ndarray:
    import mlx.core as mx

    assert isinstance(array, mx.array)
    return np.asarray(array.astype(mx.float32))


def _by_token(rows: list[Found], count: int) -> TokenWeights:
    """The rows of all batches, ordered by token (and expert)."""
    token = np.concatenate([r.token for r in rows])
    weight = np.concatenate([r.weight for r in rows])
    experts = [r.part for r in rows if r.part is not None]
    if not experts or len(token) % count:
        sums = np.bincount(token, weight, minlength=count).astype(np.float32)
        return TokenWeights(_compact(sums[:, None]), None)
    part = np.concatenate(experts)
    order = np.lexsort((part, token))
    slots = len(token) // count
    return TokenWeights(
        _compact(weight[order].reshape(count, slots)),
        part[order].astype(np.int32).reshape(count, slots),
    )
