"""Carries out a plan: quantizes layer by layer into a work folder, verifies it, and renames it.

    prepare the folder -> write layers -> finish files -> refine -> verify -> put in place

Nothing that was only half written ever has the target's name, and every step that took long is
resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...allocation.artifacts import PROFILE_FILE, SENSITIVITY_FILE
from ...allocation.plan import Plan
from ...allocation.plan_file import plan_text
from ...base.distributed import ranks
from ...base.files import LOCK, PLAN_FILE
from ...base.folders import JOURNALS, SCRATCH_FILES, UNMARKED
from ...base.quant_config import QuantConfig
from ...base.remove import UNFINISHED, remove_file, scratch_folder
from ...base.report import Report, Silent
from ...base.side_files import matches
from ...base.targets import check_space, put_in_place, work_folder
from ...base.versions import versions
from ...checkpoint.arrays import dense
from ...checkpoint.layer_stream import stream
from ...checkpoint.layers import MLX_DTYPES, Inventory, Layer
from ...checkpoint.layout import Layout, TensorSpec
from ...checkpoint.low_disk import Waves, at_once
from ...checkpoint.row_reader import Straight, straight_layers
from ...checkpoint.source import Source, check_unchanged
from ...measure.grid import find_grids, grid_for
from ...measure.profile import Profile
from ...measure.profile_file import save_profile
from ...measure.sensitivity import Sensitivity
from ...measure.sensitivity_file import save_sensitivity
from ..quantizers import rtn
from ..quantizers.grid_codes import codes_on_grid
from ..quantizers.protocol import Quantizer, Work
from ..quantizers.registry import find_quantizer
from ..sources.restore import rounded
from . import rowwise
from .card import model_card
from .card_facts import card_facts
from .refined import REFINED, hashes_of, read_refined
from .replace_tensors import replace_tensors
from .row_file import store_rows, stored_rows
from .sentence import write_sentence
from .shard_writer import Writer, check_work, write_index
from .small_files import config_text, copy_small_files
from .verify import rehearse, verify, verify_bytes, verify_values
from .verify_values import source_rows

SMALL = 50_000_000  # bytes on disk for everything beside the shards


@dataclass(frozen=True)
class Artifacts:
    """What was measured for a plan; written beside the weights, so that it is measured once."""

    profile: Profile | None = None
    sensitivity: Sensitivity | None = None


@dataclass(frozen=True)
class Conversion:
    """A plan to carry out.

    Attributes:
        source: a checkpoint whose weights are here.
        inventory: its layers.
        plan: fits them (plan.check_plan).
        target: the folder to make.
        force: replace a checkpoint of ours there, and unfinished work of another kind.
        sentence: let the result write a sentence before it gets its name.
        report: receives progress.
        sensitivity: with its tokens, for quantizers that need inputs and for refining.
        artifacts: what the checkpoint stores of its making beside the plan.
        refine: distil scales and biases on the sensitivity's tokens once all is written.
        allow_nonfinite: don't refuse NaN and infinite weights.
        waves: hands modules over as their shards come (low_disk.py).
        name: the checkpoint's name in its model card; the folder's by default.
        grids: let weights that lie on a grid already keep its codes (quantizers/grid_codes.py).
        base: the source's name on the Hub for its card, where it isn't the source's own.
    """

    source: Source
    inventory: Inventory
    plan: Plan
    target: Path
    force: bool = False
    sentence: bool = False
    report: Report = field(default_factory=Silent)
    sensitivity: Sensitivity | None = None
    artifacts: Artifacts = field(default_factory=Artifacts)
    refine: bool = False
    allow_nonfinite: bool = False
    waves: Waves = at_once
    name: str | None = None
    grids: bool = True
    base: str | None = None

    @property
    def work(self) -> Path:
        """The folder beside the target in which the checkpoint is made."""
        return work_folder(self.target)

    @cached_property
    def layout(self) -> Layout:
        """Shards, headers and places of the checkpoint."""
        return self.plan.layout(self.inventory)


def write(conversion: Conversion) -> str | None:
    """Carry out a plan: quantize into a work folder, verify it, and only then name it `target`.

    Of several ranks each quantizes its share of the layers, and the first one does the rest.

    Returns:
        The sentence, or None.

    Raises:
        MintError: the disk is too small, weights aren't finite, other work is under way, or the
            result can't generate.
    """
    work, group = conversion.work, ranks()
    if group.first:
        check_work(work)
        check_space(conversion.target.absolute().parent, _space_needed(conversion))
    config = config_text(conversion.source, conversion.inventory, conversion.plan)
    licence = card_facts(conversion.source.path)
    _rehearse(conversion, config)

    conversion.report.stage("convert")
    with _open_writer(conversion) as writer:
        _write_layers(conversion, writer)
        mx.clear_cache()
        writer.finish()
        if not group.first:
            group.wait()
            return None

        conversion.report.stage("verify")
        _finish_files(conversion, config, licence)
        # What an interrupted run has refined may stand in some shards already.
        refined = _stored_refined(conversion)
        if refined is None:
            _verify(conversion, writer.hashes)
            refined = _refine(conversion) if conversion.refine else None
        if refined is not None:
            replace_tensors(work, refined)
            _verify(conversion, writer.hashes | hashes_of(refined))
        sentence = None
        if conversion.sentence:
            sentence = write_sentence(work, conversion.inventory, conversion.report)

        check_unchanged(conversion.source)
        _put_in_place(conversion)
        group.wait()
    return sentence


def _space_needed(conversion: Conversion) -> int:
    """Bytes that the disk must have beside what unfinished work there has written."""
    needed = conversion.layout.total + SMALL

    # Two hidden states that a sequential quantizer stores, and a shard's copy when it is refined.
    plan, sensitivity = conversion.plan, conversion.sensitivity
    if sensitivity is not None and find_quantizer(plan.quantizer).sequential:
        layers = conversion.inventory.layers
        wide = max(layer.shape[-1] for layer in layers if layer.role == "embedding")
        needed += 2 * 4 * sensitivity.tokens.size * wide + max(conversion.layout.sizes)

    # (Empty where there is no such folder yet.)
    shards = conversion.work.glob("model*.safetensors*")
    return max(0, needed - sum(file.stat().st_blocks * 512 for file in shards))


def _rehearse(conversion: Conversion, config: str) -> None:
    """Let mlx-lm load the checkpoint before any weight is read."""
    with scratch_folder(UNMARKED) as folder:
        rehearse(folder, config, conversion.plan, conversion.inventory, conversion.layout)


def _open_writer(conversion: Conversion) -> Writer:
    """Open the work folder; an interrupted run of the same identity is resumed."""
    inventory, plan, sensitivity = conversion.inventory, conversion.plan, conversion.sensitivity
    identity = {
        "source": conversion.source.identity,
        "quantizer": plan.quantizer if conversion.grids else f"{plan.quantizer} without grids",
        "versions": versions(),
        "inputs": digest(sensitivity) if sensitivity is not None else None,
        "choice": {path: str(config) for path, config in plan.choice.items()},
    }
    units = dict(inventory.units(plan.choice))

    def replaced() -> dict[str, str]:
        return hashes_of(_stored_refined(conversion) or {})

    return Writer(
        conversion.work, conversion.layout, units, identity, conversion.force, ranks(), replaced
    )


def _write_layers(conversion: Conversion, writer: Writer) -> None:
    """Quantize and write what of this rank's share isn't written yet."""
    source, inventory, plan = conversion.source, conversion.inventory, conversion.plan
    report = conversion.report
    todo = _share(conversion, writer)
    if not todo:
        return
    quantize = find_quantizer(plan.quantizer).make(
        Work(
            source,
            inventory,
            plan.choice,
            conversion.work,
            conversion.sensitivity,
            report.detail,
            conversion.grids,
        )
    )
    layers = {layer.path: layer for layer in inventory.layers}
    step = count()
    for wave in conversion.waves(todo):
        if not source.has_weights:  # its shards are dropped before the result is verified
            store_rows(conversion.work, ranks().rank, source_rows(source, inventory, wave))

        # Layers that can be quantized row by row are never whole in memory.
        wave_layers = [layers[name] for name in wave if name in layers]
        by_row = _by_row(conversion, wave_layers, writer.units)
        for name, place in by_row.items():
            report.step(name, next(step), len(todo))
            pieces = rowwise.quantized_pieces(
                source,
                place,
                layers[name],
                plan.choice[name],
                _row_quantizer(conversion, place, layers[name], quantize),
                conversion.allow_nonfinite,
            )
            writer.put(name, pieces)
            mx.clear_cache()

        # All others come whole, one after the other.
        others = [name for name in wave if name not in by_row]
        for name, tensors in stream(source, inventory, others, conversion.allow_nonfinite):
            report.step(name, next(step), len(todo))
            config = plan.choice.get(name)
            if config is not None and config != layers[name].stored:
                tensors = _requantized(layers[name], tensors, config, quantize, conversion.grids)
                if not conversion.allow_nonfinite:
                    rtn.check_finite(name, tensors, config)
            elif config is not None and "biases" in tensors:
                tensors |= _rounded(layers[name], tensors)
            writer.put(name, [tensors])
    report.step("", len(todo), len(todo))


def _share(conversion: Conversion, writer: Writer) -> list[str]:
    """The modules that this rank has to write, in the model's order."""
    todo = [path for path in conversion.inventory.order if path not in writer.done]
    sizes = {path: sum(spec.nbytes for spec in writer.units[path]) for path in todo}
    share = ranks().share(sizes)
    return [path for path in todo if path in share]


