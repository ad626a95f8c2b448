"""Rate-distortion of every layer: the error that each candidate configuration makes, measured on the weights alone.

The error is that of `mx.quantize` and `mx.dequantize` themselves, since the code differs from its own documentation:

    NMSE = ||W - Q(W)||^2 / ||W||^2        SQNR = -10 log10(NMSE) dB        NRMSE = sqrt(NMSE)

kept for every expert (or head) of a layer, so that the mean and the worst are both there. A profile is made once and
serves every budget.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import MintError, UsageError
from .files import write_whole
from .headers import ITEMSIZE
from .layers import Inventory, Layer
from .layout import TensorSpec
from .load import Source
from .quant import QuantConfig, parse_config
from .recipes import Recipe

SCHEMA = 2
CHUNK = 1 << 22  # weights measured at once: small enough for the CPU's cache, large enough for the GPU
ERROR_FLOOR = 1e-12


@dataclass(frozen=True)
class RateDistortion:
    """Errors of one layer.

    Attributes:
        path: the layer.
        configs: the candidates measured.
        nmse: float64 (candidates, experts); one column for a layer without experts.
        energy: float64 (experts,), the sum of squares of the weights.
    """

    path: str
    configs: tuple[QuantConfig, ...]
    nmse: np.ndarray
    energy: np.ndarray

    def of(self, config: QuantConfig) -> np.ndarray:
        """NMSE of each expert under a configuration, shape (experts,); zero for `keep`.

        Raises:
            MintError: the configuration was not measured.
        """
        if not config.quantized:
            return np.zeros(self.nmse.shape[1])
        if config not in self.configs:
            raise MintError(f"{self.path} was not profiled at {config}: run `mint-mlx profile` again")
        return np.asarray(self.nmse[self.configs.index(config)])


def sqnr_db(nmse: float) -> float:
    """Signal to quantization noise ratio in dB."""
    return float(-10 * np.log10(max(nmse, ERROR_FLOOR)))


@dataclass(frozen=True)
class Profile:
    """All layers' curves, with the inventory that they belong to (so that a profile can be planned on alone)."""

    source: str
    revision: str | None
    structure: str
    content: str
    inventory: Inventory
    curves: dict[str, RateDistortion]
    recipe: Recipe
    quantizer: str = "rtn"
    weighting: str = "none"
    versions: dict[str, str] | None = None

    @property
    def fingerprint(self) -> str:
        return f"{self.structure}-{self.content}"


Progress = Callable[[str, int, int], None]


def profile(
    source: Source,
    inventory: Inventory,
    candidates: dict[str, tuple[QuantConfig, ...]],
    recipe: Recipe,
    progress: Progress = lambda *_: None,
) -> Profile:
    """Measure every layer's candidates, one layer in memory at a time.

    Args:
        source: a checkpoint whose weights are here.
        inventory: its layers.
        candidates: configurations to measure, by layer path (`keep` needs no measuring).
        recipe: the recipe that the candidates come from; the profile carries it along.
        progress: called with (layer, done, total) before each layer.
    """
    from .stream import dense, stream
    from .versions import versions

    wanted = {p: tuple(c for c in configs if c.quantized) for p, configs in candidates.items()}
    layers = {layer.path: layer for layer in inventory.layers}
    paths = [p for p in inventory.order if wanted.get(p)]
    curves = {p: RateDistortion(p, (), np.zeros((0, 1)), np.ones(1)) for p in layers if not wanted.get(p)}
    if paths:
        progress(paths[0], 0, len(paths))
    for done, (path, tensors) in enumerate(stream(source, inventory, paths), start=1):
        layer, configs = layers[path], wanted[path]
        nmse, energy = measure(dense(layer, tensors), [c for c in configs if c != layer.stored])
        if layer.stored in configs:  # kept as it is, a layer loses nothing
            nmse = np.insert(nmse, configs.index(layer.stored), 0.0, axis=0)
        curves[path] = RateDistortion(path, configs, _as_in_file(nmse), _as_in_file(energy[None])[0])
        progress(paths[min(done, len(paths) - 1)], done, len(paths))
    return Profile(
        source.name,
        source.revision,
        source.structure,
        source.content,
        inventory,
        {p: curves[p] for p in layers},
        recipe,
        versions=versions(),
    )


def measure(weight: Any, configs: Sequence[QuantConfig]) -> tuple[np.ndarray, np.ndarray]:
    """NMSE of each configuration for each expert of one layer, and each expert's sum of squares.

    Args:
        weight: mx.array (..., rows, columns) in the type it will be quantized in; leading axes are experts or heads.
        configs: quantized configurations whose groups divide the last axis.

    Returns:
        float64 (configs, experts) and (experts,).
    """
    import mlx.core as mx

    *lead, rows, columns = weight.shape
    weight = weight.reshape(-1, rows, columns)
    experts = weight.shape[0] if lead else 1
    errors, energy = np.zeros((len(configs), experts)), np.zeros(experts)
    for chosen, part in _chunks(experts, rows, columns):
        w = weight[chosen, part]
        exact = w.astype(mx.float32)
        results = [_squares(exact)]
        for config in configs:
            packed = mx.quantize(w, config.group_size, config.bits, mode=config.mode)
            restored = mx.dequantize(*packed, group_size=config.group_size, bits=config.bits, mode=config.mode)
            results.append(_squares(exact - restored.astype(mx.float32)))
        mx.eval(results)
        energy[chosen] += np.asarray(results[0], dtype=np.float64)
        for index, result in enumerate(results[1:]):
            errors[index, chosen] += np.asarray(result, dtype=np.float64)
    # An expert of zeros is restored exactly: its error is zero, not undefined.
    return errors / np.where(energy > 0, energy, 1), energy


