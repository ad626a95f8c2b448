"""The peers: which quantizers of others are built, with which parameters, for a budget."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..base.errors import MintError
from ..base.quant_config import AFFINE_BITS, AFFINE_GROUPS, KEEP, QuantConfig
from ..checkpoint.layers import Inventory
from ..checkpoint.layout import weight_tensors
from ..checkpoint.source import Source, open_model
from ..converters.sources.layouts import read_layout
from ..jobs.model import Job
from . import peer_gguf, peer_methods, peer_programs

UNIFORM = {f"uniform-g{group}": group for group in AFFINE_GROUPS}
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
OPTIQ = "optiq"  # calibrates on a text that it brings
NEAR = 0.55  # bits per weight around a budget in which fixed sizes are taken


@dataclass(frozen=True)
class Peer:
    """One peer at one size.

    Attributes:
        name: as in the table.
        sees_text: whether it sees the baseline text.
        build: writes the checkpoint into a folder.
        about: its parameters, for the table and the cache.
    """

    name: str
    sees_text: bool
    build: Callable[[Path], None]
    about: str


def refuse_quantized(job: Job) -> None:
    """Refuse a source that is quantized already.

    Raises:
        MintError: naming the first such layer.
    """
    stored = next((layer for layer in job.inventory.layers if layer.stored), None)
    if stored is not None:
        why = f"{stored.path} is {stored.stored}"
    elif read_layout(job.source.config, job.source.path):
        why = "config.json has a quantization_config"
    else:
        return
    raise MintError(
        f"{job.source.name} is quantized already ({why}), which mlx-lm's own methods don't "
        "take: give the original checkpoint in bf16, fp16 or fp32"
    )


def make_peers(
    name: str, source: Source, inventory: Inventory, budget: int, text: str | None
) -> list[Peer]:
    """A peer at its sizes near a budget: all fixed sizes within NEAR, or the nearest one.

    Args:
        name: a name of `peer_names()`.
        source: the unquantized checkpoint.
        inventory: its layers.
        budget: bytes aimed at.
        text: the baseline text, for those that calibrate.

    Raises:
        MintError: there is no such peer, or it needs a text.
    """
    margin = NEAR * inventory.parameters / 8  # bytes
    if name in UNIFORM:
        sizes = uniform_sizes(inventory, AFFINE_BITS, (UNIFORM[name],))
        near = [config for config, size in sizes.items() if abs(size - budget) <= margin]
        build = peer_methods.convert_uniform
        return [Peer(name, False, partial(build, source, c), str(c)) for c in near]

    if name in RECIPES:
        size = recipe_size(source, inventory, name)
        if size is not None and abs(size - budget) > margin:
            return []
        # Where mlx-lm has no such recipe for this model, building it says why, in a row.
        build_recipe = partial(peer_methods.convert_recipe, source, name)
        return [Peer(name, False, build_recipe, "g64")]

    if name in peer_gguf.TYPES:
        bits = peer_gguf.TYPES[name][1]
        if abs(bits - budget * 8 / inventory.parameters) > NEAR:
            return []
        about = peer_gguf.about(name, inventory)
        return [Peer(name, False, partial(peer_gguf.build, source, name), about)]

    if name == OPTIQ:
        build_optiq, about = _optiq(source, inventory, budget)
        return [Peer(name, True, build_optiq, about)]

    if name not in CALIBRATED:
        raise MintError(f"no peer is called {name!r}: there are {', '.join(peer_names())}")
    if text is None:
        raise MintError(
            f"{name} calibrates on a text: give one with --baseline-text (never the text that is "
            "scored)"
        )
    build_calibrated, about = CALIBRATED[name](source, inventory, budget, text)
    return [Peer(name, True, build_calibrated, about)]


def peer_names() -> tuple[str, ...]:
    """All names that `make_peers` takes."""
    return (*UNIFORM, *RECIPES, *peer_gguf.TYPES, OPTIQ, *CALIBRATED)


# Sizes


def uniform_sizes(
    inventory: Inventory, bits: Iterable[int], groups: Iterable[int] = AFFINE_GROUPS
) -> dict[QuantConfig, int]:
    """Bytes of all weights under each uniform configuration, roughly.

    Guards and file headers are left out.
    """
    paths = [layer.path for layer in inventory.layers]
    groups = tuple(groups)
    configs = [QuantConfig(b, group) for b in bits for group in groups]
    return {config: _size(inventory, dict.fromkeys(paths, config)) for config in configs}


def recipe_size(source: Source, inventory: Inventory, recipe: str) -> int | None:
    """Bytes of all weights under a recipe of mlx-lm, roughly; None where it has none for this."""
    from mlx_lm.convert import mixed_quant_predicate_builder

    model = open_model(source)
    try:
        predicate: Any = mixed_quant_predicate_builder(recipe, model)
    except ValueError:
        return None

    modules = dict(model.named_modules())
    choice: dict[str, QuantConfig] = {}
    for layer in inventory.layers:
        wanted = predicate(layer.path, modules[layer.path])
        choice[layer.path] = QuantConfig(wanted["bits"], wanted["group_size"]) if wanted else KEEP
    return _size(inventory, choice)


def nearest(sizes: dict[QuantConfig, int], budget: int) -> QuantConfig:
    """The configuration whose size comes closest to a budget."""
    return min(sizes, key=lambda config: (abs(sizes[config] - budget), config))


def _size(inventory: Inventory, choice: dict[str, QuantConfig]) -> int:
    """Bytes of all weights; a layer that its configuration doesn't fit stays as it is."""
    total = inventory.other_bytes
    for layer in inventory.layers:
        config = choice[layer.path]
        fits = config.divides(layer.shape[-1]) and not layer.keep
        specs = weight_tensors(layer.path, layer.shape, layer.dtype, config if fits else KEEP)
        total += sum(spec.nbytes for spec in specs)
    return total


