"""Finds the original of a GGUF file: it is not read, but its metadata may name the repository.

The layout is that of GGUF versions 2 and 3 (ggml's docs/gguf.md): magic, version, number of
tensors, number of key-value pairs, then the pairs; all little endian.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import BinaryIO

# Keys that may name the original, the surest first.
ORIGINS = (
    "general.source.huggingface.repository",
    "general.source.repo_url",
    "general.base_model.0.repo_url",
    "general.source.url",
)
# Bytes of each scalar type of the format, by its number.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 20  # bytes; no name or address is longer


def original_repo(path: Path) -> str | None:
    """The repository (org/name) that a GGUF file was made from; None where it names none."""
    try:
        with path.open("rb") as file:
            origins = _origins(file)
    # A damaged file names nothing.
    except (OSError, struct.error, ValueError, KeyError, RecursionError):
        return None
    for key in ORIGINS:
        match = re.fullmatch(
            r"(?:https?://huggingface\.co/)?([\w.-]+/[\w.-]+?)/?", origins.get(key, "")
        )
        if match:
            return match[1]
    return None


def _origins(file: BinaryIO) -> dict[str, str]:
    """The string values of the keys that may name the original."""
    if file.read(4) != b"GGUF":
        return {}
    _, _, pairs = _unpack(file, "<IQQ")
    origins = {}
    for _ in range(pairs):
        key = _string(file)
        (kind,) = _unpack(file, "<I")
        if kind == _STRING and key in ORIGINS:
            origins[key] = _string(file)
        else:
            _skip(file, kind)

        # The keys of `general.` come first, and the vocabulary after them is long.
        if len(origins) == len(ORIGINS) or key.startswith("tokenizer."):
            break
    return origins


def _unpack(file: BinaryIO, form: str) -> tuple[int, ...]:
    """The next numbers of a file, in a format of the struct module."""
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _string(file: BinaryIO) -> str:
    """The next string of a file (a ValueError where its length is impossible)."""
    (length,) = _unpack(file, "<Q")
    if length > _LONGEST:
        raise ValueError("a string of impossible length")
    return file.read(length).decode("utf-8", errors="replace")


def _skip(file: BinaryIO, kind: int) -> None:
    """Skip the next value of a file, which is of this type."""
    if kind == _STRING:
        (length,) = _unpack(file, "<Q")
        file.seek(length, 1)
    elif kind == _ARRAY:
        inner, count = _unpack(file, "<IQ")
        if inner in _SIZES:
            file.seek(_SIZES[inner] * count, 1)
        else:
            for _ in range(count):
                _skip(file, inner)
    else:
        file.seek(_SIZES[kind], 1)
