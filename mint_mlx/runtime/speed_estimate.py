"""How fast a Mac decodes and reads a prompt, estimated from shapes and nominal figures alone.

A token takes the time to read what it reads, and a fixed time for each block. A prompt's tokens
take the time to multiply, whatever the bits (an M4 Max read one at 1574 to 1621 tokens/s in five
formats: mlx PR 2946; an M5 Pro multiplies as fast at 4, 8 and 16 bits: oMLX issue 2212). The shares
and rates below are fits of figures that others published (docs/guides/speed.md lists them); they
lie within the bands of what this computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..base.quant_config import KEEP, MX_MODES, NVFP4_GLOBAL, QuantConfig, affine, mx_mode
from ..checkpoint.layers import Inventory
from ..checkpoint.roles import EXPERTS
from .metal_dispatch import is_slow
from .speed_table import PROMPT, LayerKind, Rest, SpeedTable, Timing, kind_of, model_key

REACHED = 0.85  # of the nominal bandwidth that any program reads
DENSE = 0.94  # of that, by dense layers
ROUTED = 0.5  # of that, by experts, of which each token reads others
SLOW = 1.3  # times as long in the general kernel: an assumption, no clean figure is published
BLOCK = 50e-6  # seconds of a block's norms, attention and launches
ROUTED_BLOCK = 150e-6  # the same with experts
BAND = (0.7, 1.4)  # true speed over the estimated one
# Multiplications and additions a second that a GPU core reaches in a prompt's products.
RATES = {"M1": 0.2e12, "M2": 0.23e12, "M3": 0.26e12, "M4": 0.31e12, "M5": 1.0e12}
PROMPT_BAND = (0.6, 1.5)  # true speed of reading a prompt over the estimated one


@dataclass(frozen=True)
class Chip:
    """An Apple chip.

    Attributes:
        name: such as `M4 Pro`.
        bandwidth: nominal, bytes per second.
        cores: of its GPU, at most.
        memory: GiB that Macs with it are sold with.
    """

    name: str
    bandwidth: float
    cores: int
    memory: tuple[int, ...]


# Bandwidths, cores and sizes as Apple states them.
CHIPS = tuple(
    Chip(name, gigabytes * 1e9, cores, memory)
    for name, gigabytes, cores, memory in (
        ("M1", 68.25, 8, (8, 16)),
        ("M1 Pro", 200, 16, (16, 32)),
        ("M1 Max", 400, 32, (32, 64)),
        ("M1 Ultra", 800, 64, (64, 128)),
        ("M2", 100, 10, (8, 16, 24)),
        ("M2 Pro", 200, 19, (16, 32)),
        ("M2 Max", 400, 38, (32, 64, 96)),
        ("M2 Ultra", 800, 76, (64, 128, 192)),
        ("M3", 100, 10, (8, 16, 24)),
        ("M3 Pro", 150, 18, (18, 36)),
        ("M3 Max 30-core", 300, 30, (36, 96)),
        ("M3 Max", 400, 40, (48, 64, 128)),
        ("M3 Ultra", 819, 80, (96, 256, 512)),
        ("M4", 120, 10, (16, 24, 32)),
        ("M4 Pro", 273, 20, (24, 48, 64)),
        ("M4 Max 32-core", 410, 32, (36,)),
        ("M4 Max", 546, 40, (48, 64, 128)),
        ("M5", 153, 10, (16, 24, 32)),
        ("M5 Pro", 307, 20, (24, 48, 64)),
        ("M5 Max 32-core", 460, 32, (36,)),
        ("M5 Max", 614, 40, (48, 64, 128)),
    )
)


def find_chip(text: str) -> Chip | None:
    """The chip of a name such as `M4 Pro`, `m4-pro` or `Apple M4 Pro`, or None."""
    wanted = _plain(text).removeprefix("apple")
    return next((chip for chip in CHIPS if _plain(chip.name) == wanted), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def estimate(
    chip: Chip, inventory: Inventory, name: str, caches: Mapping[int, float]
) -> SpeedTable:
    """A table of a Mac as computed.

    Args:
        chip: of the Mac.
        inventory: the model's layers.
        name: of the model.
        caches: bytes of the cache by the context in tokens.
    """
    reading = REACHED * chip.bandwidth
    kinds = {kind_of(layer) for layer in inventory.layers} - {None}
    layers = {
        kind: {
            config: {
                1: Timing(_seconds(kind, config, reading)),
                PROMPT: Timing(_prompt_seconds(kind, config, chip)),
            }
            for config in _ALL
            if config.divides(kind.shape[-1])
        }
        for kind in kinds
        if kind is not None
    }

    # What isn't a layer is read once, and each block has its fixed time.
    others = sum(spec.nbytes for specs in inventory.others.values() for spec in specs)
    blocks = {layer.block for layer in inventory.layers if layer.block is not None}
    routed = {layer.block for layer in inventory.layers if layer.role in EXPERTS}
    fixed = len(blocks - routed) * BLOCK + len(routed) * ROUTED_BLOCK + others / reading
    seconds = {context: fixed + cache / reading for context, cache in caches.items()}
    return SpeedTable(
        machine=f"Apple {chip.name}",
        versions={},
        layers=layers,
        rests={model_key(inventory): Rest(name, seconds)},
        band=BAND,
        estimated=True,
    )


_ALL = (*affine(), *(mx_mode(mode) for mode in MX_MODES), NVFP4_GLOBAL, KEEP)


def _seconds(kind: LayerKind, config: QuantConfig, reading: float) -> float:
    """Seconds in which a token reads what it reads of a layer.

    Args:
        kind: of the layer.
        config: of its weight.
        reading: bytes per second that a program reaches.
    """
    _, rows, columns = kind.shape
    size = kind.active * rows * columns * _bits(config) / 8
    share = ROUTED if kind.kind == "experts" else DENSE
    return size / (share * reading) * (SLOW if is_slow(config, rows, columns) else 1)


def _prompt_seconds(kind: LayerKind, config: QuantConfig, chip: Chip) -> float:
    """Seconds of a layer's products with a prompt's tokens, or of reading all of its weight.

    Experts reach the share of the rate that they reach of the bandwidth.
    """
    experts, rows, columns = kind.shape
    rate = chip.cores * RATES[chip.name[:2]] * (ROUTED if kind.kind == "experts" else 1)
    multiplying = 2 * PROMPT * kind.active * rows * columns / rate
    return max(multiplying, experts * rows * columns * _bits(config) / 8 / chip.bandwidth / REACHED)


def _bits(config: QuantConfig) -> float:
    """Bits of a weight, with its share of scales and biases."""
    scales = 32 / config.group_size if config.mode == "affine" else 8 / max(config.group_size, 1)
    return config.bits + (scales if config.quantized else 0)


def prompt_band(tokens_per_second: float) -> tuple[float, float]:
    """The lowest and the highest speed that an estimated one of reading a prompt stands for."""
    low, high = (factor * tokens_per_second for factor in PROMPT_BAND)
    return low, high


def macs_with(memory: int) -> tuple[Chip, ...]:
    """The chips of Macs that are sold with so many GiB."""
    return tuple(chip for chip in CHIPS if memory in chip.memory)
