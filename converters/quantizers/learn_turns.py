"""Learning a block that is too large to be learned at once: some of its experts after the others.

In a turn only some experts of each stack are learned. The others multiply with the weights that
they have, which for those of earlier turns are the learned ones: they take no gradient, no latent
code and no moments."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from ...runtime.cpu_ops import rows_and_experts
from ...runtime.patching import wrapped_all
from .codes import Codes
from .learn_block import Block, learn


def learn_in_turns(
    block: Block,
    stacks: Collection[str],
    turns: int,
    put: Callable[[str, Codes], None],
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Codes]:
    """As `learn`, a part of the experts at a time; what is no stack is learned in the first turn.

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
    found = dict(block.start)
    for path, codes in found.items():
        put(path, codes)
    edges = {
        path: np.linspace(0, len(found[path].codes), turns + 1).astype(int).tolist()
        for path in stacks
    }
    for turn in range(turns):
        experts = {path: slice(*edges[path][turn : turn + 2]) for path in stacks}
        experts = {path: some for path, some in experts.items() if some.start < some.stop}
        cut = experts if turn else dict.fromkeys(found, slice(None)) | experts
        part = replace(
            block,
            start={path: _some(found[path], some) for path, some in cut.items()},
            exact={path: block.exact[path][some] for path, some in cut.items()},
        )

        def told(done: int, steps: int, turn: int = turn) -> None:
            progress(turn * steps + done, turns * steps)

        with _only([(block.modules[path], some) for path, some in experts.items()]):
            learned = learn(part, seed, progress=told)
        for path, codes in learned.items():
            found[path] = _with(found[path], cut[path], codes)
            put(path, found[path])
    return found


def _some(codes: Codes, experts: slice) -> Codes:
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
    grids = [mx.array(codes.scales), mx.array(codes.biases)]
    grids[0][experts], grids[1][experts] = new.scales, new.biases
    return replace(codes, codes=whole, scales=grids[0], biases=grids[1])


@contextmanager
def _only(stacks: Sequence[tuple[Any, slice]]) -> Iterator[None]:
    """Let a weight that these layers are given be that of some experts; the others keep what they
    have now.
    """
    own = {id(stack): (stack.weight, some) for stack, some in stacks}

    def in_parts(call: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def replaced(
            self: Any, x: mx.array, indices: mx.array, *args: Any, **kwargs: Any
        ) -> mx.array:
            """As mlx-lm's SwitchLinear: x (..., 1, in) broadcast against indices (..., k) gives
            (..., k, 1, out).
            """
            if id(self) not in own:
                return call(self, x, indices, *args, **kwargs)
            lead, rows, expert = rows_and_experts(x, indices)
            # An axis that an index inserts has a stride that MLX's sorted kernels misread (its
            # issue 4253).
            rows = rows.reshape(-1, 1, rows.shape[-1])
            whole, some = own[id(self)]
            inside = (expert >= some.start) & (expert < some.stop)
            given, bias = self.weight, self.get("bias")
            parts, order = [], []
            for where, weight, experts in ((inside, given, some), (~inside, whole, slice(None))):
                chosen = np.flatnonzero(where)
                if not len(chosen):
                    continue
                self.weight = weight
                if bias is not None:
                    self.bias = bias[experts]
                number = mx.array(expert[chosen] - (experts.start or 0))
                parts.append(call(self, rows[mx.array(chosen)], number, *args, **kwargs))
                order.append(chosen)
            self.weight = given
            if bias is not None:
                self.bias = bias
            back = mx.array(np.argsort(np.concatenate(order)))
            return mx.concatenate(parts)[back].reshape(*lead, 1, -1)

        return replaced

    with wrapped_all({type(stack) for stack, _ in stacks}, in_parts):
        yield
