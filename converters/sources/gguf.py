"""GGUF files are not read; but the original repository that one names in its metadata goes into the
refusal.

The layout is that of GGUF versions 2 and 3 (ggml's docs/gguf.md): magic, version, number of
tensors, number of key-value pairs, then the pairs; all little endian.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import BinaryIO

ORIGINS = (
    "general.source.huggingface.repository",
    "general.source.repo_url",
    "general.base_model.0.repo_url",
    "general.source.url",
)
_SIZES = {
    0: 1,
    1: 1,
    2: 2,
    3: 2,
    4: 4,
    5: 4,
    6: 4,
    7: 1,
    10: 8,
    11: 8,
    12: 8,
}  # bytes of each scalar type
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 20  # no name or address is longer


def original_repo(path: Path) -> str | None:
    """The repository (org/name) that a GGUF file says it was made from, or None where it says
    nothing readable.
    """
    try:
        with path.open("rb") as file:
            found = _origins(file)
    except (
        OSError,
        struct.error,
        ValueError,
        KeyError,
        RecursionError,
    ):  # a damaged file names nothing
        return None
    for key in ORIGINS:
        match = re.fullmatch(
            r"(?:https?://huggingface\.co/)?([\w.-]+/[\w.-]+?)/?", found.get(key, "")
        )
        if match:
            return match[1]
    return None


def _origins(file: BinaryIO) -> dict[str, str]:
    """The string values of the keys that may name the original."""
    if file.read(4) != b"GGUF":
        return {}
    _, _, pairs = _unpack(file, "<IQQ")
    found = {}
    for _ in range(pairs):
        key = _string(file)
        (kind,) = _unpack(file, "<I")
        if kind == _STRING and key in ORIGINS:
            found[key] = _string(file)
        else:
            _skip(file, kind)
        if len(found) == len(ORIGINS) or key.startswith(
            "tokenizer."
        ):  # `general.` comes first; vocabularies are long
            break
    return found


def _unpack(file: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "<Q")
    if length > _LONGEST:
        raise ValueError("a string of impossible length")
    return file.read(length).decode("utf-8", errors="replace")


def _skip(file: BinaryIO, kind: int) -> None:
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