def _by_row(
    conversion: Conversion, layers: Sequence[Layer], units: Mapping[str, tuple[TensorSpec, ...]]
) -> dict[str, Straight]:
    """The layers that can be quantized row by row, with where their rows lie."""
    if not find_quantizer(conversion.plan.quantizer).row_wise or not layers:
        return {}
    possible = [layer for layer in layers if rowwise.is_possible(layer, units[layer.path])]
    places = straight_layers(conversion.source, possible)
    return {layer.path: places[layer.path] for layer in layers if layer.path in places}


def _row_quantizer(
    conversion: Conversion, place: Straight, layer: Layer, quantize: Quantizer
) -> Quantizer:
    """What quantizes a layer's rows: its grid's own codes, or the plan's quantizer."""
    config = conversion.plan.choice[layer.path]
    if not conversion.grids or not config.quantized:
        return quantize
    grids = find_grids(partial(place.read, conversion.source, layer), layer.as_experts)
    if grid_for(grids, config) is None:
        return quantize

    def take_codes(layer: Layer, weight: mx.array, config: QuantConfig) -> dict[str, mx.array]:
        return codes_on_grid(layer, weight, config, grids) or quantize(layer, weight, config)

    return take_codes


def _requantized(
    layer: Layer,
    tensors: dict[str, mx.array],
    config: QuantConfig,
    quantize: Quantizer,
    grids: bool = True,
) -> dict[str, mx.array]:
    """A layer's tensors under another configuration than the source's."""
    weight = dense(layer, tensors)
    packed = {"weight": weight}
    if config.quantized:
        on_grid = codes_on_grid(layer, weight, config) if grids else None
        packed = on_grid or quantize(layer, weight, config)
    if config.quantized:
        rtn.check_scales(layer.path, weight, packed, config)
    replaced = ("weight", "scales", "biases", "global_scale")
    return {name: array for name, array in tensors.items() if name not in replaced} | packed


