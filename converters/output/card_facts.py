"""What a source's model card says of its licence and name: a few short texts, read with suspicion.

The card is a stranger's, so little of it is read, and nothing in it can fail a conversion.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ...base.side_files import may_be_copied

KEYS = ("license", "license_name", "license_link", "language")
MAX_BYTES = 65_536  # of the card
_MAX_TEXT = 200  # characters of a value
_MAX_LINES = 300  # of a value: a model may name many languages
_REPO = re.compile(r"(?<![\w./-])([A-Za-z0-9][\w.-]{0,95})/([A-Za-z0-9][\w.-]{0,95})(?<![.-])")
_HUB = re.compile(r"https?://(huggingface\.co|hf\.co)/")
_KEY = re.compile(r"([A-Za-z_]+)[ \t]*:")


def card_facts(folder: Path) -> dict[str, Any]:
    """The metadata under KEYS of a folder's README.md: short texts, of languages a list of such.

    Whatever is missing, long, or no text is left out.
    """
    values: dict[str, Any] = {}
    for key, lines in _blocks(_front_matter(folder / "README.md", folder)).items():
        if key in KEYS:
            value = _value("\n".join(lines[:_MAX_LINES])[: _MAX_LINES * 10])
            if _is_short(value) or (
                key == "language" and isinstance(value, list) and all(map(_is_short, value))
            ):
                values[key] = value
    return values


def guess_base(folder: Path) -> str | None:
    """The Hub's name of the model in a folder, as its own card tells it; None where it doesn't.

    That is the first `org/name` in it whose name is the folder's; else, of a card that says it is
    of a quantized copy, what that was made from.
    """
    text = _HUB.sub(" ", _card(folder / "README.md", folder))
    wanted = folder.resolve().name.casefold()
    for match in _REPO.finditer(text):
        if match[2].casefold() == wanted:
            return match[0]
    blocks = _blocks(_front_matter(folder / "README.md", folder))
    relation, base = (
        _value("\n".join(blocks.get(key, [])[:2])) for key in ("base_model_relation", "base_model")
    )
    base = base[0] if isinstance(base, list) and base else base
    quantized = relation == "quantized" and isinstance(base, str)
    return base if quantized and _REPO.fullmatch(base) else None


def _card(path: Path, folder: Path) -> str:
    """The beginning of a card; nothing where there is none that may be read."""
    if not may_be_copied(path, folder):
        return ""
    with path.open("rb") as file:
        return file.read(MAX_BYTES).decode(errors="replace")


def _front_matter(path: Path, folder: Path) -> list[str]:
    """The lines between the first two `---` of a card."""
    lines = _card(path, folder).splitlines()
    marks = [i for i, line in enumerate(lines) if line.rstrip() == "---"][:2]
    return lines[1 : marks[1]] if len(marks) == 2 and marks[0] == 0 else []


def _blocks(lines: list[str]) -> dict[str, list[str]]:
    """The lines of each key, which begin at the left edge; the first of a name counts."""
    blocks: dict[str, list[str]] = {}
    current: list[str] = []
    for line in lines:
        if key := _KEY.match(line):
            current = [line]
            blocks.setdefault(key[1], current)
        else:
            current.append(line)
    return blocks


def _value(text: str) -> Any:
    """What a key's lines say, every scalar as a text: YAML's dates and numbers can't go wrong."""
    try:
        data = yaml.load(text, Loader=yaml.BaseLoader)
        return next(iter(data.values())) if isinstance(data, dict) else None
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, KeyError):
        return None


def _is_short(value: Any) -> bool:
    """Whether it is a text of one line that can be shown."""
    return isinstance(value, str) and 0 < len(value) <= _MAX_TEXT and value.isprintable()
