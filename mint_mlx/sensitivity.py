"""How much a model's output minds an error in each layer: the Fisher information, from tokens that it wrote itself.

An error dW in a layer's weight changes the prediction by a Kullback-Leibler divergence of about

    KL = 1/2 E[(g . dW x)^2]        nats per token

(the second-order expansion; the first order vanishes), where x is the layer's input and g the gradient of the negative
log-likelihood at its output, with labels drawn from the model itself (Martens, "New insights and perspectives on the
natural gradient method", 2020). For rounding errors, which are nearly independent of each other, this is 1/2 the mean
squared error of a weight times the trace `sum over tokens of |g|^2 |x|^2`, kept here for every expert.

One pass forward and one back, a block in memory at a time; block inputs wait on disk between the two.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .errors import MintError
from .layers import Inventory
from .load import Source

SCHEMA = 1
Progress = Callable[[str, int, int], None]


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
        source, structure, content: the model that it belongs to.
        tokens: how many it was measured on.
        how: how these tokens were made (tokens.py).
        trace: float64 (experts,) by layer: the sum over tokens of |g|^2 |x|^2.
        weights: |g|^2 by layer and token, for error feedback.
    """

    source: str
    structure: str
    content: str
    tokens: int
    how: str
    trace: dict[str, np.ndarray]
    weights: dict[str, TokenWeights] = field(default_factory=dict)

    def per_weight(self, path: str) -> np.ndarray:
        """Expected KL in nats per token of a mean squared error of one in each weight of a layer, by expert."""
        return np.asarray(self.trace[path] / (2 * self.tokens))


