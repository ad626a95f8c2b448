"""A plan's file: YAML that a person can read, edit and give back.

One line a layer; `layer` and `as` decide, the rest is for the reader: sizes are computed anew,
never trusted."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import MintError, UsageError
from ..base.files import write_text
from ..base.quant_config import QuantConfig, parse_config
from ..base.yamlfile import line_of, read_yaml
from ..checkpoint.layers import Inventory
from ..checkpoint.origin import Origin
from ..checkpoint.towers import PARTS
from ..rules.efforts import EFFORTS
from ..runtime.speed_table import Speed
from .plan import LayerError, Plan
from .uniform import active_ratio

SCHEMA = 1
LARGE = 1e18  # more than any figure that a plan states


def write_plan(plan: Plan, inventory: Inventory, path: Path) -> None:
    """Write a plan as YAML; the same plan gives the same bytes."""
    write_text(path, plan_text(plan, inventory))


def plan_text(plan: Plan, inventory: Inventory) -> str:
    """The plan file's text."""
    # The first lines say what the plan is, in the order of HEADER.
    size = plan.layout(inventory).total
    source = _flow(
        name=plan.origin.source,
        revision=plan.origin.revision,
        structure=plan.origin.structure,
        content=plan.origin.content,
    )
    lines = [
        "# A plan of mint-mlx: change `as` (4bit-g64, mxfp4, keep, ...), then `mint-mlx convert "
        "MODEL --plan FILE`.",
        f"mint_mlx_plan: {SCHEMA}",
        f"source: {source}",
        f"budget: {_scalar(plan.budget)}",
        f"budget_bytes: {_scalar(plan.budget_bytes)}",
        f"recipe: {_scalar(plan.recipe)}",
        f"objective: {_scalar(plan.objective)}",
        f"quantizer: {_scalar(plan.quantizer)}",
        f"effort: {_scalar(plan.effort)}",
        f"parts: {_scalar(plan.parts)}",
        f"loss: {_scalar(plan.loss)}",
        f"gap: {_scalar(plan.gap)}",
        *_speed_lines(plan),
        f"bytes: {size}",
        f"parameters: {inventory.parameters}",
        f"bits_per_weight: {size * 8 / inventory.parameters:.4f}",
        f"active_bytes: {inventory.active_bytes(plan.choice)}",
        f"active_bytes_ratio: {active_ratio(inventory, plan.choice):.4f}  # to uniform 4bit-g64",
        f"versions: {_flow(**plan.versions)}",
        f"choice: {_scalar(_digest(plan.choice))}  # of the lines below, to tell an edit",
        "layers:",
    ]

    # Then one line a layer, in the order of LAYER_KEYS.
    for layer in inventory.layers:
        config = plan.choice[layer.path]
        entry: dict[str, Any] = {
            "layer": layer.path,
            "as": str(config),
            "role": layer.role,
            "weights": layer.size,
            "bytes": layer.bytes(config),
        }
        error = plan.errors.get(layer.path)
        if error is not None:
            entry |= {"nmse": _round(error.mean), "worst": _round(error.worst)}
        lines.append(f"- {_flow(**entry)}")
    return "\n".join(lines) + "\n"


def _speed_lines(plan: Plan) -> list[str]:
    """The line of the predicted speed, where there is one."""
    speed = plan.speed
    if speed is None:
        return []
    low, high = speed.band
    entry = _flow(
        tokens_per_second=_round(speed.tokens_per_second),
        low=_round(low),
        high=_round(high),
        context=speed.context,
        machine=speed.machine,
        estimated=speed.estimated,
        goal=plan.speed_goal,
    )
    return [f"speed: {entry}  # of decoding, as predicted"]


HEADER = (
    "mint_mlx_plan",
    "source",
    "budget",
    "budget_bytes",
    "recipe",
    "objective",
    "quantizer",
    "effort",
    "parts",
    "loss",
    "gap",
    "speed",
    "bytes",
    "parameters",
    "bits_per_weight",
    "active_bytes",
    "active_bytes_ratio",
    "versions",
    "choice",
    "layers",
)
LAYER_KEYS = ("layer", "as", "role", "weights", "bytes", "nmse", "worst")


def _digest(choice: dict[str, QuantConfig]) -> str:
    """A hash of a choice, whatever the order of its lines."""
    lines = "\n".join(f"{path} {config}" for path, config in sorted(choice.items()))
    return hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()


def _round(value: float) -> float:
    """Four digits, enough for a reader."""
    return float(f"{value:.4g}")


