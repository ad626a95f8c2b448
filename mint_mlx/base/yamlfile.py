"""Reads YAML from strangers: plain data only, with line numbers for messages.

Aliases are refused, since YAML bombs are made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import MintError

MAX_BYTES = 4_000_000  # the plan of a thousand layers has a twentieth of that
MAX_LINES = 20_000
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path, what: str) -> tuple[Any, yaml.Node | None]:
    """Read a file: its data, and its node tree for `line_of`.

    Args:
        path: the file.
        what: what it should be ("plan", "recipe"), for messages.

    Raises:
        MintError: missing, too large, not UTF-8, not YAML, or with aliases.
    """
    if not path.is_file():
        raise MintError(f"there is no {what} {path}: check the path")
    if path.stat().st_size > MAX_BYTES:
        raise MintError(f"{path} is too large for a {what}: check the path")

    # The text is composed once: resolving a node's type takes the most time by far.
    try:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > MAX_LINES:
            raise MintError(f"{path} is too large for a {what}: check the path")
        node = yaml.compose(text, Loader=_Loader)
        _check_nodes(node, path, what, set())
        return None if node is None else _Loader("").construct_document(node), node
    except (UnicodeDecodeError, RecursionError):
        raise MintError(f"{path} is not a readable {what}: save it as YAML in UTF-8") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise MintError(f"{path}{where} is not a readable {what} ({problem}): correct it") from None


def _check_nodes(
    node: yaml.Node | None, path: Path, what: str, met: set[int], line: int = 1
) -> None:
    """Refuse aliases, and a key that is given twice, of which YAML would silently use the last.

    Args:
        node: to check with all below it.
        path, what: as for `read_yaml`.
        met: ids of the nodes that were met before: an alias is a node that is met again.
        line: of the key or the list that it stands in.
    """
    if node is not None and id(node) in met:
        raise MintError(
            f"{path}, line {line}: YAML aliases are not allowed in a {what}: write the value out"
        )
    met.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise MintError(f"{path}, line {line}: a key is a list or a table: write a name")
            if key.value in seen:
                raise MintError(f"{path}, line {line}: {key.value!r} is given twice: keep one")
            seen.add(key.value)
            met.add(id(key))
            _check_nodes(value, path, what, met, line)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_nodes(value, path, what, met, node.start_mark.line + 1)


def line_of(node: yaml.Node | None, location: Sequence[str | int]) -> int:
    """The line (from 1) of the deepest node on the way to a location like ("rules", 2, "floor")."""
    line = 1
    for step in location:
        child = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(step):
                    child = value
                    line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and type(step) is int and step < len(node.value):
            child = node.value[step]
            line = child.start_mark.line + 1
        if child is None:
            break
        node = child
    return line
