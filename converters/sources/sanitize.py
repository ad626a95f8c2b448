"""Wraps the `sanitize` of a model class of mlx-lm, which renames, splits and stacks tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Weights = dict[str, Any]


def wrap_sanitize(
    model_class: type, wrapper: Callable[[Any, Weights, Callable[[Weights], Weights]], Weights]
) -> type:
    """The model class with another `sanitize`.

    It keeps its module, by which runtime/patching.py finds a family's functions, and its name.

    Args:
        model_class: of mlx-lm; one without a `sanitize` takes the tensors as they are.
        wrapper: called with the model, the tensors and the stock `sanitize`; returns the tensors.
    """

    class Wrapped(model_class):
        def sanitize(self, weights: Weights) -> Weights:
            stock = super().sanitize if hasattr(super(), "sanitize") else lambda tensors: tensors
            return wrapper(self, weights, stock)

    Wrapped.__name__ = model_class.__name__
    Wrapped.__module__ = model_class.__module__
    return Wrapped
