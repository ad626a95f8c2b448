"""What decoding costs on a machine: seconds of each kind of layer, and of all that isn't a layer.

Layers of one shape cost the same, so a table has one entry for each kind of layer. A plan's time is
the sum of its layers' times and the rest: attention over the context, norms, routing, sampling, and
what mlx-lm's own loop takes.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..base.errors import MintError
from ..base.one_line import one_line
from ..base.quant_config import QuantConfig
from ..checkpoint.layers import Inventory, Layer
from ..checkpoint.roles import TOWER

PROMPT = 512  # tokens of a prompt that are read at once
BATCHES = (1, 2, 4, 8, 16, PROMPT)  # tokens at once: decoding, verifying drafts, reading a prompt
# Where mlx-lm's generation is, over what a measured table predicts: within 7 % by the table's clock
# (eval/bench/speed_results.md), and a machine's own speed changes by more.
MEASURED_BAND = (0.85, 1.2)


@dataclass(frozen=True, order=True)
class LayerKind:
    """What the time of a layer depends on.

    Attributes:
        kind: `linear`, `experts` or `multi-linear`.
        shape: of its weight as (experts or heads, rows, columns).
        active: how many of the experts or heads one token reads.
        dtype: safetensors code of the activations.
    """

    kind: str
    shape: tuple[int, int, int]
    active: int
    dtype: str

    def __str__(self) -> str:
        experts, rows, columns = self.shape
        one = f"{rows}x{columns}"
        if self.kind == "linear":
            return one
        if self.kind == "multi-linear":
            return f"{experts} heads of {one}"
        return f"{self.active} of {experts} experts of {one}"


@dataclass(frozen=True)
class Timing:
    """Seconds of one product: the median, and the relative half of the middle half of all runs."""

    seconds: float
    spread: float = 0.0


@dataclass(frozen=True)
class Rest:
    """What decoding a token of one model takes beside its layers.

    Attributes:
        name: of the model.
        seconds: by the context in tokens; at other contexts the line between two.
        spread: as of a Timing.
    """

    name: str
    seconds: Mapping[int, float]
    spread: float = 0.0

    def at(self, context: int) -> float:
        """Seconds at a context; beyond the ends the nearest line goes on."""
        known = sorted(self.seconds)
        if len(known) == 1:
            return self.seconds[known[0]]
        place = min(max(bisect_left(known, context), 1), len(known) - 1)
        low, high = known[place - 1], known[place]
        slope = (self.seconds[high] - self.seconds[low]) / (high - low)
        return self.seconds[low] + slope * (context - low)


Times = Mapping[QuantConfig, Mapping[int, Timing]]  # by configuration and tokens at once


@dataclass(frozen=True, repr=False)
class SpeedTable:
    """Times of one machine.

    Attributes:
        machine: its name, for people.
        versions: of mlx and mlx-lm that ran.
        layers: times of each kind of layer.
        rests: what models take beside their layers, by `model_key`.
        band: the lowest and the highest true speed, in units of the predicted one.
        estimated: whether it was computed from shapes and not measured.
        clock: seconds of a tick (clock.py) while it was measured; 0 where it wasn't.
    """

    machine: str
    versions: Mapping[str, str]
    layers: Mapping[LayerKind, Times]
    rests: Mapping[str, Rest]
    band: tuple[float, float] = MEASURED_BAND
    estimated: bool = False
    clock: float = 0.0

    def __repr__(self) -> str:
        kinds = f"{len(self.layers)} kinds of layers"
        models = ", ".join(rest.name for rest in self.rests.values())
        return one_line(self, self.machine, kinds, models)


@dataclass(frozen=True)
class Speed:
    """How fast a choice of configurations decodes, as predicted.

    Attributes:
        tokens_per_second: one stream, one token at a time.
        band: the lowest and the highest true one that this stands for.
        context: tokens in the cache.
        machine: what it is predicted for.
        estimated: whether nothing was measured there.
    """

    tokens_per_second: float
    band: tuple[float, float]
    context: int
    machine: str = field(compare=False)
    estimated: bool = False

    def __str__(self) -> str:
        return f"{figure(self.band[0])} to {figure(self.band[1])}"


def figure(value: float) -> str:
    """Tokens per second in two digits, or whole from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def describe_speed(speed: Speed) -> str:
    """A predicted speed for people: the band, the context, the machine."""
    how = "estimated for" if speed.estimated else "predicted on"
    return f"{speed} tokens/s at a context of {speed.context} tokens, {how} {speed.machine}"


def kind_of(layer: Layer) -> LayerKind | None:
    """The kind of a layer; None where a token costs it nothing to speak of.

    That is a lookup in an embedding that isn't the head too, and what belongs to a tower.
    """
    if (layer.kind == "embedding" and layer.reads < 1) or TOWER.search(layer.path):
        return None
    experts, rows, columns = layer.as_experts
    if layer.kind == "experts":
        active = max(1, round(layer.reads * experts))
        return LayerKind("experts", (experts, rows, columns), active, layer.dtype)
    kind = "multi-linear" if layer.kind == "multi-linear" else "linear"
    return LayerKind(kind, (experts, rows, columns), experts, layer.dtype)


