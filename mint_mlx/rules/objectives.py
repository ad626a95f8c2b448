"""Objectives: how much a layer's error at each candidate is expected to hurt the model.

The allocator minimises their sum. To add one, write its function and enter it in OBJECTIVES: the
entry holds every fact about it, and no other file compares its name with a literal. (numpy is
imported on use: the command line lists the names here in its help.)"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from ..base.errors import UsageError
from ..checkpoint.roles import DOWN

if TYPE_CHECKING:
    import numpy as np

    from ..checkpoint.layers import Layer

SATURATION = 8.0


@dataclass(frozen=True)
class Context:
    """What an objective may know beyond the layer.

    Attributes:
        blocks: how many the model has.
        first_block, last_block, roles: the recipe's priors.
        fisher: by layer, float64 (experts,): the KL divergence in nats per token that an NMSE of
            one would cost, as the Fisher information predicts it; empty where no sensitivity was
            measured.
        remaining: by layer, float64 (candidates,): the share of that cost that remains of each
            candidate's error after error feedback; 1 for a layer that isn't listed.
    """

    blocks: int
    first_block: float = 1.0
    last_block: float = 1.0
    roles: Mapping[str, float] = field(default_factory=dict)
    fisher: Mapping[str, np.ndarray] = field(default_factory=dict)
    remaining: Mapping[str, np.ndarray] = field(default_factory=dict)


Loss: TypeAlias = "Callable[[Layer, np.ndarray, Context], np.ndarray]"


@dataclass(frozen=True)
class Objective:
    """An objective's entry in OBJECTIVES.

    Attributes:
        name: how plans, recipes and the command line call it.
        help: what it is, in a few words for `--help`.
        loss: (layer, nmse, context) -> loss; `nmse` is float64 (candidates, experts), `loss`
            float64 (candidates,), never negative.
        needs_sensitivity: whether it weighs errors with a sensitivity (context.fisher).
        expectation: measured KL over the sum of its losses, by quantizer; empty where the sum
            predicts no KL.
        without_feedback: the objective in its place for quantizers without error feedback, or ''.
        weighted: whether its NMSE weighs columns by how large their inputs are, as far as the file
            says it (measure/column_weights.py).
    """

    name: str
    help: str
    loss: Loss
    needs_sensitivity: bool = False
    expectation: Mapping[str, float] = field(default_factory=dict)
    without_feedback: str = ""
    weighted: bool = False


def nmse(layer: Layer, errors: np.ndarray, context: Context) -> np.ndarray:
    """Parameter-weighted relative squared error: number of weights x mean NMSE over experts."""
    return layer.size * errors.mean(axis=1)


def mint(layer: Layer, errors: np.ndarray, context: Context) -> np.ndarray:
    """MINT's published objective: prior x NRMSE, one term a layer (baa.ai, 2026).

    The NRMSE is the mean over a layer's experts. Its sources give 3 for the first block, 2 for the
    last, 10 for embedding and head, 8 for routers."""
    import numpy as np

    prior = context.roles.get(layer.role, 1.0)
    if layer.block == 0:
        prior = max(prior, context.first_block)
    elif layer.block is not None and layer.block == context.blocks - 1:
        prior = max(prior, context.last_block)
    return prior * np.sqrt(errors).mean(axis=1)


def prior(layer: Layer, errors: np.ndarray, context: Context) -> np.ndarray:
    """Mean NMSE over experts x a prior that needs no data, whatever the layer's size.

    In the NMSE columns weigh as much as the norm before them multiplies their inputs.

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
    """A layer's prior for `prior`."""
    # A tied embedding is the head as well.
    if layer.role == "head" or (layer.role == "embedding" and layer.reads == 1):
        return 30.0
    if layer.role in ("router", "embedding"):
        return 3.0
    if layer.path.endswith(("q_proj", "k_proj")):
        return 0.4
    if layer.path.endswith(DOWN):
        return 6.0 if layer.block == 0 else 1.5
    return 1.0


def fisher(layer: Layer, errors: np.ndarray, context: Context) -> np.ndarray:
    """Predicted KL divergence in nats per token: NMSE x its cost by the Fisher information.

    Summed over all experts. With the Hessian's trace for weight this is HAWQ-V2's objective (Dong
    et al., 2020). Where errors are large the second order falls short of the divergence; the factor
    1 + SATURATION x NMSE makes up for it."""
    loss: np.ndarray = errors * (1 + SATURATION * errors) @ context.fisher[layer.path]
    return loss


def fisher_gptq(layer: Layer, errors: np.ndarray, context: Context) -> np.ndarray:
    """Predicted KL divergence after error feedback: `fisher` x the share of the cost that remains.

    On text that the feedback hasn't seen (moments.py): little where a layer's inputs are strongly
    correlated, nearly all where they are not, or where there is little text for many columns.
    """
    return fisher(layer, errors, context) * context.remaining.get(layer.path, 1.0)


# The expectations were fitted on demo-moe from 3 to 5 bits per weight (docs/research-log.md).
OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("prior", "squared error with a prior for each role", prior, weighted=True),
        Objective(
            "fisher",
            "KL predicted from a sensitivity",
            fisher,
            needs_sensitivity=True,
            expectation={
                "rtn": 1.0,
                "search": 0.8,
                "gptq": 0.65,
                "search-gptq": 0.5,
                "search-gptaq": 0.4,
                "learn": 0.35,
            },
        ),
        Objective(
            "fisher-gptq",
            "the same after error feedback",
            fisher_gptq,
            needs_sensitivity=True,
            expectation={"gptq": 1.2, "search-gptq": 1.0, "search-gptaq": 0.8, "learn": 0.6},
            without_feedback="fisher",
        ),
        Objective("nmse", "squared error, every weight alike", nmse),
        Objective("mint", "MINT as published", mint),
    )
}


def find_objective(name: str) -> Objective:
    """An objective's entry by name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in OBJECTIVES:
        raise UsageError(f"no objective is called {name!r}: there are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def needs_sensitivity(name: str | None) -> bool:
    """Whether an objective of this name weighs errors with a sensitivity; not for None."""
    return name in OBJECTIVES and OBJECTIVES[name].needs_sensitivity
