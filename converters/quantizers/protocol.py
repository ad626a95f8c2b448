"""What a quantizer is, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ...base.quant_config import QuantConfig
from ...checkpoint.layers import Inventory, Layer
from ...checkpoint.source import Source
from ...measure.sensitivity import Sensitivity


@dataclass(frozen=True)
class Work:
    """What a quantizer is given besides the layer in hand.

    Attributes:
        source, inventory: the checkpoint and its layers.
        choice: the configuration of every layer.
        folder: the work folder, for files that make the work resumable; those whose names begin
            with SCRATCH and stand in SCRATCH_FILES (base/folders.py) are deleted in the end.
        sensitivity: with the tokens that inputs are measured on; None where none are needed.
        say: shows how far a layer is that takes long, and which share of all work is done.
        grids: whether weights that lie on a grid already keep its codes (grid_codes.py).
    """

    source: Source
    inventory: Inventory
    choice: Mapping[str, QuantConfig]
    folder: Path
    sensitivity: Sensitivity | None
    say: Callable[[str, float], None] = lambda text, share: None
    grids: bool = True


# (layer, its weight, its configuration) -> `weight` (uint32, packed), `scales`, and `biases` where
# the mode has them. Layers come in the model's order.
Quantizer = Callable[[Layer, mx.array, QuantConfig], dict[str, mx.array]]
