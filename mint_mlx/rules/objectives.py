"""Objectives: how much a layer's error at each candidate is taken to hurt. The allocator minimises
their sum.

An objective is a function `(layer, nmse, context) -> loss`, with `nmse` float64 (candidates,
experts) and `loss` float64 (candidates,), never negative. To add one, write it here and enter it in
OBJECTIVES."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..base.errors import UsageError
from ..checkpoint.layers import Layer
from ..checkpoint.roles import DOWN


@dataclass(frozen=True)
class Context:
    """What an objective may know beyond the layer.

    Attributes:
        blocks: how many the model has.
        first_block, last_block, roles: the recipe's priors.
        fisher: by layer, float64 (experts,): the KL divergence in nats per token that an NMSE of
            one would cost, as the Fisher information predicts it; empty where no sensitivity was
            measured.
        left: by layer, float64 (candidates,): the share of that cost that error feedback leaves of
            each candidate's error; all of it where there is none.
    """

    blocks: int
    first_block: float = 1.0
    last_block: float = 1.0
    roles: Mapping[str, float] = field(default_factory=dict)
    fisher: Mapping[str, np.ndarray] = field(default_factory=dict)
    left: Mapping[str, np.ndarray] = field(default_factory=dict)


SATURATION = 8.0

Objective = Callable[[Layer, np.ndarray, Context], np.ndarray]


def nmse(layer: Layer, errors: np.ndarray, context: Context) -> np.ndarray:
    """Parameter-weighted relative squared error: number of weights x mean NMSE over experts."""
    return layer.size * errors.mean(axis=1)


def mint(layer: Layer, errors: np.ndarray, context: Context) -> np.ndarray:
    """MINT's published objective: prior x NRMSE, one term a layer, the mean over its experts
    (baa.ai, 2026).

    Its sources give 3 for the first block, 2 for the last, 10 for embedding and head, 8 for
    routers."""
    prior = context.roles.get(layer.role, 1.0)
    if layer.block == 0:
        prior = max(prior, context.first_block)
    elif layer.block is not None and layer.block == context.blocks - 1:
        prior = max(prior, context.last_block)
    return prior * np.sqrt(errors).mean(axis=1)


def prior(layer: Layer, errors: np.ndarray, context: Context) -> np.ndarray:
    """Mean NMSE over experts x a prior that needs no data: every layer counts alike, whatever its
    size.

    All blocks add to one residual stream, so a relative error costs about the same in a small layer
    as in a large one: the Fisher information of trained models varies with a layer's role, hardly
    with its size (docs/research-log.md). The head, which nothing follows, counts 30 times; queries
    and keys, whose errors the softmax dampens, less than half; what an MLP writes back counts half
    as much again, and six times in the first block, where a few weights make the activations that
    all later blocks rely on (Yu et al., The Super Weight in Large Language Models, 2024). A router
    counts three times, and so does an embedding that isn't the head, which all routers read: errors
    in them swap experts, which no gradient shows."""
    return _weight(layer) * errors.mean(axis=1)


def _weight(layer: Layer) -> float:
    if layer.role == "head" or (
        layer.role == "embedding" and layer.reads == 1
    ):  # a tied embedding is the head
        return 30.0
    if layer.role in ("router", "embedding"):
        return 3.0
    if layer.path.endswith(("q_proj", "k_proj")):
        return 0.4
    if layer.path.endswith(DOWN):
        return 6.0 if layer.block == 0 else 1.5
    return 1.0


def fisher(layer: Layer, errors: np.ndarray, context: Context) -> np.ndarray:
    """Predicted KL divergence in nats per token: NMSE x its cost by the Fisher information, over
    all experts.

    With the Hessian's trace for weight this is HAWQ-V2's objective (Dong et al., 2020). Where
    errors are large the second order falls short of the divergence; the factor 1 + SATURATION x
    NMSE makes up for it."""
    return np.asarray(errors * (1 + SATURATION * errors) @ context.fisher[layer.path])


def fisher_gptq(layer: Layer, errors: np.ndarray, context: Context) -> np.ndarray:
    """Predicted KL divergence after error feedback: as `fisher`, times the share that it leaves of
    a layer's cost.

    That is the trace of D over the trace of H = L D L^T, the layer's second moments (ldl.py):
    little where its inputs are strongly correlated, nearly all where they are not.
    """
    return np.asarray(fisher(layer, errors, context) * context.left.get(layer.path, 1.0))


OBJECTIVES: dict[str, Objective] = {
    "nmse": nmse,
    "mint": mint,
    "prior": prior,
    "fisher": fisher,
    "fisher-gptq": fisher_gptq,
}
NEEDS_SENSITIVITY = ("fisher", "fisher-gptq")


def find_objective(name: str) -> Objective:
    """An objective by name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in OBJECTIVES:
        raise UsageError(f"no objective is called {name!r}: there are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
