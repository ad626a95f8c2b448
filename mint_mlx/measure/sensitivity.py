"""What a sensitivity is: how much the divergence of a model's output grows with errors in a layer.

It is the Fisher information of the model on tokens that it wrote itself. fisher.py measures it,
sensitivity_file.py stores it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..checkpoint.origin import Origin
from .text import Text

SCHEMA = 5


@dataclass(frozen=True)
class TokenWeights:
    """|g|^2 at one layer's output for each token.

    Attributes:
        weight: float32 (measured tokens, slots): one slot, or k for routed experts.
        expert: int32 (measured tokens, slots), the expert of each slot; None for other layers.
    """

    weight: np.ndarray
    expert: np.ndarray | None


@dataclass(frozen=True)
class Sensitivity:
    """Fisher information of a model.

    Attributes:
        origin: the weights that it belongs to.
        text: the model's own. Error feedback reads all of it; the rest of what stands here was
            measured on its first windows (rounds.py).
        trace: float64 (experts,) by layer: the sum over measured tokens of |g|^2 |x|^2.
        weights: |g|^2 by layer and measured token, for error feedback.
        metric: by block, E[g g^T] with g the gradient at the block's output: float32 (hidden,
            hidden), its diagonal where that would be large.
        embedding: float32 (hidden, hidden), what an error in a row of the embedding costs: the sum
            over tokens of g g^T at its output and, where it is the head as well, of |g|^2 x x^T.
        remaining: by layer, the share of its errors' cost that error feedback leaves (moments.py);
            absent where all of it is.
    """

    origin: Origin
    text: Text
    trace: dict[str, np.ndarray]
    weights: dict[str, TokenWeights] = field(default_factory=dict)
    metric: dict[int, np.ndarray] = field(default_factory=dict)
    embedding: np.ndarray | None = None
    remaining: dict[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> np.ndarray:
        """The tokens of the text, int32 (windows, length)."""
        return self.text.tokens

    @property
    def measured(self) -> int:
        """How many tokens it was measured on, in whole windows."""
        counts = {len(weights.weight) for weights in self.weights.values()}
        return min(counts, default=self.tokens.size)

    def per_weight(self, path: str) -> np.ndarray:
        """What a mean squared error of one in each weight of a layer costs, by expert.

        It is the expected KL in nats per token.
        """
        counted = self.text.counted.reshape(-1)[: self.measured].sum()
        return np.asarray(self.trace[path] / (2 * counted))


def halved(matrix: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """As float16, and the power of two that it was divided by."""
    largest = float(np.abs(matrix).max())
    has_scale = 0 < largest < np.inf
    scale = np.float32(2.0 ** np.ceil(np.log2(largest))) if has_scale else np.float32(1)
    return (matrix / scale).astype(np.float16), scale


def compacted(matrix: np.ndarray) -> np.ndarray:
    """Rounded to numbers that `halved` stores exactly."""
    half, scale = halved(matrix)
    return half.astype(np.float32) * scale
