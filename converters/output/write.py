"""Carries out a plan: quantizes layer by layer into a work folder, verifies it, and renames it.

    prepare the folder -> write layers -> finish files -> refine -> verify -> put in place

Nothing that was only half written ever has the target's name, and every step that took long is
resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ...allocation.artifacts import PROFILE_FILE, SENSITIVITY_FILE
from ...allocation.plan_file import plan_text
from ...base.distributed import ranks
from ...base.files import LOCK, PLAN_FILE
from ...base.folders import JOURNALS, SCRATCH_FILES, UNMARKED, WORK
from ...base.remove import UNFINISHED, discard, remove_file
from ...base.scratch import scratch_folder
from ...base.side_files import matches
from ...base.targets import check_space, put_in_place
from ...base.versions import versions
from ...checkpoint.source import check_unchanged
from ...measure.profile_file import save_profile
from ...measure.sensitivity import Sensitivity
from ...measure.sensitivity_file import save_sensitivity
from ..quantizers.registry import find_quantizer
from .card import model_card
from .card_facts import card_facts
from .conversion import Conversion
from .read_back import read_back
from .refined import REFINED, hashes_of, read_refined
from .replace_tensors import replace_tensors
from .row_file import stored_rows
from .sentence import write_sentence
from .shard_writer import Writer, check_work, write_index
from .small_files import config_text, copy_small_files
from .verify import rehearse, verify, verify_values
from .write_layers import write_layers

SMALL = 50_000_000  # bytes on disk for everything beside the shards


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
        parent = conversion.target.absolute().parent
        check_space(parent, _space_needed(conversion), conversion.elsewhere)
    config = config_text(conversion.source, conversion.inventory, conversion.plan)
    licence = card_facts(conversion.source.path)
    _rehearse(conversion, config)

    conversion.report.stage("convert")
    with _open_writer(conversion) as writer:
        write_layers(conversion, writer)
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
            choice = conversion.plan.choice
            sentence = write_sentence(work, conversion.inventory, choice, conversion.report)

        # (Nobody knows which layers are of the files as they were.)
        check_unchanged(conversion.source, partial(discard, work, WORK))
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


def _finish_files(conversion: Conversion, config: str, licence: Mapping[str, Any]) -> None:
    """Write everything beside the shards; config.json comes last, and makes it a checkpoint."""
    inventory, plan, work = conversion.inventory, conversion.plan, conversion.work
    copy_small_files(conversion.source, work, plan.parts)
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
    nonfinite = conversion.allow_nonfinite
    read_back(work, conversion.layout, hashes, plan.choice, inventory, nonfinite)
    verify(work, plan, inventory, conversion.layout)
    source = conversion.source
    rows = None if source.has_weights else stored_rows(work)
    verify_values(source, work, plan, inventory, rows)


def _refine(conversion: Conversion) -> dict[str, mx.array] | None:
    """Distil scales and biases on the source's own text; None where nothing is gained.

    They are stored in a file, so that an interruption between two shards loses nothing.
    """
    from ..quantizers.distil import refine_written

    assert conversion.sensitivity is not None
    text, file = conversion.sensitivity.text, conversion.work / REFINED
    refine_written(conversion.source, text, conversion.report, conversion.work, file)
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
