"""A model that a job works on: its headers, layers and recipe."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from ..allocation.plan_file import read_plan
from ..base.errors import MintError
from ..base.files import MTP_PLACES, PLAN_FILE
from ..base.hf_config import HALVES, text_config
from ..base.one_line import listed
from ..base.report import Report
from ..base.safetensors_header import index_notes
from ..base.side_files import VOCABULARIES, matches, side_files
from ..checkpoint.class_towers import drops_towers
from ..checkpoint.config_file import read_config
from ..checkpoint.config_keys import is_flattened
from ..checkpoint.known_differences import known_differences
from ..checkpoint.layers import Inventory, list_layers
from ..checkpoint.mlxlm import bare_model, check_runs
from ..checkpoint.mtp_codes import IN_8_BITS, with_coded_head
from ..checkpoint.source import (
    Source,
    brought_keys,
    load_source,
    open_model,
    read_as,
)
from ..checkpoint.tokenizer import has_tokenizer
from ..checkpoint.towers import UnusedTensors, find_unused, remarks, with_towers
from ..checkpoint.vlm_keys import for_vlm, vlm_limits
from ..rules.recipes import Recipe, find_recipe

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Job:
    """A source with everything that its headers tell.

    Attributes:
        source: the checkpoint.
        inventory: its layers and other tensors.
        recipe: the rules for its family.
        parts: `text`, `mtp`, `mtp-8bit` or `all`.
        unused: the tensors that the language model doesn't use.
    """

    source: Source
    inventory: Inventory
    recipe: Recipe
    parts: str
    unused: UnusedTensors


def prepare(
    model: str,
    recipe: str | None = None,
    weights: bool = True,
    parts: str = "text",
    keep_nvfp4: bool = False,
    dtype: str | None = None,
) -> Job:
    """Find a model and list its layers, from headers alone.

    Args:
        model: a folder or a Hub id.
        recipe: a recipe's name or file; found by the model's type by default.
        weights: download the weights of a Hub model.
        parts: `text`, `mtp` to carry the blocks for multi-token prediction along (`mtp-8bit`: in 8
            bits), or `all` for them and a tower.
        keep_nvfp4: leave experts of NVFP4 packed.
        dtype: the 16-bit type to write in; what the config states by default.

    Raises:
        MintError: no such model or recipe, or one that mlx-lm can't build.
    """
    source = read_as(load_source(model, weights=weights), keep_nvfp4, dtype)
    chosen = find_recipe(recipe, source.config)
    inventory = list_layers(open_model(source), source.config)
    check_runs(source.config)
    unused = find_unused(source.headers.values(), source.config, inventory)
    if parts == "all":
        _check_towers(source, unused)
        inventory = with_towers(inventory, unused.towers, HALVES.get(dtype or ""))
        inventory = for_vlm(inventory, source.config)
    if unused.mtp and parts == IN_8_BITS:
        half = HALVES.get(dtype or "")
        inventory = with_coded_head(inventory, unused.mtp, source.config, half)
    elif unused.keeps_mtp(parts):
        if not unused.mtp_can_be_copied:
            raise MintError(
                f"the blocks for multi-token prediction of {source.name} are packed, and a result "
                "doesn't say how: leave them out with --parts text, or give the original in bf16"
            )
        inventory = with_towers(inventory, unused.mtp, HALVES.get(dtype or ""))
    return Job(source, inventory, chosen, parts, unused)


def _check_towers(source: Source, unused: UnusedTensors) -> None:
    """Refuse to carry along a tower with which stock mlx-lm wouldn't load the result.

    Raises:
        MintError: naming the model's type.
    """
    stated = read_config(source.path)
    if not unused.towers:
        return
    if is_flattened(stated) or not drops_towers(bare_model(source.config), unused.towers):
        raise MintError(
            f"mlx-lm cannot load a model of type {stated['model_type']!r} with its tower: leave "
            "--parts all out"
        )


def check_same_model(given: Source, source: Source, report: Report) -> None:
    """Refuse a checkpoint of another model than a source, as far as their configs tell.

    That it was made from other weights is told: a fine-tune may be compared with its base.

    Raises:
        MintError: naming the key in which they differ.
    """
    difference = other_model(given, source)
    if difference is not None:
        raise MintError(difference)
    if other := other_weights(given, source):
        report.note(f"{other}; the divergence is one between two models")


def other_weights(given: Source, source: Source) -> str | None:
    """A sentence where a checkpoint's plan was made from other weights than a source's.

    None where it was not, and where nobody knows: there is no plan that can be read, or one of the
    two comes from the Hub, whose hashes are of another kind than a folder's.
    """
    file = given.path / PLAN_FILE
    origin = None
    if file.is_file():
        with suppress(MintError):  # who needs the plan says what is wrong with it
            origin = read_plan(file).origin
    if origin is None or origin.content in ("", source.content):
        return None
    if (origin.revision is None) != (source.revision is None):
        return None
    return (
        f"{given.name} was made from other weights ({origin.source or 'unnamed'}) than those of "
        f"{source.name}, as its {PLAN_FILE} says"
    )


def other_model(given: Source, source: Source) -> str | None:
    """Why a checkpoint can't be one of a source, as far as their configs tell; None where it can.

    The sentence names the key in which they differ.
    """
    ours = text_config(given.config)
    theirs = text_config(source.config)
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        if ours.get(key) != theirs.get(key):
            return (
                f"{given.name} was not made from {source.name}: their {key} is {ours.get(key)} "
                f"and {theirs.get(key)}"
            )
    return None


def note_side_files(job: Job, report: Report) -> None:
    """Say what of a source's folder is not copied into the result, and which code is.

    Raises:
        MintError: its tokenizer can't be copied, since its files are links to elsewhere.
    """
    beside = side_files(job.source.path)
    copied = any(matches(name, VOCABULARIES) for name in beside.copied)
    if has_tokenizer(job.source.path) and not copied:
        raise MintError(
            f"the tokenizer's files in {job.source.name} are links to files outside of it, which "
            "are not copied: put the files themselves there"
        )
    code = [name for name in beside.copied if name.endswith(".py")]
    if code:
        report.note(f"Python code that configs name is copied and never run here: {listed(code)}")
    if ADAPTER in beside.others:
        report.note(
            f"an adapter lies beside the model ({ADAPTER}) and is not applied: if the result shall "
            "have it, merge it first"
        )
    if beside.others:
        report.note(f"not copied from {job.source.name}: {listed(beside.others)}")


def note_source(job: Job, report: Report) -> None:
    """Say what of a source is read in another form or left out, and whether it is quantized."""
    from ..converters.sources.layouts import describe

    beside = [file for file in MTP_PLACES if (job.source.path / file).is_file()]
    if beside and not job.unused.mtp:
        report.note(
            f"the blocks for multi-token prediction in {beside[0]} are not read, and the result "
            "has none: to keep them, convert the original with --parts mtp"
        )
    for text in remarks(job.unused, job.parts, bool(beside)):
        report.note(text)
    for text in index_notes(job.source.path, job.source.headers):
        report.note(text)
    name = job.source.name
    changes = brought_keys(job.source)
    elsewhere = [change.key for change in changes if not change.left_out]
    if elsewhere:
        report.note(
            f"config.json of {name} says {', '.join(elsewhere)} where mlx-lm's class "
            f"{changes[0].reader} does not look (transformers 5 writes it so): the result's "
            "config.json says it where both do"
        )
    for change in changes:
        if change.left_out:
            report.note(f"config.json of {name} {change}: the result's says it")
    for difference in known_differences(job.source.config):
        report.note(f"known difference: {difference}")
    for limit in vlm_limits(job.source.config, job.parts == "all", job.parts != "all"):
        report.note(limit)
    source = job.source
    layout = describe(source.config, source.path, source.headers, source.keep_nvfp4)
    if layout:
        report.note(f"{name} {layout}")

    # Errors are those against a source, so a quantized one hides what it has lost itself.
    layers = job.inventory.layers
    stored = [layer for layer in layers if layer.stored]
    if stored:
        weights = sum(layer.size for layer in stored)
        share = weights / sum(layer.size for layer in layers)
        forms = ", ".join(sorted({str(layer.stored) for layer in stored}))
        report.note(
            f"{name} is quantized already: {len(stored)} of {len(layers)} layers ({share:.0%} of "
            f"the weights) are {forms}. Under a budget each stays as it is or gets fewer bits; "
            "errors are measured against it, not against the original, which would give a better "
            "result"
        )

    # As they are they would cost half as much again, and MLX would compute all in float32.
    headers = source.headers.values()
    wide = {name for table in headers for name, info in table.items() if info.dtype == "F32"}
    rounded = [layer for layer in stored if f"{layer.path}.scales" in wide]
    if rounded:
        report.note(
            f"the scales of {len(rounded)} layers of {name} are float32: they are written in 16 "
            "bits, also where codes stay, which changes their weights by about .3 %"
        )
