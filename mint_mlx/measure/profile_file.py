"""A profile's file: JSON with a checksum, written atomically and checked as it is read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..base import schema
from ..base.checksum import Form, load_form, with_checksum
from ..base.files import write_text
from ..base.quant_config import parse_config
from ..base.safetensors_header import ITEMSIZE
from ..checkpoint.layers import Inventory, Layer
from ..checkpoint.layout import TensorSpec
from ..checkpoint.origin import Origin
from ..rules.recipes import Recipe
from .curve import RateDistortion, check_curve, curve_from_json, curve_to_json
from .profile import Profile

SCHEMA = 3  # a file of another number is made anew
FORM = Form("profile", "mint_mlx_profile", SCHEMA, "mint-mlx profile", "MODEL -o")
LARGEST = 2**40  # rows or columns of a tensor
KINDS = ("linear", "embedding", "experts", "multi-linear")


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile as JSON, one layer a line."""
    head = {
        "mint_mlx_profile": SCHEMA,
        "source": profile.origin.source,
        "revision": profile.origin.revision,
        "structure": profile.origin.structure,
        "content": profile.origin.content,
        "recipe": profile.recipe.model_dump(),
        "quantizer": profile.quantizer,
        "weighting": profile.weighting,
        "sample": profile.sample,
        "seed": profile.seed,
        "versions": profile.versions,
        "order": profile.inventory.order,
        "carried": profile.inventory.carried,
        "others": {
            owner: [asdict(s) for s in specs] for owner, specs in profile.inventory.others.items()
        },
    }

    # The layers come last, so that the closing brace of the head is where they are inserted.
    lines = []
    for layer in profile.inventory.layers:
        entry = _layer_to_json(layer) | curve_to_json(profile.curves[layer.path])
        lines.append(json.dumps(entry))
    text = json.dumps(head, indent=None)[:-1] + ',\n"layers": [\n' + ",\n".join(lines) + "\n]}\n"
    write_text(path, with_checksum(text))


def load_profile(path: Path | str) -> Profile:
    """Read a profile.

    Raises:
        MintError: the file is missing, not a profile, or of another version of this program.
        Damaged: bytes of it have changed, or its numbers are impossible.
    """
    return load_form(Path(path), FORM, _from_json, old='{"mint_mlx_profile": ')


def _from_json(data: dict[str, Any]) -> Profile:
    """A profile from its file's data.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, UsageError: the data is damaged.
    """
    layers: list[Layer] = []
    curves: dict[str, RateDistortion] = {}
    for entry in data["layers"]:
        curve = {key: entry.pop(key) for key in ("share", "error", "energy", "nmse")}
        # Only some layers have these.
        curve |= {key: entry.pop(key) for key in ("grids", "grid_nmse", "weighted") if key in entry}
        layer = _layer_from_json(entry)
        if layer.path in curves:
            raise ValueError(f"{layer.path} is named twice")
        layers.append(layer)
        curves[layer.path] = curve_from_json(layer.path, curve)
        check_curve(curves[layer.path], layer)

    others = {owner: tuple(_spec(s) for s in specs) for owner, specs in data["others"].items()}
    inventory = Inventory(tuple(layers), others, tuple(data["order"]), tuple(data["carried"]))
    if sorted(inventory.order) != sorted([*curves, *others]) or not layers:
        raise ValueError("the order names other modules")
    if not set(inventory.carried) <= others.keys():
        raise ValueError("modules are carried along that aren't there")
    return Profile(
        origin=origin_from(data, schema.optional_text(data["revision"])),
        inventory=inventory,
        curves=curves,
        recipe=Recipe.model_validate(data["recipe"]),
        quantizer=schema.text(data["quantizer"]),
        weighting=schema.text(data["weighting"]),
        sample=schema.text(data["sample"]),
        seed=schema.integer(data["seed"], 0, 2**64),
        versions={schema.text(k): schema.text(v) for k, v in (data["versions"] or {}).items()},
    )


def origin_from(data: dict[str, Any], revision: str | None) -> Origin:
    """The origin that a file states.

    Raises:
        KeyError, ValueError: it states none.
    """
    source, structure, content = (schema.text(data[k]) for k in ("source", "structure", "content"))
    return Origin(source, revision, structure, content)


def _spec(data: dict[str, Any]) -> TensorSpec:
    return TensorSpec(schema.text(data["name"]), _dtype(data["dtype"]), _shape(data["shape"]))


def _dtype(code: Any) -> str:
    if code not in ITEMSIZE:
        raise ValueError(f"no type is called {code!r}")
    return str(code)


def _shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or len(shape) > 8:
        raise ValueError(f"{shape!r} is no shape")
    return tuple(schema.integer(n, 0, LARGEST) for n in shape)


def _layer_to_json(layer: Layer) -> dict[str, Any]:
    data = asdict(layer)
    data["class_config"] = str(layer.class_config) if layer.class_config else None
    data["stored"] = str(layer.stored) if layer.stored else None
    return data


def _layer_from_json(data: dict[str, Any]) -> Layer:
    """A layer from its entry.

    Raises:
        KeyError, TypeError, ValueError, UsageError: it is none.
    """
    data["shape"] = _shape(data["shape"])
    if len(data["shape"]) < 2 or 0 in data["shape"] or data["kind"] not in KINDS:
        raise ValueError("no such layer exists")
    data["dtype"] = _dtype(data["dtype"])
    for key in ("path", "role", "keep"):
        schema.text(data[key])
    data["reads"] = schema.number(data["reads"], 0, 1)
    schema.integer(data["floor"], 0, 16)
    data["extras"] = tuple(_spec(s) for s in data["extras"])
    for key in ("class_config", "stored"):
        data[key] = parse_config(data[key]) if data[key] else None
    return Layer(**data)
