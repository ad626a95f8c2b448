"""How much of its text a model is measured on: as much as it takes to know what its layers cost.

The second moments that error feedback goes by have as many numbers as columns squared, and want all
of the text; what an error in a layer costs is one number. Where that is off by a share e, a plan
loses about e^2 / 2 more than the best one: at an optimum the first order vanishes. So half of the
windows is measured, which the second moments can do with (a plan could do with less), and more only
where the standard error of the layers' costs is too large (docs/research-log.md).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..base.report import Progress
from ..checkpoint.layers import Inventory
from ..checkpoint.source import Source
from . import fisher
from .sensitivity import Sensitivity, TokenWeights, compacted
from .text import Text

LEAST = 4096  # tokens that are measured, where the text has so many
SHARE = 2  # and at least one in so many of its windows
ERROR = 0.1  # standard error of a cost, relative to it, at which no more is measured


def measure(
    source: Source,
    inventory: Inventory,
    text: Text,
    progress: Progress = lambda *_: None,
    key: str | None = None,
) -> Sensitivity:
    """As `fisher.measure`, on as many of the first windows as it takes.

    Args:
        source: a checkpoint whose weights are on this machine.
        inventory: its layers.
        text: the model's own.
        progress: called with (what, done, total).
        key: as for `fisher.measure`.

    Raises:
        NoChain, MintError: as `fisher.measure`.
    """

    def of(windows: slice) -> Sensitivity:
        return fisher.measure(source, inventory, text[windows], progress=progress, key=key)

    begun = first_windows(text.tokens.shape)
    sensitivity = of(slice(begun))
    if (wanted := windows_needed(sensitivity, inventory, len(text.tokens))) > begun:
        sensitivity = joined(sensitivity, of(slice(begun, wanted)))
    return replace(sensitivity, text=text)


def first_windows(shape: tuple[int, ...]) -> int:
    """How many windows are measured at first, of a text (windows, tokens)."""
    windows, length = shape
    return min(windows, max(-(-LEAST // length), -(-windows // SHARE)))


def windows_needed(sensitivity: Sensitivity, inventory: Inventory, most: int) -> int:
    """How many windows bring the standard error to ERROR, of `most` that there are.

    Args:
        sensitivity: of the first ones.
        inventory: the model's layers.
        most: windows of the whole text.
    """
    windows = len(sensitivity.tokens)
    ratio = standard_error(sensitivity, inventory) / ERROR
    return most if not np.isfinite(ratio) else min(most, int(np.ceil(windows * ratio**2)))


def standard_error(sensitivity: Sensitivity, inventory: Inventory) -> float:
    """The standard error of what layers cost, relative to it: root mean square over all layers.

    It is the spread of |g|^2 over windows, as tokens of one depend on each other. A layer counts by
    its number of weights, in proportion to which layers lose where a plan is best. Infinite where
    one window can't tell.
    """
    windows = len(sensitivity.tokens)
    if windows < 2:
        return np.inf
    squares, counts = 0.0, 0
    for layer in inventory.layers:
        if layer.path not in sensitivity.weights:
            continue
        sums = sensitivity.weights[layer.path].weight.astype(np.float64).reshape(windows, -1).sum(1)
        mean = float(sums.mean())
        squares += layer.size * float(sums.var(ddof=1)) / (windows * mean**2) if mean else 0.0
        counts += layer.size
    return float(np.sqrt(squares / counts)) if counts else 0.0


def joined(first: Sensitivity, second: Sensitivity) -> Sensitivity:
    """The sensitivity on the windows of both, of one model."""
    share = first.tokens.size / (first.tokens.size + second.tokens.size)

    def mean(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return compacted((share * one + (1 - share) * other).astype(np.float32))

    def rows(path: str) -> TokenWeights:
        one, other = first.weights[path], second.weights[path]
        weight = compacted(np.concatenate([one.weight, other.weight]))
        if one.expert is None or other.expert is None:
            return TokenWeights(weight, None)
        return TokenWeights(weight, np.concatenate([one.expert, other.expert]))

    embedding = first.embedding
    if embedding is not None and second.embedding is not None:
        embedding = compacted(embedding + second.embedding)
    return replace(
        first,
        text=first.text + second.text,
        trace={path: trace + second.trace[path] for path, trace in first.trace.items()},
        weights={path: rows(path) for path in first.weights},
        metric={block: mean(one, second.metric[block]) for block, one in first.metric.items()},
        embedding=embedding,
        remaining={
            path: share * one + (1 - share) * second.remaining[path]
            for path, one in first.remaining.items()
        },
    )
