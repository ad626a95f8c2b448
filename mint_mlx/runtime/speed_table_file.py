"""A speed table's file: JSON with a checksum, written atomically and checked as it is read.

Tables of machines that were measured come with the package (mint_mlx/speed_tables/)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..base import schema
from ..base.checksum import Form, load_form, with_checksum
from ..base.files import write_text
from ..base.quant_config import QuantConfig, parse_config
from ..checkpoint.layers import FLOATS
from .speed_table import LayerKind, Rest, SpeedTable, Timing

SCHEMA = 2  # a file of another number is made anew
FORM = Form("speed table", "mint_mlx_speed", SCHEMA, "mint-mlx speed", "MODEL --save")
MARKER = rb'\A\{("checksum": "[0-9a-f]{32}", )?"mint_mlx_speed":'
BUNDLED = Path(__file__).parent.parent / "speed_tables"
_KINDS = ("linear", "experts", "multi-linear")
_LARGEST = 2**40  # rows, columns or experts
_LONGEST = 1e6  # seconds
_TOKENS = 2**30


def save_table(table: SpeedTable, path: Path) -> None:
    """Write a speed table, one kind of layer a line."""
    head = {
        "mint_mlx_speed": SCHEMA,
        "machine": table.machine,
        "versions": dict(table.versions),
        "clock": _digits(table.clock),
        "rests": [
            {
                "key": key,
                "name": rest.name,
                "seconds": {str(context): _digits(s) for context, s in rest.seconds.items()},
                "spread": _digits(rest.spread),
            }
            for key, rest in table.rests.items()
        ],
    }
    lines = [json.dumps(_kind_to_json(kind, table)) for kind in sorted(table.layers)]
    text = json.dumps(head)[:-1] + ',\n"layers": [\n' + ",\n".join(lines) + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, with_checksum(text))


def _kind_to_json(kind: LayerKind, table: SpeedTable) -> dict[str, Any]:
    return {
        "kind": kind.kind,
        "shape": list(kind.shape),
        "active": kind.active,
        "dtype": kind.dtype,
        "times": {
            str(config): {
                str(batch): [_digits(timing.seconds), _digits(timing.spread)]
                for batch, timing in sorted(batches.items())
            }
            for config, batches in sorted(table.layers[kind].items())
        },
    }


def _digits(value: float) -> float:
    """Four digits: more than a clock can tell."""
    return float(f"{value:.4g}")


def load_table(path: Path | str) -> SpeedTable:
    """Read a speed table.

    Raises:
        MintError: there is no such file, it isn't one, or it is of another version.
        Damaged: bytes of it have changed, or its numbers are impossible.
    """
    return load_form(Path(path), FORM, _from_json)


def _from_json(data: dict[str, Any]) -> SpeedTable:
    """A table from its file's data.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, UsageError: the data is damaged.
    """
    layers: dict[LayerKind, dict[QuantConfig, dict[int, Timing]]] = {}
    for entry in data["layers"]:
        kind = _kind(entry)
        if kind in layers:
            raise ValueError(f"{kind} stands twice")
        layers[kind] = {
            parse_config(config): {
                _tokens(batch): Timing(
                    schema.number(seconds, 0, _LONGEST), schema.number(spread, 0, _LONGEST)
                )
                for batch, (seconds, spread) in batches.items()
            }
            for config, batches in entry["times"].items()
        }
        if any(t.seconds <= 0 for times in layers[kind].values() for t in times.values()):
            raise ValueError("a layer takes no time")

    rests = {}
    for entry in data["rests"]:
        if not re.fullmatch(r"[0-9a-f]{16}", schema.text(entry["key"])) or not entry["seconds"]:
            raise ValueError("a model without a key or a time")
        # The clock's noise can leave less than nothing beside the layers.
        seconds = {
            _tokens(context): schema.number(value, -_LONGEST, _LONGEST)
            for context, value in entry["seconds"].items()
        }
        spread = schema.number(entry["spread"], 0, _LONGEST)
        rests[entry["key"]] = Rest(schema.text(entry["name"]), seconds, spread)
    versions = {schema.text(k): schema.text(v) for k, v in data["versions"].items()}
    clock = schema.number(data["clock"], 0, _LONGEST)
    return SpeedTable(schema.text(data["machine"]), versions, layers, rests, clock=clock)


def _kind(entry: dict[str, Any]) -> LayerKind:
    experts, rows, columns = (schema.integer(n, 1, _LARGEST) for n in entry["shape"])
    active = schema.integer(entry["active"], 1, experts)
    if entry["kind"] not in _KINDS or entry["dtype"] not in FLOATS:
        raise ValueError("a layer of an unknown kind or type")
    return LayerKind(entry["kind"], (experts, rows, columns), active, entry["dtype"])


def _tokens(text: str) -> int:
    """A number of tokens that is a key."""
    if not re.fullmatch(r"[1-9][0-9]{0,9}", text):
        raise ValueError(f"{text!r} is no number of tokens")
    return schema.integer(int(text), 1, _TOKENS)


def bundled_tables() -> dict[str, Path]:
    """The tables that come with the package, by name."""
    return {path.stem: path for path in sorted(BUNDLED.glob("*.json"))}
