"""What a quantizer may look at and where it may keep things, and what a quantizer is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ...base.quant_config import QuantConfig
from ...checkpoint.layers import Inventory, Layer
from ...checkpoint.source import Source
from ...measure.sensitivity import Sensitivity

SCRATCH = "scratch-"  # how the names of files begin that a quantizer keeps in the work folder


@dataclass(frozen=True)
class Work:
    """What a quantizer may look at besides the layer in hand.

    Attributes:
        source, inventory: the checkpoint and its layers.
        choice: the configuration of every layer.
        folder: where it may keep what makes its work resumable; files named SCRATCH are deleted in
            the end.
        sensitivity: with the tokens that inputs are measured on; None where none are needed.
        say: takes word of how far a layer is that takes long.
    """

    source: Source
    inventory: Inventory
    choice: Mapping[str, QuantConfig]
    folder: Path
    sensitivity: Sensitivity | None
    say: Callable[[str], None] = lambda _: None


Quantizer = Callable[[Layer, mx.array, QuantConfig], dict[str, mx.array]]
