"""What a source says of its quantization: of all weights, and of single ones."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

# In keys of tables by layer: what makes one a pattern, and dots that stand for themselves.
_PATTERN = re.compile(r"[^\w.-]")
_BARE_DOT = re.compile(r"(?<!\\)\.(?![*+?])")


@dataclass(frozen=True)
class Stated:
    """What a source says of its quantization beside the names, types and shapes of its tensors.

    Attributes:
        table: the `quantization_config`.
        values: reads the numbers of a small tensor by its name. They are all zero where the weights
            are not on this machine.
        keep_nvfp4: whether experts of NVFP4 stay packed.
    """

    table: dict[str, Any]
    values: Callable[[str], np.ndarray]
    keep_nvfp4: bool = False

    @property
    def method(self) -> str:
        return str(self.table.get("quant_method", "")).lower()

    def of_layer(self, stem: str) -> dict[str, Any]:
        """The table of one weight: what is said of it alone comes before what is said of all."""
        module = stem.removesuffix(".weight")
        if module in self._by_name:
            return self.table | self._by_name[module]
        for key, pattern, says in (*self._by_pattern[_block(module)], *self._by_pattern[""]):
            if pattern.search(module) if pattern else key in module:
                return self.table | says
        return self.table

    def _by_key(self, name: str) -> dict[str, dict[str, Any]]:
        """A table of tables by layer in config.json; other entries are left out."""
        table = self.table.get(name)
        items = table.items() if isinstance(table, dict) else ()
        return {key: says for key, says in items if isinstance(says, dict)}

    @cached_property
    def _by_name(self) -> dict[str, dict[str, Any]]:
        return self._by_key("extra_config")

    @cached_property
    def _by_pattern(self) -> dict[str, list[tuple[str, re.Pattern[str] | None, dict[str, Any]]]]:
        """What is said of layers by a pattern, or a part of their names (None), by their block.

        Keys of AutoRound's `extra_config` are names, parts of names or regular expressions, those
        of GPTQModel's `dynamic` regular expressions behind `+:`. Of these only whether a layer is
        symmetric is not seen in its tensors.
        """
        dynamic = self._by_key("dynamic")
        keyed = list(self._by_name.items())
        keyed += [(key.removeprefix("+:"), says) for key, says in dynamic.items() if "sym" in says]
        patterns = defaultdict(list)
        for key, says in keyed:
            try:
                pattern = re.compile(_BARE_DOT.sub(r"\.", key)) if _PATTERN.search(key) else None
                patterns[_block(key)].append((key, pattern, says))
            except re.error:  # no pattern
                continue
        return patterns

    @cached_property
    def schemes(self) -> list[dict[str, Any]]:
        """The tables of `weights` in the groups of a compressed-tensors config, with `targets`."""
        groups = self.table.get("config_groups")
        groups = groups.values() if isinstance(groups, dict) else ()
        tables = [group for group in groups if isinstance(group, dict)]
        return [
            {"targets": table.get("targets"), **table["weights"]}
            for table in tables
            if isinstance(table.get("weights"), dict)
        ]


def group_size(table: Mapping[str, Any], columns: int, groups: int) -> int | None:
    """Columns that share a scale; None where they don't fall into so many groups.

    The last group may have fewer: 192 columns in groups of 128 have two scales, as 192 in groups of
    96 would. What config.json says comes first.
    """
    size = table.get("group_size")
    if type(size) is int and size > 0 and -(-columns // size) == groups:
        return size
    return columns // groups if groups and columns % groups == 0 else None


def _block(name: str) -> str:
    """The number of the block that a name lies in, as it is written there; '' outside of all."""
    number, dot, _ = name.partition("layers.")[2].partition(".")
    return number if dot and number.isdecimal() else ""
