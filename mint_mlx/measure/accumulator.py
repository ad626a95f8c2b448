"""Adds up what layers read and their gradients, to what each block contributes to a sensitivity."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..checkpoint.layers import Inventory
from ..runtime.taps import Activations
from .moments import WIDE, SampledMoments, gram
from .pass_state import Contribution, RowWeights


@dataclass(frozen=True)
class Layers:
    """The layers that a pass follows.

    Attributes:
        experts: by path, how many experts or heads it has; one of a layer without.
        embeddings: paths of embeddings.
        trace_only: paths of layers that are only rounded to nearest, of which the trace is enough.
    """

    experts: dict[str, int]
    embeddings: set[str]
    trace_only: set[str]


def followed_layers(inventory: Inventory) -> Layers:
    """All layers of an inventory, as a pass follows them."""
    return Layers(
        experts={
            layer.path: layer.shape[0] if len(layer.shape) > 2 else 1 for layer in inventory.layers
        },
        embeddings={layer.path for layer in inventory.layers if layer.role == "embedding"},
        trace_only={layer.path for layer in inventory.layers if layer.kind == "multi-linear"},
    )


class Accumulator:
    """Adds up what layers read and their gradients to a contribution, one block after the other."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._contribution = Contribution()
        self._moments: dict[str, SampledMoments] = {}

    def add(self, activations: Activations) -> None:
        """Add what one layer read in some windows, with the gradients at its output."""
        path = activations.path
        assert activations.grad is not None
        squared = np.asarray(mx.sum(mx.square(activations.grad), axis=-1)).astype(np.float64)
        energy = np.asarray(mx.sum(mx.square(activations.x), axis=-1)).astype(np.float64)

        expert = activations.expert
        if expert is None:
            expert = np.zeros(len(energy), dtype=np.int64)
        trace = self._trace(path)
        trace += np.bincount(expert, squared * energy, minlength=len(trace))
        if path in self._layers.trace_only:
            return

        # Second moments tell how much of an error's cost error feedback will leave.
        x = np.asarray(activations.x)
        gradient = np.sqrt(squared).astype(np.float32)
        if path in self._layers.embeddings:  # it is the head as well
            self._add_moment(x * gradient[:, None])
        else:
            moments = self._moments.setdefault(path, SampledMoments())
            experts = self._layers.experts[path]
            moments.add(x, gradient, activations.token, activations.expert, experts)

        self._contribution.rows.setdefault(path, []).append(
            RowWeights(
                squared.astype(np.float32),
                None if activations.expert is None else activations.expert.astype(np.int32),
                activations.token.astype(np.int32),
            )
        )

    def add_embedding(self, path: str, grad: np.ndarray) -> None:
        """Add the gradients at the embedding's output, float32 (tokens, hidden)."""
        trace = self._trace(path)
        trace += float(np.sum(np.square(grad), dtype=np.float64))
        self._add_moment(grad)

    def finish(self, metric: np.ndarray | None = None) -> Contribution:
        """What was added since the last call, with a block's metric."""
        contribution = self._contribution
        contribution.metric = metric
        contribution.remaining = {
            path: moments.remaining() for path, moments in self._moments.items()
        }
        self._contribution = Contribution()
        self._moments = {}
        return contribution

    def _trace(self, path: str) -> np.ndarray:
        """A layer's trace so far, float64 (experts,), to be added to."""
        zeros = np.zeros(self._layers.experts[path])
        return self._contribution.trace.setdefault(path, zeros)

    def _add_moment(self, rows: np.ndarray) -> None:
        """Add rows, float32 (rows, hidden), to the embedding's second moment."""
        if rows.shape[-1] > WIDE:
            return
        moment = gram(rows)
        known = self._contribution.embedding
        self._contribution.embedding = moment if known is None else known + moment
