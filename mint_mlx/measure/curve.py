"""A layer's curve: the error that each candidate configuration makes in its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..base import schema
from ..base.errors import MintError
from ..base.quant_config import QuantConfig, parse_config
from ..checkpoint.layers import Layer

INFINITE = 1e100  # the NMSE of a configuration that makes weights infinite
ERROR_FLOOR = 1e-12  # an NMSE of zero has no SQNR


@dataclass(frozen=True)
class RateDistortion:
    """Errors of one layer.

    Attributes:
        path: the layer.
        configs: the candidates measured.
        nmse: float64 (candidates, experts); one column for a layer without experts.
        energy: float64 (experts,), the sum of squares of the weights.
        share: of the weights that were measured.
        error: the largest relative standard error of an NMSE; 0 where all weights were measured.
        grids: that the weights lie on already (grid.py).
        grid_nmse: float64 (experts,) by candidate that can store a grid: the NMSE of its codes,
            which take the place of those of `mx.quantize`.
        weighted: as `nmse`, with squares times the weights of their columns (column_weights.py);
            None where columns have none, or the profile is older than they are.
    """

    path: str
    configs: tuple[QuantConfig, ...]
    nmse: np.ndarray
    energy: np.ndarray
    share: float = 1.0
    error: float = 0.0
    grids: tuple[QuantConfig, ...] = ()
    grid_nmse: Mapping[QuantConfig, np.ndarray] = field(default_factory=dict)
    weighted: np.ndarray | None = None

    def of(self, config: QuantConfig, weighted: bool = False) -> np.ndarray:
        """NMSE of each expert under a configuration, shape (experts,); zero for `keep`.

        Args:
            config: the configuration.
            weighted: with weights of the columns, where there are any.

        Raises:
            MintError: the configuration was not measured.
        """
        if not config.quantized:
            return np.zeros(self.nmse.shape[1])
        if config not in self.configs:
            raise MintError(
                f"{self.path} was not profiled at {config}: run `mint-mlx profile` again"
            )
        if config in self.grid_nmse:
            return self.grid_nmse[config]
        errors = self.weighted if weighted and self.weighted is not None else self.nmse
        return np.asarray(errors[self.configs.index(config)])


def sqnr_db(nmse: float) -> float:
    """Signal to quantization noise ratio in dB."""
    return float(-10 * np.log10(max(nmse, ERROR_FLOOR)))


def curve_to_json(curve: RateDistortion) -> dict[str, Any]:
    """A curve as plain data, without its path."""
    data: dict[str, Any] = {
        "share": curve.share,
        "error": curve.error,
        "energy": curve.energy.tolist(),
        "nmse": _by_config(curve.configs, curve.nmse),
    }
    if curve.weighted is not None:
        data["weighted"] = _by_config(curve.configs, curve.weighted)
    if curve.grids:
        data["grids"] = [str(grid) for grid in curve.grids]
        data["grid_nmse"] = {str(c): row.tolist() for c, row in curve.grid_nmse.items()}
    return data


def _by_config(configs: tuple[QuantConfig, ...], errors: np.ndarray) -> dict[str, list[float]]:
    return {str(c): row.tolist() for c, row in zip(configs, errors, strict=True)}


def curve_from_json(path: str, data: dict[str, Any]) -> RateDistortion:
    """The curve of a layer from `curve_to_json`'s data.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OverflowError, UsageError: the data is
            damaged.
    """
    energy = _numbers(data["energy"])
    schema.check_array(energy, schema.FLOAT, (None,), 0, INFINITE)
    configs = tuple(parse_config(c) for c in data["nmse"])
    shape = (len(configs), len(energy))
    nmse = np.array([_numbers(row) for row in data["nmse"].values()])
    weighted = None
    if "weighted" in data:
        rows = [_numbers(data["weighted"][str(config)]) for config in configs]
        weighted = np.array(rows).reshape(shape)
    grid_nmse = {
        parse_config(c): _numbers(row).reshape(len(energy))
        for c, row in data.get("grid_nmse", {}).items()
    }
    return RateDistortion(
        path=path,
        configs=configs,
        nmse=nmse.reshape(shape),
        energy=energy,
        share=schema.number(data["share"], 0, 1),
        error=schema.number(data["error"], 0, INFINITE),
        grids=tuple(parse_config(grid) for grid in data.get("grids", ())),
        grid_nmse=grid_nmse,
        weighted=weighted,
    )


def _numbers(values: Any) -> np.ndarray:
    """Finite numbers of zero or more, float64 (n,), from a list of them (else a ValueError)."""
    if not isinstance(values, list):
        raise ValueError("a list of numbers is missing")
    return np.array([schema.number(value, 0) for value in values])


def check_curve(curve: RateDistortion, layer: Layer) -> None:
    """Hold a curve that was read against its layer.

    Raises:
        ValueError: it has another number of experts, or errors that no quantizer makes.
    """
    # A layer that nothing is measured of has one column.
    experts = layer.as_experts[0] if curve.configs else 1
    if len(curve.energy) != experts or len(set(curve.configs)) != len(curve.configs):
        raise ValueError(f"{layer.path} has another number of experts")
    schema.check_array(curve.nmse, schema.FLOAT, (len(curve.configs), experts), 0, INFINITE)
    if curve.weighted is not None:
        schema.check_array(curve.weighted, schema.FLOAT, curve.nmse.shape, 0, INFINITE)
    if not curve.grid_nmse.keys() <= set(curve.configs):
        raise ValueError(f"{layer.path} has grids of other configurations")
