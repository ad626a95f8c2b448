"""Why mlx-lm fails to build a model from a config and tensors, in a sentence, and what to do."""

from __future__ import annotations

import re
from typing import Any

from ..base.hf_config import text_config
from .model_classes import ModelClass, text_class
from .tokenizer import first_line

# What names of tensors hold that an adapter was saved in, by itself or around the model's own.
ADAPTED = ("lora_", "modules_to_save", "original_module", "base_layer")
# What mlx says of an embedding of another number of rows.
RESIZED = re.compile(r".*shape \(\d+, (\d+)\) .*shape \((\d+), \1\) .*\.?embed_tokens\.")
# Classes of transformers that say something of a text, and write none.
JUDGES = re.compile(r"For(Sequence|Token)Classification$|For(QuestionAnswering|RewardModel)$")
# What a list says of a kind of layer that a class looks for.
NO_LAYER = re.compile(r"'(\w+)' is not in list")


def why_not_built(name: str, config: dict[str, Any], error: BaseException) -> str:
    """Why mlx-lm fails on a checkpoint, and what to look at.

    Args:
        name: of the checkpoint.
        config: its config.json.
        error: with which mlx-lm failed.
    """
    text = f"mlx-lm cannot build a model from {name}"
    reader = text_class(config)
    lacking = reader.required - text_config(config).keys() if reader else set()
    if reader and lacking and isinstance(error, TypeError):
        return (
            f"{text}: config.json lacks {', '.join(sorted(lacking))}, which the class "
            f"{reader.name} needs: update mlx-lm and mint-mlx, or give the model as it was released"
        )

    # sanitize fails with the name of a tensor that it looks for, load_weights with a count.
    if isinstance(error, KeyError) and error.args == ("lm_head",):
        return (
            f"{name} has no head but its embedding, and mlx-lm's class for "
            f"{config.get('model_type')!r} wants one of its own"
        )
    reason = first_line(error)
    if isinstance(error, KeyError) and "." in str(error):
        reason = f"Missing {error.args[0]}"
    if not reason.endswith(".."):
        reason = reason.removesuffix(".")
    if advice := _tensors(reason, str(error), config):
        return f"{text}: {reason} ({advice})"
    if rows := RESIZED.match(reason):
        advice = f"set vocab_size to {rows[2]} in config.json, if tokens were added or taken"
        return f"{text}: {reason}: {advice}"
    if reason.startswith("Expected shape"):
        advice = "its config.json is of another model, give both as they were released"
        return f"{text}: {reason}: {advice}"
    if reader and (kind := NO_LAYER.match(reason)):
        return (
            f"mlx-lm's class {reader.name} runs no model without a layer of {kind[1]}, and "
            f"{name} has none: wait for a version of mlx-lm that does"
        )
    if empty := _empty(config, reader, error):
        return (
            f"{text}: config.json says null for {empty}: leave the keys out, or give their values"
        )
    return f"{text}: {reason} (check the values of its config.json)"


def _tensors(reason: str, names: str, config: dict[str, Any]) -> str | None:
    """What to look at where tensors are missing or left over; None where it is something else."""
    if not reason.startswith(("Missing ", "Received ")):
        return None
    stated = config.get("architectures")
    architecture = str(stated[0]) if isinstance(stated, list) and stated else ""
    if JUDGES.search(architecture):
        return f"it is a {architecture}, which writes no text: give a model that does"

    headless = architecture.endswith("Model") and re.search(r"\b(lm_head|embed_tokens)\.", names)
    if headless:
        return f"it was saved as {architecture}, without a head: give one saved as a ...ForCausalLM"
    if reason.startswith("Missing "):
        return "is the checkpoint complete, and does its config.json belong to it?"
    if any(part in names for part in ADAPTED):
        return "an adapter was saved with the model: merge it first"
    return "its config.json is of another model, or the class of mlx-lm knows no such tensors"


def _empty(config: dict[str, Any], reader: ModelClass | None, error: BaseException) -> str:
    """The keys without a value for which the class has one, if they can be the reason."""
    if reader is None or not isinstance(error, (TypeError, AttributeError, ValueError)):
        return ""
    empty = [key for key, value in text_config(config).items() if value is None]
    return ", ".join(sorted(key for key in empty if reader.defaults.get(key) is not None))
