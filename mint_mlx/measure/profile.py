"""Profiles: the error that each candidate configuration makes in every layer's weights.

The error is that of MLX's own quantizer (distortion.py), on all rows or a sample (row_sampling.py):

    NMSE = ||W - Q(W)||^2 / ||W||^2        SQNR = -10 log10(NMSE) dB        NRMSE = sqrt(NMSE)

It is stored for every expert (or head) of a layer, so that the mean and the worst are both known,
and once more with weights for the columns where the file says how large their inputs are
(column_weights.py). A profile is made once and serves every budget.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..base.checksum import warn
from ..base.distributed import ranks
from ..base.errors import NOT_FINITE, MintError, UsageError
from ..base.quant_config import QuantConfig
from ..base.report import Progress
from ..checkpoint.arrays import dense
from ..checkpoint.layer_stream import stream
from ..checkpoint.layers import Inventory, Layer
from ..checkpoint.low_disk import Waves, at_once
from ..checkpoint.origin import Origin
from ..checkpoint.row_reader import select_rows, straight_layers
from ..checkpoint.source import Source
from ..rules.recipes import Recipe
from .column_weights import column_weights
from .curve import INFINITE, RateDistortion, check_curve, curve_from_json, curve_to_json
from .distortion import as_experts
from .grid import find_grids, grid_for, sample_rows
from .grid_fit import grid_errors
from .resume import append_curve, read_curves
from .row_sampling import SEED, Read, measure_sample
from .sample import EXACT
from .trained_rows import of_trained_rows

TABLES = ("embedding", "head")  # whose rows are tokens


@dataclass(frozen=True)
class Profile:
    """All layers' curves, with the inventory that they belong to: a plan needs nothing else.

    Attributes:
        origin: the weights that were measured.
        inventory: the model's layers.
        curves: by layer path.
        recipe: from which the candidates come.
        quantizer: whose errors these are.
        weighting: of the errors of single weights.
        sample: how much of each layer was measured (sample.parse_sample).
        seed: of the draws.
        versions: of the packages that it was made with.
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
        """How much was measured, as the end of a sentence; empty where that is every weight."""
        if all(curve.share == 1 for curve in self.curves.values()):
            return ""
        share = sum(layer.size * self.curves[layer.path].share for layer in self.inventory.layers)
        share /= sum(layer.size for layer in self.inventory.layers)
        worst = max(curve.error for curve in self.curves.values())
        return f", measured on {share:.2%} of the weights (standard errors up to {worst:.2%})"


def without_grids(profile: Profile) -> Profile:
    """A profile with the errors of `mx.quantize` alone."""
    curves = {
        path: replace(curve, grids=(), grid_nmse={}) for path, curve in profile.curves.items()
    }
    return replace(profile, curves=curves)


def measure_curves(
    source: Source,
    inventory: Inventory,
    candidates: Mapping[str, Sequence[QuantConfig]],
    sample: str = EXACT,
    allow_nonfinite: bool = False,
    waves: Waves = at_once,
    target: Path | None = None,
    progress: Progress = lambda *_: None,
) -> dict[str, RateDistortion]:
    """Measure every layer's candidates, one layer in memory at a time.

    Each of several ranks measures its share.

    Args:
        source: a checkpoint whose weights are on this machine, or come in waves.
        inventory: its layers.
        candidates: configurations to measure, by layer path (`keep` needs no measuring).
        sample: how much of each layer is measured (sample.parse_sample).
        allow_nonfinite: leave out rows with NaN or infinite weights instead of refusing them.
        waves: hands layers over as their shards come (low_disk.py).
        target: the profile's file; each finished layer is noted beside it (resume.py), and an
            interrupted run resumes from these notes.
        progress: called with (layer, done, total) before each layer.

    Raises:
        MintError: weights aren't finite.
    """
    wanted = {p: tuple(c for c in configs if c.quantized) for p, configs in candidates.items()}
    layers = {layer.path: layer for layer in inventory.layers}
    curves = {
        p: RateDistortion(p, (), np.zeros((0, 1)), np.ones(1)) for p in layers if not wanted.get(p)
    }

    # What an interrupted run has measured isn't measured again.
    todo = [layers[p] for p in inventory.order if wanted.get(p)]
    noted = read_curves(target) if target is not None else {}
    for layer in todo:
        curve = _noted_curve(source, layer, wanted[layer.path], noted.get(layer.path))
        if curve is not None:
            curves[layer.path] = curve

    # The share depends on the layers alone, so that all ranks agree on it whatever they have noted.
    share = ranks().share({layer.path: layer.size for layer in todo})
    unmeasured = {
        layer.path: layer for layer in todo if layer.path in share and layer.path not in curves
    }
    done = len(share) - len(unmeasured)
    weights = column_weights(source, inventory) if unmeasured else {}
    for paths in waves(list(unmeasured)):
        wave = [unmeasured[path] for path in paths]
        for layer, read in _readers(source, inventory, wave, sample, allow_nonfinite):
            progress(layer.path, done, len(share))
            curve = _measure(
                layer, read, wanted[layer.path], sample, allow_nonfinite, weights.get(layer.path)
            )
            curves[layer.path] = curve
            if target is not None:
                append_curve(target, layer.path, curve_to_json(curve) | {"of": source.identity})
            done += 1
            del read  # it may hold the whole layer
            mx.clear_cache()
    progress("", len(share), len(share))

    if ranks().size > 1:
        for measured in ranks().gather({path: curve_to_json(curves[path]) for path in share}):
            curves |= {path: curve_from_json(path, data) for path, data in measured.items()}
    return {path: curves[path] for path in layers}