def measure(
    source: Source,
    inventory: Inventory,
    tokens: np.ndarray,
    how: str,
    batch: int = 8,
    seed: int = 0,
    progress: Progress = lambda *_: None,
    streamed: bool | None = None,
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
        streamed: whether blocks are read one at a time; by default where the model is larger than memory.

    Raises:
        NoChain: the model is built in a way that can't be walked through (blocks.py).
    """
    import mlx.core as mx

    from .blocks import NoChain, Rows, from_logits, pull_back, run, to_embedding, walk
    from .runner import layer_names, load_block, load_runner, release_block

    runner = load_runner(source.path, streamed)
    runner.model.train()  # some families' fused kernels have no gradient
    known = {layer.path: layer.shape[0] if len(layer.shape) > 2 else 1 for layer in inventory.layers}
    trace = {path: np.zeros(parts) for path, parts in known.items()}
    gathered: dict[str, list[Rows]] = {}

    def visit(rows: Rows) -> None:
        assert rows.grad is not None
        squared = np.asarray(mx.sum(mx.square(rows.grad), axis=-1)).astype(np.float64)
        energy = squared * np.asarray(mx.sum(mx.square(rows.x), axis=-1)).astype(np.float64)
        part = np.zeros(len(energy), dtype=np.int64) if rows.part is None else rows.part
        trace[rows.path] += np.bincount(part, energy, minlength=len(trace[rows.path]))
        gathered.setdefault(rows.path, []).append(
            Rows(rows.path, mx.array(0), mx.array(squared.astype(np.float32)), rows.part, rows.token)
        )

    names = {key: path for key, path in layer_names(runner).items() if path in known}
    depth = len(runner.trunk[runner.blocks])
    with tempfile.TemporaryDirectory(prefix="mint-mlx-") as folder:
        inputs = Path(folder)
        steps, out = [], None
        blocks = walk(runner, tokens)
        step = next(blocks)
        while True:
            progress(f"block {step.index} forward", step.index, 2 * depth)
            load_block(runner, step.block)
            out = run(step, batch)
            release_block(runner, step.block)
            np.save(inputs / f"{step.index}.npy", _numpy(step.args[0]))
            dtype = step.args[0].dtype
            step.args = (None, *step.args[1:])
            steps.append(step)
            try:
                step = blocks.send(out)
            except StopIteration:
                break
        grad = from_logits(runner, tokens, out, batch, mx.random.key(seed), visit, names)
        if not gathered:
            raise NoChain("its head is no layer that can be followed")
        if runner.streamed:
            runner = load_runner(source.path, True)
            runner.model.train()
            names = {key: path for key, path in layer_names(runner).items() if path in known}
        for step in reversed(steps):
            progress(f"block {step.index} back", 2 * depth - step.index - 1, 2 * depth)
            step.block = runner.trunk[runner.blocks][step.index]
            step.args = (mx.array(np.load(inputs / f"{step.index}.npy")).astype(dtype), *step.args[1:])
            load_block(runner, step.block)
            names |= {key: path for key, path in layer_names(runner).items() if path in known}
            grad = pull_back(step, grad, batch, visit, names)
            release_block(runner, step.block)
        for path, squared in to_embedding(runner, tokens, steps[0], grad, batch, names):
            trace[path] += squared.sum()
    broken = next((path for path, cost in trace.items() if not np.isfinite(cost).all()), None)
    if broken is not None:
        raise MintError(f"{broken} has activations or gradients that overflow: give --effort fast")
    weights = {path: _by_token(rows, tokens.size) for path, rows in gathered.items()}
    return Sensitivity(source.name, source.structure, source.content, tokens.size, how, trace, weights)


def check_chain(source: Source) -> None:
    """Walk through the first blocks with a handful of tokens, before anything costs time.

    Raises:
        NoChain: the model is built in a way that can't be walked through.
    """
    from .blocks import NoChain, run, walk
    from .runner import load_block, load_runner, release_block

    try:
        runner = load_runner(source.path, True)
        blocks = walk(runner, np.zeros((2, 4), dtype=np.int32))
        step = next(blocks)
        for _ in range(2):
            load_block(runner, step.block)
            out = run(step, 2)
            release_block(runner, step.block)
            step = blocks.send(out)
    except StopIteration:  # a model of one or two blocks
        return
    except ValueError as error:  # no list of blocks, or one that is never called
        raise NoChain(str(error).splitlines()[0]) from error


def _numpy(array: object) -> np.ndarray:
    import mlx.core as mx

    assert isinstance(array, mx.array)
    return np.asarray(array.astype(mx.float32))


def _by_token(rows: list, count: int) -> TokenWeights:
    """The rows of all batches, ordered by token (and expert)."""
    token = np.concatenate([r.token for r in rows])
    weight = np.concatenate([np.asarray(r.grad) for r in rows])
    if rows[0].part is None or len(token) % count:
        sums = np.bincount(token, weight, minlength=count).astype(np.float32)
        return TokenWeights(sums[:, None], None)
    part = np.concatenate([r.part for r in rows])
    order = np.lexsort((part, token))
    slots = len(token) // count
    return TokenWeights(weight[order].reshape(count, slots), part[order].astype(np.int32).reshape(count, slots))


def save_sensitivity(tokens: np.ndarray, made: Sensitivity, path: Path) -> None:
    """Write tokens and sensitivity as one .npz, whole or not at all."""
    head = {
        "mint_mlx_sensitivity": SCHEMA,
        "source": made.source,
        "structure": made.structure,
        "content": made.content,
        "how": made.how,
        "layers": list(made.trace),
        "followed": list(made.weights),
    }
    arrays: dict[str, np.ndarray] = {"head": np.array(json.dumps(head)), "tokens": tokens}
    arrays |= {f"trace.{i}": trace for i, trace in enumerate(made.trace.values())}
    for i, weights in enumerate(made.weights.values()):
        arrays[f"weight.{i}"] = weights.weight
        if weights.part is not None:
            arrays[f"part.{i}"] = weights.part
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    partial.replace(path)


def load_sensitivity(path: Path) -> tuple[np.ndarray, Sensitivity]:
    """Read what `save_sensitivity` wrote.

    Raises:
        MintError: the file is missing, damaged, or of another version of this program.
    """
    if path.is_dir():
        raise MintError(f"{path} is a folder: give a file")
    wrong = MintError(
        f"{path} is not a sensitivity of this version: make one with `mint-mlx sensitivity MODEL -o {path}`"
    )
    if not path.is_file():
        raise MintError(f"there is no sensitivity {path}: make one with `mint-mlx sensitivity MODEL -o {path}`")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            head = json.loads(str(arrays["head"]))
            if head["mint_mlx_sensitivity"] != SCHEMA:
                raise wrong
            trace = {layer: arrays[f"trace.{i}"] for i, layer in enumerate(head["layers"])}
            weights = {
                layer: TokenWeights(arrays[f"weight.{i}"], arrays.get(f"part.{i}"))
                for i, layer in enumerate(head["followed"])
            }
            tokens = arrays["tokens"]
            facts = head["source"], head["structure"], head["content"], int(tokens.size), head["how"]
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        raise wrong from None
    return tokens, Sensitivity(*facts, trace, weights)
