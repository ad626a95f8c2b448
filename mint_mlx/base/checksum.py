"""Checksums of files that no person edits: what a disk or a hand has changed is never used.

The checksum stands in the file itself. Files of versions that wrote none are known by how they
begin, and judged by the schemas of their readers alone, as all others are beside it: a checksum
shows damage, not a stranger's numbers. Arrays are stored by array_files.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .errors import MintError, UsageError

KEY = "checksum"
MAX_TEXT = 400_000_000  # bytes; a profile of a thousand billion weights has a tenth of that
CHUNK = 1 << 24  # bytes read at once
_SEAL = re.compile(r'\{"checksum": "([0-9a-f]{32})", ')
T = TypeVar("T")


class DamagedFile(UserWarning):
    """A file in the cache or a work folder is damaged and isn't used; work goes on without it."""


class Damaged(MintError):
    """A file isn't what was written: bytes have changed, or its values are impossible."""


def hexdigest(data: bytes) -> str:
    """The checksum of some bytes: 128 bits of BLAKE2b."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def of_files(folder: Path) -> dict[str, str]:
    """The checksum of each file of a folder by its name; without subfolders and hidden files."""
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        digest = hashlib.blake2b(digest_size=16)
        with path.open("rb") as file:
            while data := file.read(CHUNK):
                digest.update(data)
        sums[path.name] = digest.hexdigest()
    return sums


def with_checksum(text: str) -> str:
    """A JSON object's text with its checksum as the first entry.

    Args:
        text: begins with `{` and has at least one entry. Newlines at its end don't count.
    """
    rest = text[1:].lstrip()
    return f'{{"{KEY}": "{hexdigest(rest.rstrip().encode())}", {rest}'


def parse_checked(text: str, old: str | None = None) -> Any:
    """The data of a JSON text, without its checksum.

    Args:
        text: the text.
        old: how a text of a version without checksums begins, which is taken as well.

    Raises:
        Damaged: it isn't JSON, or not what the checksum belongs to.
    """
    seal = _SEAL.match(text)
    if not seal and (old is None or not text.startswith(old)):
        raise Damaged("it has no checksum")
    rest = text[seal.end() :].rstrip().encode(errors="surrogatepass") if seal else b""
    if seal and hexdigest(rest) != seal[1]:
        raise Damaged("its checksum is wrong")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise Damaged("it is not JSON") from None
    if seal:
        del data[KEY]
    return data


def read_checked(path: Path, old: str | None = None) -> Any:
    """The data of a JSON file, without its checksum; `old` as for `parse_checked`.

    Raises:
        Damaged: it isn't JSON in UTF-8, or not what the checksum belongs to.
        OSError: it can't be read.
    """
    if path.stat().st_size > MAX_TEXT:
        raise Damaged("it is too large")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Damaged("it is not UTF-8") from None
    return parse_checked(text, old)


class Form(NamedTuple):
    """A kind of JSON file that a command makes.

    Attributes:
        what: it is, for a sentence.
        key: of the entry that holds its version.
        version: which this program reads.
        command: that makes it.
        words: of that command before the file's name.
    """

    what: str
    key: str
    version: int
    command: str
    words: str


def load_form(
    path: Path, form: Form, parse: Callable[[dict[str, Any]], T], old: str | None = None
) -> T:
    """Read a file that a command made; `old` as for `parse_checked`.

    Args:
        path: the file.
        form: what it must be.
        parse: makes of its data what is returned; any of its exceptions below means damage.

    Raises:
        MintError: the file is missing, not of this form, or of another version of this program.
        Damaged: bytes of it have changed, or its values are impossible (KeyError, TypeError,
            ValueError, AttributeError, OverflowError or UsageError of `parse`).
    """
    make = f"{form.command} {form.words}"
    if not path.is_file():
        raise MintError(f"there is no {form.what} {path}: make one with `{make} {path}`")
    try:
        data = read_checked(path, old)
    except Damaged as error:
        raise Damaged(
            f"{path} is not a {form.what}, or a damaged one ({error}): make it anew with `{make} "
            "FILE`"
        ) from None
    if not isinstance(data, dict) or form.key not in data:
        raise MintError(f"{path} is not a {form.what}: make one with `{make} FILE`")
    if data[form.key] != form.version:
        raise MintError(
            f"{path} was made by another version of mint-mlx: make it anew with `{form.command}`"
        )

    try:
        return parse(data)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, UsageError):
        raise Damaged(
            f"the {form.what} {path} is damaged: make it anew with `{form.command}`"
        ) from None


def if_sound(path: Path, read: Callable[[Path], T]) -> T | None:
    """What a file in the cache or a work folder holds; None where it is absent or damaged.

    Args:
        path: the file.
        read: reads it. Damaged and OSError become a warning (DamagedFile); any other MintError (a
            file of another version) counts as absent without a word.
    """
    try:
        return read(path) if path.is_file() else None
    except OSError as error:
        warn(f"{path} cannot be read ({error.strerror or error}): what it held is made anew")
    except Damaged:
        warn(f"{path} is damaged: what it held is made anew")
    except MintError:
        pass
    return None


def warn(text: str) -> None:
    """Warn that something damaged isn't used; the command line prints it as a note."""
    warnings.warn(text, DamagedFile, stacklevel=3)
