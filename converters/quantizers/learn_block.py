"""Learns a block's rounding, scales and biases together, so that its output stays the source's.

AutoRound's idea (Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent", 2023) on the
model's own text. Each weight has a latent code, a real number whose nearest integer is the code;
the gradient passes the rounding as if it weren't there (the straight-through estimator of Bengio,
Léonard and Courville, 2013). It starts from error feedback's code, plus how far the weight itself
lies from it. The loss is what an error e at the block's output costs the whole model by second
order, `1/2 E[(g . e)^2]` (fisher.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from ...measure.moments import root
from .codes import Codes
from .latents import dense, take_step

STEPS = 150
TOKENS = 1024  # a step
LATENT = 1e-2  # of a code, Adam's first rate for latent codes
GRID = 3e-3  # of their size, Adam's first rate for scales and biases
# The rates fall as this power of the share of steps to come: codes that still change at the end add
# more error than they remove.
CALM = 3
NEAR = 0.45  # of a code: how far a latent may start from error feedback's code
CHECKS = 4  # evaluations on the held-out windows
RIDGE = 0.1  # of the metric's mean diagonal, added to it

Params = dict[str, dict[str, mx.array]]  # by layer, then by name


@dataclass(frozen=True)
class Block:
    """A block (or a head) to be learned.

    Attributes:
        call: runs it on hidden states (windows, tokens, hidden).
        modules: its layers by path; their `weight` is replaced.
        exact: the source's weights.
        start: error feedback's codes, of the layers that are learned.
        inputs: (windows, tokens, hidden), what the quantized blocks before it return.
        targets: (windows, tokens, hidden), what the source's block returns on the source's inputs.
        cost: what an output costs beside its target, a mean over tokens: `metric_cost`, or a
            divergence for the head.
        most: tokens that a step may have, where TOKENS would be too many.
    """

    call: Callable[[mx.array], mx.array]
    modules: dict[str, nn.Module]
    exact: dict[str, mx.array]
    start: dict[str, Codes]
    inputs: mx.array
    targets: mx.array
    cost: Callable[[mx.array, mx.array], mx.array]
    most: int | None = None


def metric_root(metric: np.ndarray) -> mx.array:
    """R with R^T R = E[g g^T] plus a ridge, so that every direction counts a little.

    Args:
        metric: float32 (hidden, hidden), or its diagonal.

    Returns:
        float32 of the metric's shape, in units in which the ridge is one.
    """
    if metric.ndim == 1:
        ridge = RIDGE * float(metric.mean()) or 1.0
        return mx.array(np.sqrt(metric / ridge + 1))
    ridge = RIDGE * float(np.mean(np.diagonal(metric))) or 1.0
    upper = root(metric.astype(np.float64) + ridge * np.eye(len(metric)), ridge).T
    return mx.array((upper / np.sqrt(ridge)).astype(np.float32))


def metric_cost(root: mx.array, out: mx.array, target: mx.array) -> mx.array:
    """Mean over tokens of |R e|^2, with e the difference of outputs from their targets.

    Args:
        root: R, of `metric_root`.
        out, target: (windows, tokens, hidden).
    """
    error = (out - target).astype(mx.float32)
    error = error * root if root.ndim == 1 else error @ root.T
    return mx.mean(mx.sum(mx.square(error), axis=-1))


def learn(
    block: Block,
    seed: int = 0,
    steps: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Codes]:
    """Learn a block's codes, scales and biases; the best on held-out windows are returned.

    The last eighth of the windows is held out; error feedback's own codes are among those compared.

    Args:
        block: what is learned, on what.
        seed: of the order of the windows.
        steps: of Adam; STEPS by default.
        progress: called with (steps done, steps in all).
    """
    steps = steps or STEPS
    tokens = min(TOKENS, block.most or TOKENS)
    train, valid = hold_out(len(block.inputs))
    batch = max(1, min(len(train), tokens // block.inputs.shape[1]))

    latents, grids = _begin(block)
    best = _snapshot(latents, grids)
    best_loss = _total(block, latents, grids, valid, batch)
    moments = {path: (mx.zeros_like(a), mx.zeros_like(a)) for path, a in latents.items()}
    for_grids = {
        path: optim.Adam(learning_rate=partial(_rate, GRID, steps), bias_correction=True)
        for path in latents
    }
    gradient = mx.grad(partial(_loss, block))

    for step, windows in enumerate(batches(train, batch, steps, seed)):
        chosen = mx.array(windows)
        to_weights = gradient(
            _weights(block, latents, grids), block.inputs[chosen], block.targets[chosen]
        )

        # One layer after the other, so that only one has old and new moments at a time.
        for path, start in block.start.items():
            # Lets go of the weight that this step ran with.
            block.modules[path].weight = block.exact[path]
            scales, biases = _grid(start)
            latents[path], moments[path], (to_scales, to_biases) = take_step(
                latents[path],
                moments[path],
                to_weights.pop(path),
                moved(scales, biases, grids[path], start.scales.dtype)[0],
                start.config.bits,
                _rate(LATENT, steps, step),
                step + 1,
            )
            to_grid = {"scales": to_scales * scales, "biases": to_biases * _size(scales, biases)}
            grids[path] = for_grids[path].apply_gradients(to_grid, grids[path])
            mx.eval(latents[path], moments[path], grids[path], for_grids[path].state)
        progress(step + 1, steps)

        # Later isn't always better: the best of a few evaluations is returned.
        if (step + 1) % max(1, steps // CHECKS) == 0:
            loss = _total(block, latents, grids, valid, batch)
            if loss < best_loss:
                best_loss = loss
                best = _snapshot(latents, grids)
    return {path: _finish(block.start[path], params) for path, params in best.items()}


def hold_out(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows to learn on, and the last eighth of them to evaluate on: int (windows,) both."""
    held_out = max(1, count // 8)
    return np.arange(count - held_out), np.arange(count - held_out, count)


def batches(train: np.ndarray, size: int, steps: int, seed: int = 0) -> Iterator[np.ndarray]:
    """The windows of each step, int (size,): all of them in random order before one comes again."""
    rng = np.random.default_rng(seed)
    order = train[:0]
    for _ in range(steps):
        if len(order) < size:
            order = rng.permutation(train)
        yield order[:size]
        order = order[size:]


def _rate(first: float, steps: int, step: Any) -> Any:
    """Adam's rate at a step."""
    return first * (1 - step / steps) ** CALM


def _begin(block: Block) -> tuple[dict[str, mx.array], Params]:
    """Latent codes, and offsets of scales and biases in their own size."""
    latents: dict[str, mx.array] = {}
    grids: Params = {}
    for path, start in block.start.items():
        codes = mx.array(start.codes).astype(mx.float32)
        scales, biases = _grid(start)
        exact = _by_group(block.exact[path].astype(mx.float32), start)
        safe = mx.where(scales == 0, 1.0, scales)
        offset = ((exact - biases[..., None]) / safe[..., None]).reshape(codes.shape) - codes
        latents[path] = codes + mx.clip(offset, -NEAR, NEAR)
        grids[path] = {"scales": mx.zeros_like(scales), "biases": mx.zeros_like(biases)}
    return latents, grids


def _snapshot(latents: dict[str, mx.array], grids: Params) -> Params:
    """Copies of all parameters of this moment, by layer: steps change latents in place."""
    copies = {path: latent * 1 for path, latent in latents.items()}
    mx.eval(copies)
    return {path: dict(grids[path], latent=latent) for path, latent in copies.items()}


def _grid(start: Codes) -> tuple[mx.array, mx.array]:
    """Scales and biases in float32."""
    return start.scales.astype(mx.float32), start.biases.astype(mx.float32)


def _by_group(array: mx.array, start: Codes) -> mx.array:
    """(..., columns) as (..., groups, columns of a group)."""
    return array.reshape(*array.shape[:-1], -1, start.config.group_size)


def moved(
    scales: mx.array, biases: mx.array, offsets: dict[str, mx.array], dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Scales and biases after offsets in units of their size, rounded to `dtype`.

    Args:
        scales, biases: float32 (..., groups).
        offsets: of both, of the same shape.
        dtype: the type that they will be stored in; the result is float32 still.
    """
    new_scales = scales * (1 + offsets["scales"])
    new_biases = biases + _size(scales, biases) * offsets["biases"]
    return (
        _straight(new_scales, new_scales.astype(dtype)),
        _straight(new_biases, new_biases.astype(dtype)),
    )


def _size(scales: mx.array, biases: mx.array) -> mx.array:
    """What an offset of a bias is counted in."""
    return mx.maximum(mx.abs(biases), mx.abs(scales))


def _straight(value: mx.array, rounded: mx.array) -> mx.array:
    """The rounded value, with the gradient of the value."""
    return value + mx.stop_gradient(rounded.astype(value.dtype) - value)


def _codes(latent: mx.array, start: Codes) -> mx.array:
    """The integers that latents stand for."""
    return mx.clip(mx.round(latent), 0, 2**start.config.bits - 1)


def _weights(block: Block, latents: dict[str, mx.array], grids: Params) -> dict[str, mx.array]:
    """The layers' weights as the parameters say."""
    weights = {}
    for path, latent in latents.items():
        start = block.start[path]
        scales, biases = moved(*_grid(start), grids[path], start.scales.dtype)
        weights[path] = dense(latent, scales, biases, start.config.bits, block.exact[path].dtype)
    return weights


def _loss(
    block: Block, weights: dict[str, mx.array], inputs: mx.array, targets: mx.array
) -> mx.array:
    """The block's cost with these weights."""
    for path, weight in weights.items():
        block.modules[path].weight = weight
    return block.cost(block.call(inputs), targets)


def _total(
    block: Block, latents: dict[str, mx.array], grids: Params, windows: np.ndarray, batch: int
) -> float:
    """The block's cost over some windows, a mean over their tokens."""
    weights = _weights(block, latents, grids)
    total = 0.0
    for first in range(0, len(windows), batch):
        chosen = mx.array(windows[first : first + batch])
        loss = _loss(block, weights, block.inputs[chosen], block.targets[chosen])
        total += float(loss) * len(chosen)
    return total / len(windows)


def _finish(start: Codes, params: dict[str, mx.array]) -> Codes:
    """Codes, scales and biases as they will be stored."""
    dtype = start.scales.dtype
    scales, biases = moved(*_grid(start), params, dtype)
    codes = np.array(_codes(params["latent"], start)).astype(np.uint8)
    return Codes(start.config, codes, scales.astype(dtype), biases.astype(dtype))