def _noted_curve(
    source: Source, layer: Layer, configs: tuple[QuantConfig, ...], data: Any
) -> RateDistortion | None:
    """A layer's curve from the notes of an interrupted run; None where they hold none of use.

    Args:
        source: the checkpoint as it is now.
        layer: the layer.
        configs: that it must have been measured at.
        data: the notes of it, or None.
    """
    if data is None or data.get("of", source.identity) != source.identity:
        return None
    try:
        curve = curve_from_json(layer.path, data)
        check_curve(curve, layer)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, UsageError):
        warn(f"the notes of an interrupted profile are damaged: {layer.path} is measured anew")
        return None
    return curve if curve.configs == configs else None


def _readers(
    source: Source,
    inventory: Inventory,
    layers: Sequence[Layer],
    sample: str,
    allow_nonfinite: bool,
) -> Iterator[tuple[Layer, Read]]:
    """Each layer with a function that reads its rows.

    Rows of a sample are read from the disk where the layer can be read by rows; all others from the
    whole layer in memory.
    """
    straight = straight_layers(source, layers) if sample != EXACT else {}
    for layer in layers:
        rows = straight.get(layer.path)
        if rows is not None:
            yield layer, partial(rows.read, source, layer)

    by_path = {layer.path: layer for layer in layers}
    others = [layer.path for layer in layers if layer.path not in straight]
    for path, tensors in stream(source, inventory, others, allow_nonfinite):
        weight = as_experts(dense(by_path[path], tensors))
        del tensors
        yield by_path[path], partial(select_rows, weight)
        del weight


def _measure(
    layer: Layer,
    read: Read,
    configs: tuple[QuantConfig, ...],
    sample: str,
    allow_nonfinite: bool,
    columns: np.ndarray | None,
) -> RateDistortion:
    """One layer's curve. The rows that are drawn depend only on the seed and the layer's name."""
    rng = np.random.default_rng([SEED, zlib.crc32(layer.path.encode())])
    others = [c for c in configs if c != layer.stored]
    drawn = of_trained_rows(read) if layer.role in TABLES else read
    measured = measure_sample(
        drawn, layer.as_experts, others, sample if others else EXACT, rng, columns
    )
    if measured.broken and not allow_nonfinite:
        raise MintError(f"{layer.path}.weight {NOT_FINITE}")

    # In the configuration that the source holds it in, a layer loses nothing.
    # (JSON has no infinity, which some modes make of weights near the smallest numbers.)
    def errors(measured: np.ndarray) -> np.ndarray:
        nmse = np.nan_to_num(measured, nan=INFINITE, posinf=INFINITE)
        if layer.stored in configs:
            nmse = np.insert(nmse, configs.index(layer.stored), 0.0, axis=0)
        return _round_as_in_file(nmse)

    grids, grid_nmse = _measure_grids(layer, read, others, measured.share == 1)
    return RateDistortion(
        path=layer.path,
        configs=configs,
        nmse=errors(measured.nmse),
        energy=_round_as_in_file(measured.energy[None])[0],
        share=float(f"{measured.share:.4g}"),
        error=float(f"{measured.error:.4g}"),
        grids=grids,
        grid_nmse=grid_nmse,
        weighted=None if measured.weighted is None else errors(measured.weighted),
    )


def _measure_grids(
    layer: Layer, read: Read, configs: Sequence[QuantConfig], whole: bool
) -> tuple[tuple[QuantConfig, ...], dict[QuantConfig, np.ndarray]]:
    """The grids that a layer lies on, and the NMSE of each candidate that can store one.

    Args:
        layer: as the source holds it; one that is quantized there keeps its codes anyway.
        read: reads its rows.
        configs: the candidates.
        whole: measure all rows, not only some.
    """
    shape = layer.as_experts
    grids = find_grids(read, shape) if layer.stored is None else ()
    stored = [config for config in configs if grid_for(grids, config)]
    if not stored:
        return grids, {}

    experts, rows, _ = shape
    chosen = np.arange(rows) if whole else sample_rows(shape)
    weights = read(np.arange(experts), np.tile(chosen, (experts, 1)))
    errors, energy = grid_errors(weights, grids, stored)
    nmse = _round_as_in_file(errors / np.where(energy > 0, energy, 1))
    return grids, dict(zip(stored, nmse, strict=True))


def _round_as_in_file(values: np.ndarray) -> np.ndarray:
    """Six digits, as in files, so that a fresh profile and a cached one give the same plan."""
    return np.array([[float(f"{value:.6g}") for value in row] for row in values])


def assumed(
    inventory: Inventory, candidates: Mapping[str, Sequence[QuantConfig]]
) -> dict[str, RateDistortion]:
    """Curves of Gaussian weights, for a first table before any weight is read.

    SQNR of `mx.quantize` on normal weights grows by about 6 dB a bit and falls by 0.7 to 1 dB with
    each doubling of the group; 4bit-g64 has 20.8 dB (measured).
    """
    curves = {}
    for layer in inventory.layers:
        configs = tuple(c for c in candidates[layer.path] if c.quantized)
        nmse = []
        for config in configs:
            sqnr = 6.0 * config.bits - 3.2 - 0.9 * np.log2(config.group_size / 64)
            nmse.append(0.0 if config == layer.stored else 10 ** (-sqnr / 10))
        curves[layer.path] = RateDistortion(
            layer.path, configs, np.array(nmse).reshape(-1, 1), np.ones(1)
        )
    return curves
