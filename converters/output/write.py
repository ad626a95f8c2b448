"""Carries out a plan: quantizes layer by layer into a work folder, verifies it, and only then gives
it its name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...allocation.artifacts import ARTIFACTS
from ...allocation.plan import Plan
from ...allocation.plan_file import plan_text
from ...base.distributed import ranks
from ...base.errors import MintError
from ...base.files import PARTIAL, PLAN_FILE, REFINED_FILE, read_tensors
from ...base.hf_config import edit_text_config
from ...base.quant_config import QuantConfig
from ...base.report import Report, Silent
from ...base.targets import check_space, put_in_place, work_folder
from ...base.versions import versions
from ...checkpoint import mlxlm
from ...checkpoint.arrays import dense
from ...checkpoint.hub import SMALL_FILES
from ...checkpoint.layer_stream import stream
from ...checkpoint.layers import Inventory, Layer
from ...checkpoint.layout import Layout, TensorSpec
from ...checkpoint.low_disk import Waves, at_once
from ...checkpoint.roles import TOWER
from ...checkpoint.row_reader import Straight, straight_layers
from ...checkpoint.source import Source
from ...checkpoint.towers import PROCESSOR_FILES, has_mtp, text_only, without_mtp
from ...measure.sensitivity import Sensitivity
from ..quantizers import rtn
from ..quantizers.protocol import SCRATCH, Quantizer, Work
from ..quantizers.registry import find_quantizer
from . import rowwise
from .card import model_card
from .replace_tensors import replace_tensors
from .shard_writer import JOURNAL, LOCK, Writer, check_work, lock, write_index
from .verify import rehearse, verify

NOT_COPIED = (
    "config.json",
    "*.index.json",
    "hf_quant_config.json",
    "quantize_config.json",
    REFINED_FILE,
    *ARTIFACTS,
)


def write(
    source: Source,
    inventory: Inventory,
    plan: Plan,
    target: Path,
    force: bool = False,
    smoke: bool = False,
    report: Report | None = None,
    sensitivity: Sensitivity | None = None,
    kept: Mapping[str, Callable[[Path], None]] | None = None,
    refine: Callable[[Path, Path], None] | None = None,
    allow_nonfinite: bool = False,
    waves: Waves = at_once,
    called: str | None = None,
) -> str | None:
    """Carry out a plan: quantize layer by layer into a work folder, verify it, and only then call
    it `target`.

    Of several ranks each quantizes its share of the layers, and the first one does the rest.

    Args:
        source: a checkpoint whose weights are here.
        inventory: its layers.
        plan: fits them (plan.check_plan).
        target: the folder to make.
        force: replace a checkpoint of ours there, and unfinished work of another kind.
        smoke: let the result write a sentence before it gets its name.
        report: receives progress.
        sensitivity: with its tokens, for quantizers that use a layer's inputs.
        kept: writers of the other files that it keeps of its making (kept.py), by name.
        refine: called with the work folder, and with a file of its own there for what it found,
            once all is written; if that file exists, nothing is quantized anew.
        allow_nonfinite: don't refuse NaN and infinite weights.
        waves: hands modules over as their shards come (lowdisk.py).
        called: its name in its model card; the folder's by default.

    Returns:
        The sentence, or None.

    Raises:
        MintError: the disk is too small, weights aren't finite, other work is under way, or the
            result can't generate.
    """
    report, group = report or Silent(), ranks()
    layout = plan.layout(inventory)
    work = work_folder(target)
    if group.first:
        check_work(work)
        check_space(target.absolute().parent, _room(inventory, plan, layout, sensitivity, work))
    identity = {
        "source": source.fingerprint,
        "quantizer": plan.quantizer,
        "versions": versions(),
        "inputs": digest(sensitivity) if sensitivity is not None else None,
        "choice": {path: str(config) for path, config in plan.choice.items()},
    }
    config_text = _config_text(source, inventory, plan)
    with tempfile.TemporaryDirectory(prefix="mint-mlx-") as folder:
        rehearse(Path(folder), config_text, plan, inventory, layout)
    report.stage("convert")
    with Writer(work, layout, dict(inventory.units(plan.choice)), identity, force, group) as writer:
        # There once all layers were written and refined.
        learned = work / f"{SCRATCH}refined.safetensors"
        # The machine crashed: what was refined is no longer there.
        if group.first and not writer.intact:
            learned.unlink(missing_ok=True)
        if not learned.is_file():
            quantize = find_quantizer(plan.quantizer).make(
                Work(source, inventory, plan.choice, work, sensitivity, report.detail)
            )
            _write_layers(source, inventory, plan, writer, quantize, report, allow_nonfinite, waves)
            del quantize  # it holds the source's model
            mx.clear_cache()
        writer.finish()
        if not group.first:
            group.wait()
            return None
        report.stage("verify")
        _copy_small_files(source.path, work, plan.parts)
        write_index(work, layout, inventory.parameters)
        for name, save in (kept or {}).items():
            save(work / name)
        (work / PLAN_FILE).write_text(plan_text(plan, inventory), encoding="utf-8")
        card = model_card(plan, inventory, layout.total, source.path, called or target.name)
        (work / "README.md").write_text(card, encoding="utf-8")
        (work / "config.json").write_text(config_text, encoding="utf-8")
        verify(work, plan, inventory, layout)
        if refine is not None:
            refine(work, learned)
            if learned.is_file():
                replace_tensors(work, read_tensors(learned))
            verify(work, plan, inventory, layout)
        sentence = _sentence(work, report) if smoke else None
        for path in (
            *work.glob(f"{SCRATCH}*"),
            *work.glob(f".*{PARTIAL}*"),
        ):  # the latter of a run that was killed
            path.unlink()
        put_in_place(work, target, force)
        for path in (
            *target.glob(f"*{JOURNAL}"),
            target / LOCK,
        ):  # kept until now: without them it is a stranger's
            path.unlink()
        group.wait()
    return sentence


def _room(
    inventory: Inventory, plan: Plan, layout: Layout, sensitivity: Sensitivity | None, work: Path
) -> int:
    """Bytes that the disk must still have beside what unfinished work there has written."""
    present = (
        sum(f.stat().st_blocks * 512 for f in work.glob("model*.safetensors*"))
        if work.is_dir()
        else 0
    )
    beside = 50_000_000
    if (
        sensitivity is not None and find_quantizer(plan.quantizer).sequential
    ):  # two hidden states, and a shard's copy when it is refined
        wide = max(layer.shape[-1] for layer in inventory.layers if layer.role == "embedding")
        beside += 2 * 4 * sensitivity.tokens.size * wide + max(layout.sizes)
    return max(0, layout.total + beside - present)


def _write_layers(
    source: Source,
    inventory: Inventory,
    plan: Plan,
    writer: Writer,
    quantize: Quantizer,
    report: Report,
    allow_nonfinite: bool,
    waves: Waves,
) -> None:
    """Quantize and write what of this rank's share isn't written yet."""
    layers, units = {layer.path: layer for layer in inventory.layers}, writer.units
    todo = [path for path in inventory.order if path not in writer.done]
    mine = ranks().share({path: sum(spec.nbytes for spec in units[path]) for path in todo})
    todo = [path for path in todo if path in mine]
    step = count()
    for wave in waves(todo):
        by_row = _by_row(source, plan, [layers[name] for name in wave if name in layers], units)
        for name, place in by_row.items():
            report.step(name, next(step), len(todo))
            writer.put(
                name,
                rowwise.pieces(
                    source, place, layers[name], plan.choice[name], quantize, allow_nonfinite
                ),
            )
            mx.clear_cache()
        others = [name for name in wave if name not in by_row]
        for name, tensors in stream(source, inventory, others, allow_nonfinite):
            report.step(name, next(step), len(todo))
            config = plan.choice.get(name)
            if config is not None and config != layers[name].stored:
                tensors = _requantized(layers[name], tensors, config, quantize)
            writer.put(name, [tensors])
    report.step("", len(todo), len(todo))


def _sentence(work: Path, report: Report) -> str | None:
    """What the result writes, where its model runs here."""
    report.stage("generate")
    sentence = mlxlm.generate_sentence(work) or None
    if sentence is None:
        report.note("mlx-lm has parts of this model for Metal only: no sentence is generated here")
    return sentence


def _by_row(
    source: Source, plan: Plan, layers: Sequence[Layer], units: Mapping[str, tuple[TensorSpec, ...]]
) -> dict[str, Straight]:
    """The layers that can be rounded row by row."""
    if not find_quantizer(plan.quantizer).row_wise or not layers:
        return {}
    places = straight_layers(
        source, [layer for layer in layers if rowwise.can_be(layer, units[layer.path])]
    )
    return {layer.path: places[layer.path] for layer in layers if layer.path in places}


@contextmanager
def copied(folder: Path, target: Path, force: bool) -> Iterator[Path]:
    """A copy of a checkpoint to work on, beside the target; it gets that name in the end, or is
    removed on an error.

    Raises:
        MintError: another run works there, the disk is too small, or something else has the copy's
            name.
    """
    work = work_folder(target)
    check_work(work)
    if (work / JOURNAL).is_file() and not force:
        raise MintError(
            f"{work} holds an unfinished conversion: finish it, or give --force to throw it away"
        )
    sizes = [f.stat().st_size for f in folder.iterdir() if f.is_file()]
    check_space(target.absolute().parent, sum(sizes) + max(sizes))
    work.mkdir(exist_ok=True)
    with lock(work):
        try:
            for old in work.iterdir():
                if old.name != LOCK:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            for file in folder.iterdir():
                if file.is_file():
                    shutil.copyfile(file, work / file.name)
            yield work
            put_in_place(work, target, force)
            (target / LOCK).unlink()
        finally:
            shutil.rmtree(work, ignore_errors=True)


def digest(sensitivity: Sensitivity) -> str:
    """What codes follow from beside weights and plan: the tokens, their weights and the metrics."""
    made = sensitivity
    found = hashlib.blake2b(np.ascontiguousarray(sensitivity.tokens).data, digest_size=8)
    weights = [weights.weight for weights in made.weights.values()]
    for array in (
        *weights,
        *made.metric.values(),
        *([made.embedding] if made.embedding is not None else []),
    ):
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def _requantized(
    layer: Layer,
    tensors: dict[str, mx.array],
    config: QuantConfig,
    quantize: Quantizer,
) -> dict[str, mx.array]:
    """A layer's tensors under another configuration than the source's."""
    weight = dense(layer, tensors)
    packed = quantize(layer, weight, config) if config.quantized else {"weight": weight}
    rtn.check_scales(layer.path, weight, packed, config)
    return {
        name: a for name, a in tensors.items() if name not in ("weight", "scales", "biases")
    } | packed


def _copy_small_files(source: Path, work: Path, parts: str) -> None:
    """Everything beside weights and config; of a text model nothing that a processor of images or
    sounds reads.
    """
    left_out = NOT_COPIED + (PROCESSOR_FILES if parts == "text" else ())
    for pattern in SMALL_FILES:
        for file in source.glob(pattern):
            if file.is_file() and not any(fnmatch(file.name, p) for p in left_out):
                shutil.copyfile(file, work / file.name)
    settings = work / "tokenizer_config.json"
    if parts == "text" and settings.is_file():
        table = json.loads(settings.read_text(encoding="utf-8"))
        if table.pop("processor_class", None) is not None:
            settings.write_text(
                json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )


def _config_text(source: Source, inventory: Inventory, plan: Plan) -> str:
    """The source's config.json with our quantization, without towers and blocks that the written
    model lacks.
    """
    config: dict[str, Any] = dict(source.config)
    config.pop("quantization_config", None)
    config.pop("quantization", None)
    config = edit_text_config(
        config, lambda text: {k: v for k, v in text.items() if k != "quantization_config"}
    )
    if plan.parts == "text" and not any(
        map(TOWER.search, inventory.order)
    ):  # (some classes run a tower themselves)
        config = text_only(config, mlxlm.required_keys(config))
    if not has_mtp((f"{path}." for path in inventory.order), config):
        config = without_mtp(config)
    if "BF16" in {layer.dtype for layer in inventory.layers}:
        config = edit_text_config(_restate(config), _restate)
    block = plan.quantization()
    if block:
        config["quantization"] = config["quantization_config"] = block
    return json.dumps(dict(sorted(config.items())), indent=4) + "\n"


def _restate(config: dict[str, Any]) -> dict[str, Any]:
    """A config that said float32, now that its weights are bfloat16."""
    return {
        k: "bfloat16" if k in ("dtype", "torch_dtype") and v == "float32" else v
        for k, v in config.items()
    }
