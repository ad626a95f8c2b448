"""The journal of a work folder: which modules were written there, with a hash of each tensor.

One line of JSON each, with a checksum; the first says what the work is made from.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...base.checksum import Damaged, if_sound, parse_checked, warn


def read_journal(journal: Path) -> list[Any]:
    """A journal's entries, the identity first; none where that one is damaged.

    A damaged line of a module, or one that a kill cut short, is left out: the module is written
    anew.
    """
    text = if_sound(journal, lambda path: path.read_text(encoding="utf-8", errors="replace")) or ""
    entries: list[Any] = []
    for i, line in enumerate(text.splitlines(keepends=True)):
        try:
            entry = parse_checked(line, old='{"unit": ' if i else '{"source": ')
            is_module = isinstance(entry["unit"], str) if i else True
            has_hashes = isinstance(entry["hash"], str) if i else isinstance(entry, dict)
            if not (is_module and has_hashes and isinstance(entry.get("hashes", []), list)):
                raise Damaged("no entry")
            entries.append(entry)
        except (Damaged, TypeError, KeyError):
            if line.endswith("\n"):  # else a kill cut it short
                warn(f"a line of {journal} is damaged: what it says was written is written anew")
            if not entries:
                return []
    return entries


def hash_of(file: int, start: int, count: int) -> str:
    """SHA-256 of some bytes of an open file in hex; of fewer where the file ends before."""
    digest = hashlib.sha256()
    end = start + count
    while start < end:
        block = os.pread(file, min(1 << 24, end - start), start)
        if not block:
            break
        digest.update(block)
        start += len(block)
    return digest.hexdigest()


def combine(hashes: Iterable[str]) -> str:
    """One hash of several tensors' hashes."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, hashes))).hexdigest()
