"""The quantizers by name: same plan, same bytes, other codes.

To add one, write its file and enter it here. An entry holds every fact about its quantizer; no
other file compares a quantizer's name with a literal. (What runs on mlx is imported on use, since
the command line lists the names here in its help.)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ...base.errors import UsageError

if TYPE_CHECKING:
    from ...checkpoint.layers import Inventory
    from .protocol import Quantizer, Work

Make: TypeAlias = "Callable[[Work], Quantizer]"
Memory: TypeAlias = "Callable[[Inventory, int, bool], int]"
Seconds: TypeAlias = "Callable[[Inventory, int, float], dict[str, float]]"


def _rounding_memory(inventory: Inventory, tokens: int, runs: bool) -> int:
    from .memory_estimate import rounding

    return rounding(inventory, tokens, runs)


def _no_seconds(inventory: Inventory, tokens: int, rate: float) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Entry:
    """A quantizer's entry in QUANTIZERS.

    Attributes:
        name: how plans and the command line call it.
        help: what it does, in a few words for `--help`.
        make: (work) -> quantizer, for one conversion; the quantizer is asked for layers in the
            model's order.
        needs_inputs: whether it measures what layers read: the model is run, and `work.sensitivity`
            is there.
        row_wise: whether the codes of a row follow from that row alone, so that a layer may come in
            pieces along its rows.
        sequential: whether a block needs the quantized blocks before it: several machines can't
            share the work, and hidden states are stored in the work folder.
        shared: the quantizer that several machines take in its place; '' where there is none.
        plain: whether it is `mx.quantize` itself where it is asked for by name, also of weights
            that lie on a grid already (measure/grid.py).
        memory: (inventory, tokens, runs) -> bytes that a conversion holds at most; `tokens` are the
            model's own, `runs` says whether it is run on them.
        seconds: (inventory, tokens, rate) -> seconds by stage beside those of rounding to nearest;
            `rate` is how many operations of a float32 matrix product a second has.
    """

    name: str
    help: str
    make: Make
    needs_inputs: bool = False
    row_wise: bool = False
    sequential: bool = False
    shared: str = ""
    plain: bool = False
    memory: Memory = _rounding_memory
    seconds: Seconds = _no_seconds


def _rtn(_: Work) -> Quantizer:
    from . import rtn

    return lambda layer, weight, config: rtn.quantize(weight, config)


def _search(_: Work) -> Quantizer:
    from . import search

    return lambda layer, weight, config: search.quantize(weight, config)


def _feedback(work: Work, searched: bool) -> Quantizer:
    from . import gptq
    from .inputs import Moments

    assert work.sensitivity is not None
    moments = Moments(work.source, work.inventory, work.sensitivity)
    return lambda layer, weight, config: gptq.quantize(
        weight, config, moments.of(layer.path), searched
    )


def _gptq(work: Work) -> Quantizer:
    return _feedback(work, searched=False)


def _search_gptq(work: Work) -> Quantizer:
    return _feedback(work, searched=True)


def _gptq_memory(inventory: Inventory, tokens: int, runs: bool) -> int:
    from .memory_estimate import feedback

    return feedback(inventory, tokens, runs)


def _gptq_seconds(inventory: Inventory, tokens: int, rate: float) -> dict[str, float]:
    from .time_estimate import feedback

    return feedback(inventory, tokens, rate)


def _search_seconds(inventory: Inventory, tokens: int, rate: float) -> dict[str, float]:
    from .time_estimate import searching

    return searching(inventory)


def _search_gptq_seconds(inventory: Inventory, tokens: int, rate: float) -> dict[str, float]:
    return _search_seconds(inventory, tokens, rate) | _gptq_seconds(inventory, tokens, rate)


def _search_gptaq(work: Work) -> Quantizer:
    from .drift_model import Follower

    return Follower(work)


def _following_memory(inventory: Inventory, tokens: int, runs: bool) -> int:
    from .memory_estimate import following

    return following(inventory, tokens, runs)


def _search_gptaq_seconds(inventory: Inventory, tokens: int, rate: float) -> dict[str, float]:
    from .time_estimate import following

    return _search_seconds(inventory, tokens, rate) | following(inventory, tokens, rate)


def _learn(work: Work) -> Quantizer:
    from .learn_model import Learner

    return Learner(work)


def _learn_memory(inventory: Inventory, tokens: int, runs: bool) -> int:
    from .memory_estimate import learning

    return learning(inventory, tokens, runs)


def _learn_seconds(inventory: Inventory, tokens: int, rate: float) -> dict[str, float]:
    from .time_estimate import learning

    return learning(inventory, tokens, rate)


QUANTIZERS = {
    entry.name: entry
    for entry in (
        Entry("rtn", "rounds to nearest", _rtn, row_wise=True, plain=True),
        Entry(
            "search",
            "searches each group's range",
            _search,
            row_wise=True,
            seconds=_search_seconds,
        ),
        Entry(
            "gptq",
            "passes rounding errors on to later columns",
            _gptq,
            needs_inputs=True,
            memory=_gptq_memory,
            seconds=_gptq_seconds,
        ),
        Entry(
            "search-gptq",
            "searches each group's range, then passes rounding errors on",
            _search_gptq,
            needs_inputs=True,
            memory=_gptq_memory,
            seconds=_search_gptq_seconds,
        ),
        Entry(
            "search-gptaq",
            "the same, and makes up for what the blocks before did to a layer's inputs",
            _search_gptaq,
            needs_inputs=True,
            sequential=True,
            shared="search-gptq",
            memory=_following_memory,
            seconds=_search_gptaq_seconds,
        ),
        Entry(
            "learn",
            "learns codes block by block",
            _learn,
            needs_inputs=True,
            sequential=True,
            memory=_learn_memory,
            seconds=_learn_seconds,
        ),
    )
}


# What `mx.quantize` itself makes, with which uniform conversions are compared.
BASELINE = next(entry.name for entry in QUANTIZERS.values() if entry.plain)


def find_quantizer(name: str) -> Entry:
    """A quantizer's entry by name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in QUANTIZERS:
        raise UsageError(f"no quantizer is called {name!r}: there are {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]


def needs_inputs(name: str) -> bool:
    """Whether a quantizer of this name measures what layers read; not for an unknown name."""
    return name in QUANTIZERS and QUANTIZERS[name].needs_inputs