# What YAML reads as a string without quotes, and words that it reads as something else.
_PLAIN = re.compile(r"[A-Za-z_][\w./+-]*")
_RESERVED = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def _scalar(value: Any) -> str:
    """A value as YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}" if "e" not in f"{value:.6g}" else f"{value:.5e}"
    if isinstance(value, int):
        return str(value)
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _RESERVED:
        return text
    # YAML's double quotes are JSON's, except for pairs of surrogates.
    return json.dumps(text, ensure_ascii=False)


def _flow(**entries: Any) -> str:
    return "{" + ", ".join(f"{key}: {_scalar(value)}" for key, value in entries.items()) + "}"


def read_plan(path: Path | str) -> Plan:
    """Read a plan file.

    Raises:
        MintError: with file and line, where it isn't one.
    """
    path = Path(path)
    data, node = read_yaml(path, "plan")
    if not isinstance(data, dict) or "mint_mlx_plan" not in data:
        raise MintError(
            f"{path} is not a plan: make one with `mint-mlx allocate PROFILE --budget B -o {path}`"
        )
    file = _File(path, node)
    source = _check_header(data, file)
    choice, errors = _read_layers(data["layers"], file)

    # What was said of the choice that the file was made with doesn't hold for an edited one, and
    # without the hash nobody knows.
    edited = data.get("choice") != _digest(choice)
    figures: dict[str, Any] = {} if edited else data
    stated = data.get("budget_bytes")
    stated = stated if type(stated) is int and 0 < stated < LARGE else None
    return Plan(
        origin=Origin(
            str(source.get("name") or ""),
            _text(source.get("revision")),
            str(source.get("structure") or ""),
            str(source.get("content") or ""),
        ),
        choice=choice,
        objective=_text(data.get("objective")),
        budget=_text(figures.get("budget")),
        budget_bytes=None if edited else stated,
        loss=_figure(figures.get("loss")),
        gap=_figure(figures.get("gap")),
        errors={} if edited else errors,
        versions=_versions(data.get("versions")),
        edited=edited,
        first_budget=stated if edited else None,
        speed=_speed(figures.get("speed")),
        speed_goal=_speed_goal(figures.get("speed")),
        recipe=str(data.get("recipe") or Plan.recipe),
        quantizer=str(data.get("quantizer") or Plan.quantizer),
        effort=_one_of(data, "effort", Plan.effort, EFFORTS, file),
        parts=_one_of(data, "parts", Plan.parts, PARTS, file),
    )


@dataclass(frozen=True)
class _File:
    """A plan's file as it was parsed, to say where a problem is."""

    path: Path
    node: Any

    def error(self, problem: str, *location: str | int) -> MintError:
        """An error at a key or a line of the file."""
        return MintError(f"{self.path}, line {line_of(self.node, location)}: {problem}")


def _check_header(data: dict[str, Any], file: _File) -> dict[str, Any]:
    """Refuse a file that isn't a plan of this version; returns what it says of its source."""
    if data["mint_mlx_plan"] != SCHEMA:
        raise file.error(
            "this plan is of another version of mint-mlx: make it anew", "mint_mlx_plan"
        )
    if unknown := data.keys() - HEADER:
        raise file.error(
            f"a plan has no key {min(map(str, unknown))!r}: there are {', '.join(HEADER)}",
            min(unknown, key=str),
        )
    source = data.get("source") or {}
    if not isinstance(source, dict):
        raise file.error("source must be a table", "source")
    if not isinstance(data.get("layers"), list):
        raise file.error("a plan needs its layers as a list", "layers")
    return source


def _read_layers(
    entries: list[Any], file: _File
) -> tuple[dict[str, QuantConfig], dict[str, LayerError]]:
    """The choice that a plan's lines make, and the errors that they state, by layer path."""
    choice: dict[str, QuantConfig] = {}
    errors: dict[str, LayerError] = {}
    for i, entry in enumerate(entries):
        # A line must name a layer that no other line names.
        named = isinstance(entry, dict) and isinstance(entry.get("layer"), str)
        if not named or "as" not in entry:
            raise file.error("a layer's line must be {layer: PATH, as: CONFIG}", "layers", i)
        if unknown := entry.keys() - LAYER_KEYS:
            raise file.error(
                f"a layer has no key {min(map(str, unknown))!r}: there are {', '.join(LAYER_KEYS)}",
                "layers",
                i,
            )
        path = entry["layer"]
        if path in choice:
            raise file.error(f"the layer {path} is named twice", "layers", i)

        try:
            choice[path] = parse_config(str(entry["as"]))
        except UsageError as error:
            raise file.error(str(error), "layers", i) from None
        mean, worst = _figure(entry.get("nmse")), _figure(entry.get("worst"))
        if mean is not None and worst is not None:
            errors[path] = LayerError(mean, worst)
    return choice, errors


def _one_of(
    data: Mapping[str, Any], key: str, default: str, allowed: Collection[str], file: _File
) -> str:
    """A value of the plan that must be one of some words (else a MintError)."""
    value = data.get(key) or default
    if not isinstance(value, str) or value not in allowed:
        raise file.error(f"{key} must be one of {', '.join(allowed)}", key)
    return value


def _versions(value: Any) -> dict[str, str]:
    """Versions of packages; none where the file states none."""
    return {str(k): str(v) for k, v in value.items()} if isinstance(value, dict) else {}


def _speed(entry: Any) -> Speed | None:
    """The predicted speed that a plan states; None where it states none that makes sense."""
    if not isinstance(entry, dict):
        return None
    names = ("tokens_per_second", "low", "high", "context")
    numbers = [figure for name in names if (figure := _figure(entry.get(name)))]
    if len(numbers) < len(names):
        return None
    middle, low, high, context = numbers
    machine = str(entry.get("machine"))
    return Speed(middle, (low, high), int(context), machine, entry.get("estimated") is True)


def _speed_goal(entry: Any) -> str | None:
    """The least speed that a plan was made for."""
    return _text(entry.get("goal")) if isinstance(entry, dict) else None


def _figure(value: Any) -> float | None:
    """A number of zero or more; None for anything else that a plan may state."""
    return float(value) if type(value) in (int, float) and 0 <= value < LARGE else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