# Peers that calibrate, each with what builds it for a budget and its parameters.

Build = Callable[[Path], None]


def _gptq(
    source: Source, inventory: Inventory, budget: int, text: str, guarded: bool = False
) -> tuple[Build, str]:
    """mlx-lm's GPTQ; guarded, its routers are never below 8 bits."""
    config = nearest(uniform_sizes(inventory, (2, 4, 8)), budget)
    routers = [layer.path for layer in inventory.layers if layer.role == "router"]
    guards = routers if guarded else []
    return partial(peer_methods.gptq, source, config, text, guards), str(config)


def _feedback(source: Source, inventory: Inventory, budget: int, text: str) -> tuple[Build, str]:
    config = nearest(uniform_sizes(inventory, AFFINE_BITS), budget)
    return partial(peer_methods.feedback, source, inventory, config, text), str(config)


def _awq(source: Source, inventory: Inventory, budget: int, text: str) -> tuple[Build, str]:
    config = nearest(uniform_sizes(inventory, AFFINE_BITS), budget)
    return partial(peer_methods.awq, source, config, text), str(config)


def _dwq(source: Source, inventory: Inventory, budget: int, text: str) -> tuple[Build, str]:
    config = nearest(uniform_sizes(inventory, (b for b in AFFINE_BITS if b < 8)), budget)
    about = f"{config}, up to {peer_methods.DWQ_PASSES} passes"
    return partial(peer_methods.dwq, source, config, text), about


def _dynamic_quant(
    source: Source, inventory: Inventory, budget: int, text: str
) -> tuple[Build, str]:
    """Two widths, of which the lower one with its scales leaves room under the budget."""
    target = budget * 8 / inventory.parameters
    low, high = _two_widths(target)
    about = f"{low} and {high} bits, g64, to {target:.4f} bpw"
    return partial(peer_methods.dynamic_quant, source, low, high, target, text), about