def _rounded(layer: Layer, tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """The scales and biases of a layer that stays as it is, in the type that they are written in.

    Those of foreign formats come in float32.
    """
    dtype: mx.Dtype = getattr(mx, MLX_DTYPES[layer.dtype])
    return rounded(tensors["scales"], tensors["biases"], dtype)


def _finish_files(conversion: Conversion, config: str, licence: Mapping[str, Any]) -> None:
    """Write everything beside the shards; config.json comes last, and makes it a checkpoint."""
    inventory, plan, work = conversion.inventory, conversion.plan, conversion.work
    copy_small_files(conversion.source.path, work, plan.parts)
    write_index(work, conversion.layout, inventory.parameters)

    if conversion.artifacts.profile is not None:
        save_profile(conversion.artifacts.profile, work / PROFILE_FILE)
    if conversion.artifacts.sensitivity is not None:
        save_sensitivity(conversion.artifacts.sensitivity, work / SENSITIVITY_FILE)
    (work / PLAN_FILE).write_text(plan_text(plan, inventory), encoding="utf-8")

    name, total = conversion.name or conversion.target.name, conversion.layout.total
    card = model_card(
        plan, inventory, total, conversion.source, name, licence, work, conversion.base
    )
    (work / "README.md").write_text(card, encoding="utf-8")
    (work / "config.json").write_text(config, encoding="utf-8")


def _verify(conversion: Conversion, hashes: Mapping[str, str]) -> None:
    """Compare the finished folder with what was written, the plan and the source's weights."""
    work, plan, inventory = conversion.work, conversion.plan, conversion.inventory
    verify_bytes(work, conversion.layout, hashes)
    verify(work, plan, inventory, conversion.layout)
    source = conversion.source
    rows = None if source.has_weights else stored_rows(work)
    verify_values(source, work, plan, inventory, conversion.allow_nonfinite, rows)


def _refine(conversion: Conversion) -> dict[str, mx.array] | None:
    """Distil scales and biases on the source's own text; None where nothing is gained.

    They are stored in a file, so that an interruption between two shards loses nothing.
    """
    from ..quantizers.distil import refine_written

    assert conversion.sensitivity is not None
    tokens, file = conversion.sensitivity.tokens, conversion.work / REFINED
    refine_written(conversion.source, tokens, conversion.report, conversion.work, file)
    return _stored_refined(conversion)


def _stored_refined(conversion: Conversion) -> dict[str, mx.array] | None:
    """Refined tensors of this or an interrupted run, where they are wanted."""
    return read_refined(conversion.work, conversion.layout) if conversion.refine else None


def _put_in_place(conversion: Conversion) -> None:
    """Rename the finished work folder to the target, without the files that only a run needs."""
    work, target = conversion.work, conversion.target
    for path in work.iterdir():
        if matches(path.name, (*SCRATCH_FILES, UNFINISHED)):
            remove_file(path)
    put_in_place(work, target, conversion.force, conversion.report)

    # Without its journal and lock a work folder would be a stranger's: they go last.
    for path in target.iterdir():
        if matches(path.name, (*JOURNALS, LOCK)):
            remove_file(path)


def digest(sensitivity: Sensitivity) -> str:
    """Hash of what codes follow from beside weights and plan: tokens, their weights and metrics."""
    arrays: list[Any] = [weights.weight for weights in sensitivity.weights.values()]
    arrays += sensitivity.metric.values()
    if sensitivity.embedding is not None:
        arrays.append(sensitivity.embedding)

    value = hashlib.blake2b(np.ascontiguousarray(sensitivity.tokens).data, digest_size=8)
    for array in arrays:
        value.update(np.ascontiguousarray(array).data)
    return value.hexdigest()