def model_key(inventory: Inventory) -> str:
    """What names a model in a table: its layers and other tensors, however they are quantized."""
    digest = hashlib.blake2b(digest_size=8)
    towers = set(inventory.carried)
    for layer in inventory.layers:
        if not TOWER.search(layer.path):
            digest.update(f"{layer.path} {layer.shape} {layer.dtype} {layer.reads}\n".encode())
    for owner in sorted(inventory.others):
        if owner not in towers:
            for spec in inventory.others[owner]:
                digest.update(f"{spec.name} {spec.shape} {spec.dtype}\n".encode())
    return digest.hexdigest()


def layer_seconds(table: SpeedTable, layer: Layer, config: QuantConfig, batch: int = 1) -> float:
    """Seconds of a layer under a configuration.

    Raises:
        MintError: the table doesn't know them.
    """
    kind = kind_of(layer)
    if kind is None:
        return 0.0
    if kind not in table.layers:
        raise MintError(
            f"the speed table of {table.machine} has no times for layers of {kind}, such as "
            f"{layer.path}: `mint-mlx speed MODEL --save FILE` on that machine makes one that has"
        )
    timing = table.layers[kind].get(config, {}).get(batch)
    if timing is None:
        raise MintError(
            f"the speed table of {table.machine} has no time for {layer.path} at {config}: it was "
            "not a candidate when the table was made, or MLX can't run it there"
        )
    return timing.seconds


def is_timed(table: SpeedTable, layer: Layer, config: QuantConfig) -> bool:
    """Whether a table knows what a layer costs under a configuration."""
    kind = kind_of(layer)
    return kind is None or 1 in table.layers.get(kind, {}).get(config, {})


def covers(table: SpeedTable, inventory: Inventory) -> bool:
    """Whether a table was made for this model."""
    kinds = {kind_of(layer) for layer in inventory.layers} - {None}
    return model_key(inventory) in table.rests and kinds <= table.layers.keys()


def rest_seconds(table: SpeedTable, inventory: Inventory, context: int) -> float:
    """Seconds of all that isn't a layer.

    Raises:
        MintError: the table knows other models only.
    """
    rest = table.rests.get(model_key(inventory))
    if rest is None:
        names = ", ".join(sorted({other.name for other in table.rests.values()}))
        raise MintError(
            f"the speed table of {table.machine} is of other models ({names}): `mint-mlx speed "
            "MODEL --save FILE` on that machine makes one of this model"
        )
    return rest.at(context)


def decode_seconds(
    table: SpeedTable, inventory: Inventory, choice: Mapping[str, QuantConfig], context: int
) -> float:
    """Seconds of decoding one token: the layers' and the rest.

    Raises:
        MintError: the table lacks one of them.
    """
    layers = sum(layer_seconds(table, layer, choice[layer.path]) for layer in inventory.layers)
    return layers + rest_seconds(table, inventory, context)


def predict(
    table: SpeedTable, inventory: Inventory, choice: Mapping[str, QuantConfig], context: int
) -> Speed:
    """How fast a choice decodes.

    Raises:
        MintError: the table lacks a time.
    """
    return speed_of(table, 1 / decode_seconds(table, inventory, choice, context), context)


def prompt_speed(
    table: SpeedTable, inventory: Inventory, choice: Mapping[str, QuantConfig]
) -> float | None:
    """Tokens per second at which the layers of blocks read a prompt; None where that isn't known.

    Heads are left out: they see the last token alone.
    """
    layers = [layer for layer in inventory.layers if layer.block is not None]
    try:
        seconds = sum(layer_seconds(table, layer, choice[layer.path], PROMPT) for layer in layers)
    except MintError:
        return None
    return PROMPT / seconds if seconds else None


def speed_of(table: SpeedTable, tokens_per_second: float, context: int) -> Speed:
    """A speed with the table's band."""
    low, high = (factor * tokens_per_second for factor in table.band)
    return Speed(tokens_per_second, (low, high), context, table.machine, table.estimated)


def merged(first: SpeedTable, second: SpeedTable) -> SpeedTable:
    """Two tables of one machine as one, by the first's clock; of what both have the second counts.

    Raises:
        MintError: they are of different machines or versions.
    """
    if (first.machine, first.versions) != (second.machine, second.versions):
        raise MintError(
            f"speed tables of different machines or versions ({first.machine}, {second.machine}) "
            "can't be joined"
        )
    second = times_scaled(second, first.clock / second.clock if second.clock else 1.0)
    layers = {
        kind: {
            config: {
                **first.layers.get(kind, {}).get(config, {}),
                **second.layers.get(kind, {}).get(config, {}),
            }
            for config in {**first.layers.get(kind, {}), **second.layers.get(kind, {})}
        }
        for kind in {**first.layers, **second.layers}
    }
    rests = {**first.rests, **second.rests}
    return replace(first, layers=layers, rests=rests)


def times_scaled(table: SpeedTable, factor: float) -> SpeedTable:
    """A table whose times are so many times as long."""
    layers = {
        kind: {
            config: {
                batch: Timing(factor * timing.seconds, timing.spread)
                for batch, timing in batches.items()
            }
            for config, batches in times.items()
        }
        for kind, times in table.layers.items()
    }
    rests = {
        key: replace(rest, seconds={c: factor * s for c, s in rest.seconds.items()})
        for key, rest in table.rests.items()
    }
    return replace(table, layers=layers, rests=rests, clock=factor * table.clock)
