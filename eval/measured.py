"""What was measured of a checkpoint, kept in its folder: the report is made from it again.

The file is for any checkpoint of the same weights: of others (by their fingerprint) it counts as
absent. It may come from a stranger, so whatever is read is checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..base import schema
from ..base.checksum import Damaged, if_sound, read_checked, with_checksum
from ..base.files import MEASURED_FILE, write_text

SCHEMA = 1
TABLES = 10  # at most that are read
CELLS = 300  # of one table
CHARACTERS = 200  # of a cell

_NUMBERS = ("perplexity", "kl", "kl_median", "kl_p90", "kl_p99", "kl_p999", "kl_max", "same_top1")
_OPTIONAL = ("perplexity_se", "kl_se", "noise_floor")
_TEXTS = ("text", "source", "device", "protocol")


@dataclass(frozen=True)
class MeasuredTable:
    """A table that another measurement adds to the report.

    Attributes:
        title: of its section; a later table of the same title takes its place.
        text: what it shows and how it was measured.
        columns: names.
        lines: cells, as text.
    """

    title: str
    text: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Measurements:
    """What was measured of a checkpoint.

    Attributes:
        fingerprint: of its weights.
        figures: of `evaluate` with a source, `spread` included; None where that wasn't run.
        tables: of other measurements.
    """

    fingerprint: str
    figures: Mapping[str, Any] | None = None
    tables: tuple[MeasuredTable, ...] = ()


def read_measured(folder: Path, fingerprint: str) -> Measurements:
    """What the folder tells of these weights; nothing where it is absent, damaged or of others."""

    def read(path: Path) -> Measurements:
        try:
            return _from_json(read_checked(path))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise Damaged(f"{path} is damaged") from None

    measured = if_sound(folder / MEASURED_FILE, read)
    if measured is None or measured.fingerprint != fingerprint:
        return Measurements(fingerprint)
    return measured


def keep_figures(folder: Path, fingerprint: str, figures: Mapping[str, Any]) -> Measurements:
    """Write figures of `evaluate` beside the weights, and return all that is known of them."""
    plain = {key: value for key, value in figures.items() if not key.startswith("window_")}
    return _keep(folder, replace(read_measured(folder, fingerprint), figures=plain))


def keep_table(folder: Path, fingerprint: str, table: MeasuredTable) -> Measurements:
    """Write a table beside the weights, in place of one of its title, and return all there is."""
    measured = read_measured(folder, fingerprint)
    others = tuple(other for other in measured.tables if other.title != table.title)
    return _keep(folder, replace(measured, tables=(*others, table)))


def _keep(folder: Path, measured: Measurements) -> Measurements:
    data = {
        "mint_mlx_measured": SCHEMA,
        "fingerprint": measured.fingerprint,
        "figures": measured.figures,
        "tables": [asdict(table) for table in measured.tables],
    }
    write_text(folder / MEASURED_FILE, with_checksum(json.dumps(data)) + "\n")
    return measured


def _from_json(data: Any) -> Measurements:
    """What a file holds.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is none of ours.
    """
    if data["mint_mlx_measured"] != SCHEMA:
        raise ValueError("of another version")
    figures = data["figures"]
    if figures is not None:
        _check_figures(figures)
    tables = tuple(_table(entry) for entry in data["tables"][:TABLES])
    return Measurements(schema.text(data["fingerprint"]), figures, tables)


def _check_figures(figures: Mapping[str, Any]) -> None:
    """Refuse figures that the report can't show."""
    for key in _NUMBERS:
        schema.number(figures[key])
    for key in _OPTIONAL:
        if figures[key] is not None:
            schema.number(figures[key])
    for key in _TEXTS:
        schema.text(figures[key])
    for key in ("windows", "tokens", "length"):
        schema.integer(figures[key], 0, 2**60)
    schema.integer(figures.get("shortest", 0), 0, 2**60)

    spread = figures["spread"]
    edges = [schema.number(edge, -30, 30) for edge in spread["edges"]]
    if edges != sorted(edges) or not 2 <= len(edges) <= 200:
        raise ValueError("no bins")
    for key in ("tokens", "kl"):
        if len([schema.number(share, 0, 1.001) for share in spread[key]]) != len(edges) - 1:
            raise ValueError("bins without shares")
    schema.number(spread["half"], 0, 1)
    for place in spread["worst"]:
        for key in ("kl", "source", "model"):
            schema.number(place[key])
        for key in ("before", "token", "after", "favourite"):
            schema.text(place[key])


def _table(entry: Mapping[str, Any]) -> MeasuredTable:
    """A table of the file."""
    columns = tuple(schema.text(name) for name in entry["columns"])
    if not columns:
        raise ValueError("a table without columns")
    lines = tuple(_line(line, len(columns)) for line in entry["lines"][: CELLS // len(columns)])
    return MeasuredTable(schema.text(entry["title"]), schema.text(entry["text"]), columns, lines)


def _line(line: Sequence[Any], count: int) -> tuple[str, ...]:
    cells = tuple(schema.text(cell)[:CHARACTERS] for cell in line)
    if len(cells) != count:
        raise ValueError("a line of another length")
    return cells
