"""Rate-distortion of every layer: the error that each candidate configuration makes, measured on
the weights alone.

The error is that of MLX's own quantizer (distortion.py), of all rows or of a sample (sample.py):

    NMSE = ||W - Q(W)||^2 / ||W||^2        SQNR = -10 log10(NMSE) dB        NRMSE = sqrt(NMSE)

kept for every expert (or head) of a layer, so that the mean and the worst are both there. A profile
is made once and serves every budget.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..base.distributed import ranks
from ..base.errors import NOT_FINITE, MintError
from ..base.quant_config import QuantConfig, parse_config
from ..base.report import Progress
from ..checkpoint.layers import Inventory, Layer
from ..checkpoint.low_disk import Waves, at_once
from ..checkpoint.origin import Origin
from ..checkpoint.source import Source
from ..rules.recipes import Recipe
from .distortion import as_experts
from .resume import append_curve, read_curves
from .row_sampling import SEED, Read, measure_sample
from .sample import EXACT

ERROR_FLOOR = 1e-12


@dataclass(frozen=True)
class RateDistortion:
    """Errors of one layer.

    Attributes:
        path: the layer.
        configs: the candidates measured.
        nmse: float64 (candidates, experts); one column for a layer without experts.
        energy: float64 (experts,), the sum of squares of the weights.
        share: of the weights that were measured.
        error: the largest relative standard error of an NMSE; 0 where all were.
    """

    path: str
    configs: tuple[QuantConfig, ...]
    nmse: np.ndarray
    energy: np.ndarray
    share: float = 1.0
    error: float = 0.0

    def of(self, config: QuantConfig) -> np.ndarray:
        """NMSE of each expert under a configuration, shape (experts,); zero for `keep`.

        Raises:
            MintError: the configuration was not measured.
        """
        if not config.quantized:
            return np.zeros(self.nmse.shape[1])
        if config not in self.configs:
            raise MintError(
                f"{self.path} was not profiled at {config}: run `mint-mlx profile` again"
            )
        return np.asarray(self.nmse[self.configs.index(config)])


def sqnr_db(nmse: float) -> float:
    """Signal to quantization noise ratio in dB."""
    return float(-10 * np.log10(max(nmse, ERROR_FLOOR)))


@dataclass(frozen=True)
class Profile:
    """All layers' curves, with the inventory that they belong to (so that a profile can be planned
    on alone).
    """

    origin: Origin
    inventory: Inventory
    curves: dict[str, RateDistortion]
    recipe: Recipe
    quantizer: str = "rtn"
    weighting: str = "none"
    sample: str = EXACT
    seed: int = SEED
    versions: dict[str, str] | None = None

    @property
    def sampled(self) -> str:
        """What it was measured on, in words; empty where that is every weight."""
        if all(curve.share == 1 for curve in self.curves.values()):
            return ""
        share = sum(layer.size * self.curves[layer.path].share for layer in self.inventory.layers)
        share /= sum(layer.size for layer in self.inventory.layers)
        worst = max(curve.error for curve in self.curves.values())
        return f", measured on {share:.2%} of the weights (standard errors up to {worst:.2%})"


def profile(
    source: Source,
    inventory: Inventory,
    candidates: dict[str, tuple[QuantConfig, ...]],
    recipe: Recipe,
    progress: Progress = lambda *_: None,
    sample: str = EXACT,
    allow_nonfinite: bool = False,
    waves: Waves = at_once,
    place: Path | None = None,
) -> Profile:
    """Measure every layer's candidates, one layer in memory at a time; of several ranks each does
    its share.

    Args:
        source: a checkpoint whose weights are here.
        inventory: its layers.
        candidates: configurations to measure, by layer path (`keep` needs no measuring).
        recipe: the recipe that the candidates come from; the profile carries it along.
        progress: called with (layer, done, total) before each layer.
        sample: how much of each layer is measured (sample.parse_sample).
        allow_nonfinite: leave rows with NaN or infinite weights out in place of refusing them.
        waves: hands layers over as their shards come (lowdisk.py).
        place: beside which each finished layer is noted, so that an interrupted run goes on after
            it.

    Raises:
        MintError: weights aren't finite.
    """
    import mlx.core as mx

    from ..base.versions import versions

    wanted = {p: tuple(c for c in configs if c.quantized) for p, configs in candidates.items()}
    layers = {layer.path: layer for layer in inventory.layers}
    curves = {
        p: RateDistortion(p, (), np.zeros((0, 1)), np.ones(1)) for p in layers if not wanted.get(p)
    }
    todo = [layers[p] for p in inventory.order if wanted.get(p)]
    earlier = read_curves(place) if place is not None else {}
    curves |= {
        layer.path: _curve_from_json(layer.path, earlier[layer.path])
        for layer in todo
        if layer.path in earlier
    }
    mine = ranks().share({layer.path: layer.size for layer in todo})
    by_path = {
        layer.path: layer for layer in todo if layer.path in mine and layer.path not in curves
    }
    reads = (
        pair
        for paths in waves(list(by_path))
        for pair in _readers(
            source, inventory, [by_path[path] for path in paths], sample, allow_nonfinite
        )
    )
    skipped = len(mine) - len(by_path)
    for done, (layer, read) in enumerate(reads, start=skipped):
        progress(layer.path, done, len(mine))
        curves[layer.path] = _measure(layer, read, wanted[layer.path], sample, allow_nonfinite)
        if place is not None:
            append_curve(place, layer.path, _curve_to_json(curves[layer.path]))
        del read  # it may hold the whole layer
        mx.clear_cache()
    progress("", len(mine), len(mine))
    if ranks().size > 1:
        own = {path: _curve_to_json(curves[path]) for path in mine}
        for found in ranks().gather(own):
            curves |= {path: _curve_from_json(path, data) for path, data in found.items()}
    return Profile(
        source.origin,
        inventory,
        {p: curves[p] for p in layers},
        recipe,
        sample=sample,
        versions=versions(),
    )


def _readers(
    source: Source,
    inventory: Inventory,
    layers: Sequence[Layer],
    sample: str,
    allow_nonfinite: bool,
) -> Iterator[tuple[Layer, Read]]:
    """Each layer with what reads rows of it: from the disk where that can be done, else from the
    whole layer.
    """
    from ..checkpoint.arrays import dense
    from ..checkpoint.layer_stream import stream
    from ..checkpoint.row_reader import select_rows, straight_layers

    straight = straight_layers(source, layers) if sample != EXACT else {}
    for layer in layers:
        place = straight.get(layer.path)
        if place is not None:
            yield layer, partial(place.read, source, layer)
    by_path = {layer.path: layer for layer in layers}
    others = [layer.path for layer in layers if layer.path not in straight]
    for path, tensors in stream(source, inventory, others, allow_nonfinite):
        weight = as_experts(dense(by_path[path], tensors))
        del tensors
        yield by_path[path], partial(select_rows, weight)
        del weight


def _measure(
    layer: Layer, read: Read, configs: tuple[QuantConfig, ...], sample: str, allow_nonfinite: bool
) -> RateDistortion:
    """One layer's curve. Its draws depend on the seed and its name alone."""
    rng = np.random.default_rng([SEED, zlib.crc32(layer.path.encode())])
    others = [c for c in configs if c != layer.stored]
    found = measure_sample(read, layer.as_experts, others, sample if others else EXACT, rng)
    if found.broken and not allow_nonfinite:
        raise MintError(f"{layer.path}.weight {NOT_FINITE}")
    nmse = found.nmse
    if layer.stored in configs:  # kept as it is, a layer loses nothing
        nmse = np.insert(nmse, configs.index(layer.stored), 0.0, axis=0)
    energy = _as_in_file(found.energy[None])[0]
    share, error = (float(f"{x:.4g}") for x in (found.share, found.error))
    return RateDistortion(layer.path, configs, _as_in_file(nmse), energy, share, error)