def _as_in_file(nmse: np.ndarray) -> np.ndarray:
    """Six digits, as files keep them, so that a fresh profile and a cached one give the same plan."""
    return np.array([[float(f"{e:.6g}") for e in row] for row in nmse])


def _squares(x: Any) -> Any:
    """Sum of squares per expert of a float32 (experts, rows, columns), rows first to keep float32 accurate."""
    import mlx.core as mx

    return mx.sum(mx.sum(mx.square(x), axis=-1), axis=-1)


def _chunks(experts: int, rows: int, columns: int) -> Iterable[tuple[slice, slice]]:
    """Slices over experts and rows that hold about CHUNK weights each."""
    per_expert = max(1, CHUNK // (rows * columns))
    per_row = rows if per_expert > 1 else max(1, CHUNK // columns)
    for e in range(0, experts, per_expert):
        for r in range(0, rows, per_row):
            yield slice(e, min(e + per_expert, experts)), slice(r, min(r + per_row, rows))


def assumed(inventory: Inventory, candidates: dict[str, tuple[QuantConfig, ...]]) -> dict[str, RateDistortion]:
    """Curves of Gaussian weights, for a first table before any weight is read.

    SQNR of `mx.quantize` on normal weights grows by about 6 dB a bit and falls by 0.7 to 1 dB with each doubling of the
    group; 4bit-g64 has 20.8 dB (measured).
    """
    curves = {}
    for layer in inventory.layers:
        configs = tuple(c for c in candidates[layer.path] if c.quantized)
        db = [6.0 * c.bits - 3.2 - 0.9 * np.log2(c.group_size / 64) for c in configs]
        nmse = [0.0 if c == layer.stored else 10 ** (-x / 10) for c, x in zip(configs, db, strict=True)]
        curves[layer.path] = RateDistortion(layer.path, configs, np.array(nmse).reshape(-1, 1), np.ones(1))
    return curves


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile as JSON, one layer a line; written whole or not at all."""
    head = {
        "mint_mlx_profile": SCHEMA,
        "source": profile.source,
        "revision": profile.revision,
        "structure": profile.structure,
        "content": profile.content,
        "recipe": profile.recipe.model_dump(),
        "quantizer": profile.quantizer,
        "weighting": profile.weighting,
        "versions": profile.versions,
        "order": profile.inventory.order,
        "carried": profile.inventory.carried,
        "others": {owner: [asdict(s) for s in specs] for owner, specs in profile.inventory.others.items()},
    }
    lines = []
    for layer in profile.inventory.layers:
        curve = profile.curves[layer.path]
        errors = {str(c): row.tolist() for c, row in zip(curve.configs, curve.nmse, strict=True)}
        lines.append(json.dumps({**_layer_to_json(layer), "energy": curve.energy.tolist(), "nmse": errors}))
    text = json.dumps(head, indent=None)[:-1] + ',\n"layers": [\n' + ",\n".join(lines) + "\n]}\n"
    write_whole(path, text)


def load_profile(path: Path | str) -> Profile:
    """Read a profile.

    Raises:
        MintError: the file is missing, not a profile, or of another version of this program.
    """
    path = Path(path)
    if not path.is_file():
        raise MintError(f"there is no profile {path}: make one with `mint-mlx profile MODEL -o {path}`")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or "mint_mlx_profile" not in data:
        raise MintError(f"{path} is not a profile: make one with `mint-mlx profile MODEL -o FILE`")
    if data["mint_mlx_profile"] != SCHEMA:
        raise MintError(f"{path} was made by another version of mint-mlx: make it anew with `mint-mlx profile`")
    try:
        layers, curves = [], {}
        for entry in data["layers"]:
            errors, energy = entry.pop("nmse"), np.array(entry.pop("energy"), dtype=np.float64)
            layer = _layer_from_json(entry)
            layers.append(layer)
            configs = tuple(parse_config(c) for c in errors)
            nmse = np.array(list(errors.values()), dtype=np.float64).reshape(len(configs), len(energy))
            curves[layer.path] = RateDistortion(layer.path, configs, nmse, energy)
        others = {owner: tuple(_spec(s) for s in specs) for owner, specs in data["others"].items()}
        inventory = Inventory(tuple(layers), others, tuple(data["order"]), tuple(data["carried"]))
        if set(inventory.order) != {layer.path for layer in layers} | others.keys():
            raise ValueError("the order names other modules")
        return Profile(
            data["source"],
            data["revision"],
            data["structure"],
            data["content"],
            inventory,
            curves,
            Recipe.model_validate(data["recipe"]),
            data["quantizer"],
            data["weighting"],
            data["versions"],
        )
    except (KeyError, TypeError, ValueError, AttributeError, UsageError):
        raise MintError(f"the profile {path} is damaged: make it anew with `mint-mlx profile`") from None


def _spec(data: dict[str, Any]) -> TensorSpec:
    return TensorSpec(str(data["name"]), _dtype(data["dtype"]), _shape(data["shape"]))


def _dtype(code: Any) -> str:
    if code not in ITEMSIZE:
        raise ValueError(f"no type is called {code!r}")
    return str(code)


def _shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{shape!r} is no shape")
    return tuple(shape)


def _layer_to_json(layer: Layer) -> dict[str, Any]:
    data = asdict(layer)
    data["class_config"] = str(layer.class_config) if layer.class_config else None
    data["stored"] = str(layer.stored) if layer.stored else None
    return data


def _layer_from_json(data: dict[str, Any]) -> Layer:
    data["shape"], data["dtype"] = _shape(data["shape"]), _dtype(data["dtype"])
    data["extras"] = tuple(_spec(s) for s in data["extras"])
    for key in ("class_config", "stored"):
        data[key] = parse_config(data[key]) if data[key] else None
    return Layer(**data)
