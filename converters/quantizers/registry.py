"""The quantizers by name: same plan, same bytes, other codes. To add one, write its file and enter
it here.
"""

from __future__ import annotations

from collections.abc import Callable

from ...base.errors import UsageError
from . import gptq, rtn
from .protocol import Quantizer, Work


def _rtn(_: Work) -> Quantizer:
    return lambda layer, weight, config: rtn.quantize(weight, config)


def _gptq(work: Work) -> Quantizer:
    from .inputs import Moments  # (it brings all that runs a model)

    assert work.sensitivity is not None
    moments = Moments(work.source, work.inventory, work.sensitivity)
    return lambda layer, weight, config: gptq.quantize(weight, config, moments.of(layer.path))


def _learn(work: Work) -> Quantizer:
    from .learn_model import Learner

    return Learner(work)


QUANTIZERS: dict[str, Callable[[Work], Quantizer]] = {"rtn": _rtn, "gptq": _gptq, "learn": _learn}
NEEDS_INPUTS = ("gptq", "learn")


def find_quantizer(name: str) -> Callable[[Work], Quantizer]:
    """A quantizer by name; it is asked for layers in the model's order.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in QUANTIZERS:
        raise UsageError(f"no quantizer is called {name!r}: there are {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]
