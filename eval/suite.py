"""Suites: several comparisons in one file, such as eval/paper.yaml."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..base.errors import MintError
from ..base.yamlfile import line_of, read_yaml


class Entry(BaseModel):
    """One comparison; its text and windows come before those of the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str
    budgets: tuple[str, ...] = ()
    given: tuple[str, ...] = Field(default=(), alias="with")
    methods: tuple[str, ...] | None = None
    text: str | None = None
    windows: int | None = None
    length: int | None = None
    baseline_text: str | None = None
    why: str = ""


def read_suite(path: Path) -> list[Entry]:
    """Read a suite: a list of entries.

    Raises:
        MintError: it isn't one, with file and line.
    """
    data, node = read_yaml(path, "suite")
    if not isinstance(data, list) or not data:
        raise MintError(
            f"{path} is not a suite: it must be a list of {{model: ..., budgets: [...]}}"
        )

    entries = []
    for i, item in enumerate(data):
        try:
            entries.append(Entry.model_validate(item))
        except ValidationError as error:
            first = error.errors()[0]
            location = [i, *(step for step in first["loc"] if isinstance(step, (str, int)))]
            raise MintError(f"{path}, line {line_of(node, location)}: {first['msg']}") from None
    return entries
