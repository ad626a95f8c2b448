"""What the inputs of a layer lack beside the source's, once the blocks before it are quantized.

Error feedback that goes by the source's inputs x lets the errors of all blocks add up. Where x' is
what the quantized blocks hand on, and H its second moment, the weights that lose least are
W + W E[|g| (x - x') x'^T] H^-1 (Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for
Asymmetric Calibration", 2025). What is made up for in full overshoots on a dense model: SHARE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...runtime.taps import Activations
from .inputs import Inputs, by_expert

SHARE = 0.75  # of what the inputs lack that is made up for (docs/research-log.md)


@dataclass(frozen=True)
class Drift:
    """The weights of a layer times SHARE of what its inputs lack; a `gptq.Missing`.

    Attributes:
        source: what the layer reads in the source, some windows each.
        drifted: what it reads behind quantized layers, all windows.
        inputs: the same, with the weights of its rows.
    """

    source: Sequence[Activations]
    drifted: Activations
    inputs: Inputs

    def __call__(self, some: slice, weight: np.ndarray) -> np.ndarray:
        """As `gptq.Missing`: float32 (experts, rows, columns)."""
        if self.inputs.experts == 1:
            return weight @ self._moment
        drifted, source, pairs = self._drifted_rows, self._source_rows, self._pairs
        seen = np.empty_like(weight)
        for out, exact, expert in zip(seen, weight, range(self.inputs.experts)[some], strict=True):
            ours, theirs = pairs[expert]
            read = drifted[ours]
            lacking = (source[theirs] - read) * (SHARE * self.inputs.batches[0].weight[ours, None])
            np.matmul(exact @ lacking.T, read, out=out)
        return seen

    @cached_property
    def _drifted_rows(self) -> np.ndarray:
        return np.asarray(self.drifted.x)

    @cached_property
    def _source_rows(self) -> np.ndarray:
        return np.concatenate([np.asarray(batch.x) for batch in self.source])

    @cached_property
    def _moment(self) -> np.ndarray:
        """SHARE of the sum of |g| (x - x') x'^T without experts, float32 (columns, columns)."""
        lacking = self._source_rows - self._drifted_rows
        lacking *= SHARE * self.inputs.batches[0].weight[:, None]
        return lacking.T @ self._drifted_rows

    @cached_property
    def _pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """By expert, the rows of the tokens that go to it in both: drifted ones, the source's.

        A token may go to other experts than in the source.
        """
        experts = self.inputs.experts
        keys = []
        for batches in ([self.drifted], self.source):
            token = np.concatenate([batch.token for batch in batches]).astype(np.int64)
            expert = np.concatenate([batch.expert for batch in batches if batch.expert is not None])
            keys.append(token * experts + expert)
        common, ours, theirs = np.intersect1d(*keys, return_indices=True)
        return [(ours[pairs], theirs[pairs]) for pairs in by_expert(common % experts, experts)]