def _as_in_file(nmse: np.ndarray) -> np.ndarray:
    """Six digits, as in files, so that a fresh profile and a cached one give the same plan."""
    return np.array([[float(f"{e:.6g}") for e in row] for row in nmse])


def assumed(
    inventory: Inventory, candidates: dict[str, tuple[QuantConfig, ...]]
) -> dict[str, RateDistortion]:
    """Curves of Gaussian weights, for a first table before any weight is read.

    SQNR of `mx.quantize` on normal weights grows by about 6 dB a bit and falls by 0.7 to 1 dB with
    each doubling of the group; 4bit-g64 has 20.8 dB (measured).
    """
    curves = {}
    for layer in inventory.layers:
        configs = tuple(c for c in candidates[layer.path] if c.quantized)
        db = [6.0 * c.bits - 3.2 - 0.9 * np.log2(c.group_size / 64) for c in configs]
        nmse = [
            0.0 if c == layer.stored else 10 ** (-x / 10) for c, x in zip(configs, db, strict=True)
        ]
        curves[layer.path] = RateDistortion(
            layer.path, configs, np.array(nmse).reshape(-1, 1), np.ones(1)
        )
    return curves


def _curve_to_json(curve: RateDistortion) -> dict[str, Any]:
    errors = {str(c): row.tolist() for c, row in zip(curve.configs, curve.nmse, strict=True)}
    return {
        "share": curve.share,
        "error": curve.error,
        "energy": curve.energy.tolist(),
        "nmse": errors,
    }


def _curve_from_json(path: str, data: dict[str, Any]) -> RateDistortion:
    energy, configs = (
        np.array(data["energy"], dtype=np.float64),
        tuple(parse_config(c) for c in data["nmse"]),
    )
    nmse = np.array(list(data["nmse"].values()), dtype=np.float64).reshape(
        len(configs), len(energy)
    )
    return RateDistortion(path, configs, nmse, energy, float(data["share"]), float(data["error"]))
