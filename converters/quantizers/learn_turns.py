"""Learns a block that is too large to be learned at once: some of its experts after the others.

In a turn only some experts of each stack are learned. The others multiply with the weights that
they have, which for those of earlier turns are the learned ones: they take no gradient, no latent
code and no moments.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...runtime import patching
from ...runtime.cpu_ops import rows_and_experts
from ...runtime.device import on_cpu
from .codes import Codes
from .learn_block import Block, learn

SIZES = 8  # numbers of rows that a product may have on a GPU


def learn_in_turns(
    block: Block,
    stacks: Collection[str],
    turns: int,
    put: Callable[[str, Codes], None],
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Codes]:
    """As `learn`, some of the experts at a time; other layers are learned in the first turn.

    Args:
        block: the whole block.
        stacks: paths of its layers of experts, whose weights are (experts, rows, columns).
        turns: how many, at most as many as there are experts.
        put: gives a layer the weight that its codes mean.
        seed: as for `learn`, the same in each turn.
        progress: receives steps done and all steps.
    """
    if turns == 1 or not stacks:
        return learn(block, seed, progress=progress)

    learned = dict(block.start)
    for path, codes in learned.items():
        put(path, codes)
    edges = {
        path: np.linspace(0, len(learned[path].codes), turns + 1).astype(int).tolist()
        for path in stacks
    }

    for turn in range(turns):
        experts = {path: slice(*edges[path][turn : turn + 2]) for path in stacks}
        experts = {path: some for path, some in experts.items() if some.start < some.stop}
        others = {} if turn else dict.fromkeys(learned, slice(None))
        chosen = others | experts
        smaller = replace(
            block,
            start={path: _some(learned[path], some) for path, some in chosen.items()},
            exact={path: block.exact[path][some] for path, some in chosen.items()},
        )

        def turn_progress(done: int, steps: int, turn: int = turn) -> None:
            progress(turn * steps + done, turns * steps)

        with only_experts([(block.modules[path], some) for path, some in experts.items()]):
            new = learn(smaller, seed, progress=turn_progress)
        for path, codes in new.items():
            learned[path] = _with(learned[path], chosen[path], codes)
            put(path, learned[path])
    return learned


def _some(codes: Codes, experts: slice) -> Codes:
    """The codes of some experts (or rows)."""
    return replace(
        codes,
        codes=codes.codes[experts],
        scales=codes.scales[experts],
        biases=codes.biases[experts],
    )


def _with(codes: Codes, experts: slice, new: Codes) -> Codes:
    """Codes with those of some experts (or rows) replaced."""
    whole = codes.codes.copy()
    whole[experts] = new.codes
    scales = mx.array(codes.scales)
    scales[experts] = new.scales
    biases = mx.array(codes.biases)
    biases[experts] = new.biases
    return replace(codes, codes=whole, scales=scales, biases=biases)


def only_experts(stacks: Sequence[tuple[nn.Module, slice]]) -> AbstractContextManager[None]:
    """Let a weight that these layers are given be that of some experts.

    The other experts keep the weight that they have now.
    """
    whole = {id(stack): (stack.weight, some) for stack, some in stacks}

    def product(
        stack: nn.Module, x: mx.array, indices: mx.array, *args: Any, **kwargs: Any
    ) -> mx.array:
        """As mlx-lm's SwitchLinear: x (..., 1, in) against indices (..., k) is (..., k, 1, out)."""
        lead, rows, expert = rows_and_experts(x, indices)
        # An axis that an index inserts has a stride that MLX's sorted kernels misread (its issue
        # 4253).
        rows = rows.reshape(-1, 1, rows.shape[-1])
        whole_weight, some = whole[id(stack)]
        some_weight = stack.weight
        bias = stack.get("bias")
        inside = (expert >= some.start) & (expert < some.stop)

        # Twice the stock product: with the experts that are learned, and with all the others.
        outputs: list[mx.array] = []
        places = np.empty(len(expert), dtype=np.int64)
        for is_row, weight, experts in (
            (inside, some_weight, some),
            (~inside, whole_weight, slice(None)),
        ):
            chosen = np.flatnonzero(is_row)
            if not len(chosen):
                continue
            places[chosen] = np.arange(len(chosen)) + sum(map(len, outputs))
            stack.weight = weight
            if bias is not None:
                stack.bias = bias[experts]
            padded = padded_rows(chosen, len(expert))
            index = mx.array(expert[padded] - (experts.start or 0))
            outputs.append(stack(rows[mx.array(padded)], index, *args, **kwargs))

        stack.weight = some_weight
        if bias is not None:
            stack.bias = bias
        return mx.concatenate(outputs)[mx.array(places)].reshape(*lead, 1, -1)

    return patching.experts_run_by([stack for stack, _ in stacks], product)


def padded_rows(chosen: np.ndarray, count: int) -> np.ndarray:
    """Rows of a product, on a GPU repeating the last to a multiple of an eighth of all of them.

    A GPU's kernels are chosen, and some are compiled, for each new number of rows, and which rows
    go to an expert changes from step to step.

    Args:
        chosen: int (rows,), of `count`.
        count: how many rows there are.
    """
    if on_cpu():
        return chosen
    step = -(-count // SIZES)
    return np.pad(chosen, (0, -len(chosen) % step), mode="edge")
