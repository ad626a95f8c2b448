"""Stock classes are patched temporarily, and only for the modules that are asked for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.switch_layers import SwitchGLU

from mint_mlx.runtime import patching

Patch = AbstractContextManager[None]


class Double(nn.Module):
    def __call__(self, x: int, more: int = 0) -> int:
        return 2 * x + more


class Heir(Double):
    """Has its parent's `__call__`."""


@pytest.mark.parametrize(
    "patch",
    [
        lambda block: patching.returning([block], 7),
        lambda block: patching.returning_once([block], 7),
        lambda block: patching.blocks_run_by([block], lambda block, x: 7),
        lambda block: patching.experts_run_by([block], lambda block, x: 7),
    ],
)
@pytest.mark.parametrize("kind", [Double, Heir])
def test_only_the_given_module_is_replaced_and_only_inside(
    patch: Callable[[nn.Module], Patch], kind: type[Double]
) -> None:
    block, other = kind(), kind()
    stock = Double.__call__
    with patch(block):
        assert block(1) == 7
        assert other(1) == 2
    assert block(1) == 2
    assert Double.__call__ is stock
    assert "__call__" not in vars(Heir)


def test_what_fails_inside_puts_the_stock_method_back_too() -> None:
    stock = Double.__call__
    with pytest.raises(ZeroDivisionError), patching.returning([Double()], 7):
        raise ZeroDivisionError
    assert Double.__call__ is stock


def test_a_block_that_must_not_be_called_twice() -> None:
    block = Double()
    with patching.returning_once([block], 7):
        assert block(1) == 7
        with pytest.raises(ValueError, match="more than once"):
            block(1)


def test_inside_its_replacement_a_block_runs_itself() -> None:
    block = Double()
    with patching.blocks_run_by([block], lambda block, x, **more: block(x, **more) + 1):
        assert block(1, more=4) == 7
        assert block(1) == 3


def test_a_modules_arguments_are_learned_without_running_what_follows() -> None:
    block, ran = Double(), []

    def run() -> None:
        block(1, more=2)
        ran.append("what follows")

    assert patching.arguments_of(block, run) == ((1,), {"more": 2})
    assert not ran
    with pytest.raises(patching.NotCalled):
        patching.arguments_of(Double(), run)
    assert ran == ["what follows"]


def test_the_experts_of_each_token_are_seen() -> None:
    experts, seen = SwitchGLU(8, 8, 4), []
    indices = mx.array([[0, 3], [2, 1]])

    def see(module: nn.Module, indices: mx.array) -> None:
        seen.append((module, indices))

    with patching.routing_seen(see):
        experts(mx.ones((2, 8)), indices)
    experts(mx.ones((2, 8)), indices)
    assert seen == [(experts, indices)]


def test_outputs_of_layers_and_tied_heads_are_changed_and_those_of_embeddings() -> None:
    linear, embedding = nn.Linear(4, 4, bias=False), nn.Embedding(6, 4)
    x, ids = mx.ones((1, 4)), mx.array([2])
    expected = [linear(x), embedding.as_linear(x), embedding(ids)]

    def change(layer: nn.Module, out: mx.array, *args: Any) -> mx.array:
        return out + 1

    with patching.outputs_changed([nn.Linear], change):
        layers = [linear(x), embedding.as_linear(x), embedding(ids)]
    with patching.embeddings_changed(change):
        embeddings = [linear(x), embedding.as_linear(x), embedding(ids)]
    for number, stock in enumerate(expected):
        assert mx.allclose(layers[number], stock + (number < 2))
        assert mx.allclose(embeddings[number], stock + (number == 2))


def test_a_class_and_its_heir_are_replaced_once_each() -> None:
    blocks, calls = [Double(), Heir(), Double()], []

    def run(block: nn.Module, x: int) -> int:
        calls.append(type(block))
        return block(x)

    with patching.blocks_run_by(blocks, run):
        assert [block(1) for block in blocks] == [2, 2, 2]
    assert calls == [Double, Heir, Double]
    assert "__call__" not in vars(Heir)


def test_a_run_inside_a_run_leaves_the_outer_one_its_arguments() -> None:
    first, second = Double(), Double()

    def run() -> None:
        first(1)
        second(2)

    def run_to_second() -> None:
        patching.arguments_of(second, run)

    assert patching.arguments_of(first, run_to_second) == ((1,), {})


def test_mlx_has_its_own_products_back() -> None:
    stock = mx.quantized_matmul, mx.gather_qmm
    with patching.quantized_products(max, min):
        assert (mx.quantized_matmul, mx.gather_qmm) == (max, min)
    assert (mx.quantized_matmul, mx.gather_qmm) == stock
