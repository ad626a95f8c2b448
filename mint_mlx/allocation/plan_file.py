"""A plan's file: YAML that a person can read, edit and give back."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ..base.errors import MintError, UsageError
from ..base.files import write_text
from ..base.quant_config import QuantConfig, parse_config
from ..base.yamlfile import line_of, read_yaml
from ..checkpoint.layers import Inventory
from ..checkpoint.origin import Origin
from .plan import LayerError, Plan
from .uniform import active_ratio

SCHEMA = 1


def write_plan(plan: Plan, inventory: Inventory, path: Path) -> None:
    """Write a plan as YAML; the same plan gives the same bytes."""
    write_text(path, plan_text(plan, inventory))


def plan_text(plan: Plan, inventory: Inventory) -> str:
    """The plan file's text."""
    size = plan.layout(inventory).total
    lines = [
        "# A plan of mint-mlx: change `as` (4bit-g64, mxfp4, keep, ...), then `mint-mlx convert "
        "MODEL --plan FILE`.",
        f"mint_mlx_plan: {SCHEMA}",
        "source: "
        + _flow(
            name=plan.origin.source,
            revision=plan.origin.revision,
            structure=plan.origin.structure,
            content=plan.origin.content,
        ),
        f"budget: {_scalar(plan.budget)}",
        f"budget_bytes: {_scalar(plan.budget_bytes)}",
        f"recipe: {_scalar(plan.recipe)}",
        f"objective: {_scalar(plan.objective)}",
        f"quantizer: {_scalar(plan.quantizer)}",
        f"effort: {_scalar(plan.effort)}",
        f"parts: {_scalar(plan.parts)}",
        f"loss: {_scalar(plan.loss)}",
        f"gap: {_scalar(plan.gap)}",
        f"bytes: {size}",
        f"parameters: {inventory.parameters}",
        f"bits_per_weight: {size * 8 / inventory.parameters:.4f}",
        f"active_bytes: {inventory.active_bytes(plan.choice)}",
        f"active_bytes_ratio: {active_ratio(inventory, plan.choice):.4f}  # to uniform 4bit-g64",
        f"versions: {_flow(**plan.versions)}",
        f"choice: {_scalar(_digest(plan.choice))}  # of the lines below, to tell an edit",
        "layers:",
    ]
    for layer in inventory.layers:
        config = plan.choice[layer.path]
        entry: dict[str, Any] = {
            "layer": layer.path,
            "as": str(config),
            "role": layer.role,
            "weights": layer.size,
        }
        entry["bytes"] = layer.bytes(config)
        error = plan.errors.get(layer.path)
        if error is not None:
            entry |= {"nmse": _round(error.mean), "worst": _round(error.worst)}
        lines.append(f"- {_flow(**entry)}")
    return "\n".join(lines) + "\n"


HEADER = (  # of a plan's file, as written above
    *(
        "mint_mlx_plan",
        "source",
        "budget",
        "budget_bytes",
        "recipe",
        "objective",
        "quantizer",
        "effort",
        "parts",
    ),
    *(
        "loss",
        "gap",
        "bytes",
        "parameters",
        "bits_per_weight",
        "active_bytes",
        "active_bytes_ratio",
    ),
    *("versions", "choice", "layers"),
)


LINE = ("layer", "as", "role", "weights", "bytes", "nmse", "worst")


def _digest(choice: dict[str, QuantConfig]) -> str:
    lines = "\n".join(f"{path} {config}" for path, config in sorted(choice.items()))
    return hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()


def _round(value: float) -> float:
    return float(f"{value:.4g}")


_PLAIN = re.compile(r"[A-Za-z_][\w./+-]*")


_RESERVED = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"{value:.6g}" if "e" not in f"{value:.6g}" else f"{value:.5e}"
    if isinstance(value, int):
        return str(value)
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _RESERVED:
        return text
    return json.dumps(
        text, ensure_ascii=False
    )  # YAML's double quotes are JSON's, but for pairs of surrogates


def _flow(**entries: Any) -> str:
    return "{" + ", ".join(f"{key}: {_scalar(value)}" for key, value in entries.items()) + "}"


def read_plan(path: Path | str) -> Plan:
    """Read a plan file.

    Raises:
        MintError: with file and line, where it isn't one.
    """
    path = Path(path)
    data, node = read_yaml(path, "plan")

    def fail(problem: str, *location: str | int) -> MintError:
        return MintError(f"{path}, line {line_of(node, location)}: {problem}")

    if not isinstance(data, dict) or "mint_mlx_plan" not in data:
        raise MintError(
            f"{path} is not a plan: make one with `mint-mlx allocate PROFILE --budget B -o {path}`"
        )
    if data["mint_mlx_plan"] != SCHEMA:
        raise fail("this plan is of another version of mint-mlx: make it anew", "mint_mlx_plan")
    if unknown := data.keys() - HEADER:
        raise fail(
            f"a plan has no key {min(map(str, unknown))!r}: there are {', '.join(HEADER)}",
            min(unknown, key=str),
        )
    source = data.get("source") or {}
    if not isinstance(source, dict):
        raise fail("source must be a table", "source")
    if not isinstance(data.get("layers"), list):
        raise fail("a plan needs its layers as a list", "layers")
    choice: dict[str, QuantConfig] = {}
    errors: dict[str, LayerError] = {}
    for i, entry in enumerate(data["layers"]):
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("layer"), str)
            or "as" not in entry
        ):
            raise fail("a layer's line must be {layer: PATH, as: CONFIG}", "layers", i)
        if unknown := entry.keys() - LINE:
            raise fail(
                f"a layer has no key {min(map(str, unknown))!r}: there are {', '.join(LINE)}",
                "layers",
                i,
            )
        if entry["layer"] in choice:
            raise fail(f"the layer {entry['layer']} is named twice", "layers", i)
        try:
            choice[entry["layer"]] = parse_config(str(entry["as"]))
        except UsageError as error:
            raise fail(str(error), "layers", i) from None
        mean, worst = entry.get("nmse"), entry.get("worst")
        if isinstance(mean, float) and isinstance(worst, float):
            errors[entry["layer"]] = LayerError(mean, worst)
    edited = data.get("choice") not in (None, _digest(choice))
    figures: dict[str, Any] = {} if edited else data
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
        budget_bytes=figures["budget_bytes"]
        if isinstance(figures.get("budget_bytes"), int)
        else None,
        loss=figures["loss"] if isinstance(figures.get("loss"), float) else None,
        gap=float(figures["gap"]) if type(figures.get("gap")) in (int, float) else None,
        errors={} if edited else errors,
        edited=edited,
        recipe=str(data.get("recipe") or "default"),
        quantizer=str(data.get("quantizer") or Plan.quantizer),
        effort=str(data.get("effort") or "fast"),
        parts=str(data.get("parts") or "text"),
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
