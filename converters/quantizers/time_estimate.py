"""How long a quantizer takes beside rounding to nearest, from headers alone.

Seconds are the count of multiplications over the rate of a product timed on this machine; what has
few of them is timed itself."""

from __future__ import annotations

from ...base.quant_config import QuantConfig
from ...base.threads import cores
from ...checkpoint.layers import Inventory, Layer


def _products(inventory: Inventory) -> list[Layer]:
    """The layers that multiply: all but embeddings."""
    return [layer for layer in inventory.layers if layer.kind != "embedding"]


def active_weights(inventory: Inventory) -> float:
    """Weights that one token is multiplied with."""
    return sum(layer.size * layer.reads for layer in _products(inventory))


def feedback(inventory: Inventory, tokens: int, rate: float) -> dict[str, float]:
    """Seconds of error feedback by stage.

    It costs a row and column of each second moment for every weight, and the moments their tokens.
    """
    return {"error feedback": _feeding(inventory, tokens, 2) / rate}


def following(inventory: Inventory, tokens: int, rate: float) -> dict[str, float]:
    """Seconds of error feedback behind quantized blocks by stage.

    Each weight meets its columns' second moments half as often again, and the tokens that a layer
    reads twice; each block runs twice more.
    """
    runs = (4 + 4) * active_weights(inventory) * tokens
    return {"error feedback": (_feeding(inventory, tokens, 3) + runs) / rate}


def _feeding(inventory: Inventory, tokens: int, each: int) -> float:
    """Operations of error feedback, `each` for a weight and a column of its second moments."""
    layers = _products(inventory)
    columns = sum(each * layer.size * layer.shape[-1] for layer in layers)
    moments = sum(layer.reads * layer.experts * layer.shape[-1] ** 2 for layer in layers)
    return columns + 2 * moments * tokens


def searching(inventory: Inventory) -> dict[str, float]:
    """Seconds of searching ranges by stage: the search is timed, on a million weights a core."""
    import mlx.core as mx

    from ...runtime.product_rate import shortest
    from . import search

    weight = mx.random.normal((256 * cores(search.WORKERS), 4096)).astype(mx.bfloat16)
    mx.eval(weight)
    each = shortest(lambda: search.quantize(weight, QuantConfig(4, 64))) / weight.size
    return {"range search": each * sum(layer.size for layer in inventory.layers)}


def learning(inventory: Inventory, tokens: int, rate: float) -> dict[str, float]:
    """Seconds of error feedback, learning and refining by stage.

    Learning and refining take six operations for each weight and token of a step, three times that
    with all that isn't a product, and each further turn of learning (memory_estimate.turns) four:
    its products, made again.
    """
    from . import distil, learn_block
    from .memory_estimate import turns

    active = active_weights(inventory)
    further = turns(inventory, tokens) - 1
    step = (3 * 6 + 4 * further) * active
    before = feedback(inventory, tokens, rate) | searching(inventory)
    return before | {
        "learning": step * learn_block.STEPS * learn_block.TOKENS / rate,
        "refining": 3 * 6 * active * distil.learned_steps() * distil.TOKENS / rate,
    }