def _partial_sizes(
    inventory: Inventory, bits: Iterable[int], whole: Collection[str]
) -> dict[QuantConfig, int]:
    """Bytes of all weights where some stay as they are.

    Args:
        inventory: the layers.
        bits: of the configurations; their groups are those that fit all rows.
        whole: the roles of the layers that aren't quantized.
    """
    quantized = [layer for layer in inventory.layers if layer.role not in whole]
    groups = [g for g in AFFINE_GROUPS if all(layer.shape[-1] % g == 0 for layer in quantized)]
    sizes = {}
    for config in (QuantConfig(width, group) for width in bits for group in groups):
        parts = (layer.bytes(KEEP if layer.role in whole else config) for layer in inventory.layers)
        sizes[config] = inventory.other_bytes + sum(parts)
    return sizes


def _version(program: peer_programs.Program) -> str:
    """What follows the parameters: the version, where the program is installed."""
    version = peer_programs.installed_version(program)
    return f", {program.name} {version}" if version else ""


def _two_widths(target: float) -> tuple[int, int]:
    """The lower of two widths leaves room for its scales under a target in bits per weight."""
    low = max((bits for bits in AFFINE_BITS if bits + 0.7 <= target), default=2)
    return low, min(bits for bits in AFFINE_BITS if bits >= min(low + 2, 8))


def _optiq(source: Source, inventory: Inventory, budget: int) -> tuple[Build, str]:
    target = budget * 8 / inventory.parameters
    widths = _two_widths(target)
    about = f"{widths[0]} and {widths[1]} bits, to {target:.4f} bpw"
    return partial(peer_programs.optiq, source, widths, target), about + _version(
        peer_programs.OPTIQ
    )


def _auto_round(source: Source, inventory: Inventory, budget: int, text: str) -> tuple[Build, str]:
    """AutoRound at uniform bits, with embeddings, which it leaves alone, rounded to nearest."""
    config = nearest(_partial_sizes(inventory, AFFINE_BITS, {"router"}), budget)
    rounded = _rounded(inventory, config)
    build = partial(peer_programs.auto_round, source, config, None, rounded, text)
    about = f"{config}, {peer_programs.ITERATIONS} iterations"
    return build, about + _version(peer_programs.AUTO_ROUND)


def _auto_scheme(source: Source, inventory: Inventory, budget: int, text: str) -> tuple[Build, str]:
    """AutoRound at the average of bits that meets the budget, embeddings rounded to 4 bits.

    It counts zero points of as many bits as the codes, of which MLX makes biases of 16.
    """
    group = max(config.group_size for config in _partial_sizes(inventory, (4,), {"router"}))
    config = QuantConfig(4, group)
    apart = {"embedding": config, "router": KEEP}
    beside = sum(
        layer.bytes(apart[layer.role]) for layer in inventory.layers if layer.role in apart
    )
    weights = sum(layer.size for layer in inventory.layers if layer.role not in apart)
    average = max(2.5, (budget - inventory.other_bytes - beside) * 8 / weights - 12 / group)

    rounded = _rounded(inventory, config)
    build = partial(peer_programs.auto_round, source, config, average, rounded, text)
    about = f"{average:.3f} bits on average, g{group}, {peer_programs.ITERATIONS} iterations"
    return build, about + _version(peer_programs.AUTO_ROUND)


def _rounded(inventory: Inventory, config: QuantConfig) -> dict[str, QuantConfig]:
    """The embeddings, which AutoRound leaves alone, at a configuration, by path."""
    return {layer.path: config for layer in inventory.layers if layer.role == "embedding"}


def _gptq_model(source: Source, inventory: Inventory, budget: int, text: str) -> tuple[Build, str]:
    whole = {"embedding", "router", "head"}
    config = nearest(_partial_sizes(inventory, (2, 3, 4, 8), whole), budget)
    build = partial(peer_programs.gptq_model, source, config, text)
    return build, str(config) + _version(peer_programs.GPTQ_MODEL)


CALIBRATED: dict[str, Callable[[Source, Inventory, int, str], tuple[Build, str]]] = {
    "gptq": _gptq,
    "gptq-guarded": partial(_gptq, guarded=True),
    "feedback": _feedback,
    "awq": _awq,
    "dwq": _dwq,
    "dynamic_quant": _dynamic_quant,
    "autoround": _auto_round,
    "autoscheme": _auto_scheme,
    "gptqmodel": _gptq_model,
}
