"""The same configuration for every layer that can take it: the baseline of all comparisons."""

from __future__ import annotations

from ..base.quant_config import KEEP, QuantConfig
from ..checkpoint.layers import Inventory, Layer


def uniform_choice(
    inventory: Inventory, config: QuantConfig, ignore_guards: bool = False
) -> dict[str, QuantConfig]:
    """A configuration by layer path.

    As mlx-lm does, a layer whose rows the group doesn't divide stays unquantized. Routers get what
    their model class asks for, else 8 bits. `keep` leaves every layer as the source stores it.
    """

    def pick(layer: Layer) -> QuantConfig:
        if not config.quantized:
            return layer.stored or KEEP
        wanted = config
        if layer.objection(config) and not ignore_guards:
            if layer.keep:
                return KEEP
            group = config.group_size if config.mode == "affine" else 32
            wanted = layer.class_config or QuantConfig(layer.floor, group)
        return wanted if wanted.divides(layer.shape[-1]) else KEEP

    return {layer.path: pick(layer) for layer in inventory.layers}


def comparable_choice(inventory: Inventory, config: QuantConfig) -> dict[str, QuantConfig]:
    """As `uniform_choice`, with rows that the group doesn't divide in groups of 32 where possible.

    What other choices are compared with: unquantized layers would make it another thing.
    """
    choice = uniform_choice(inventory, config)
    finer = QuantConfig(config.bits, 32)
    for layer in inventory.layers:
        possible = finer.divides(layer.shape[-1]) and not layer.objection(finer)
        if possible and not choice[layer.path].quantized:
            choice[layer.path] = finer
    return choice


def active_ratio(inventory: Inventory, choice: dict[str, QuantConfig]) -> float:
    """Bytes that a decoded token reads, relative to uniform 4bit-g64.

    Decoding is slower by about this factor. Rows that groups of 64 don't divide are counted at
    4bit-g32 there, so that the ratio compares like with like."""
    reference = comparable_choice(inventory, QuantConfig(4, 64))
    return inventory.active_bytes(choice) / inventory.active_bytes(reference)
