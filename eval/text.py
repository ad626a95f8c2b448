"""The text that is scored: WikiText-2's raw test split, shipped with the package, or a file."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from typing import Any

from ..base.errors import MintError
from ..checkpoint.tokenizer import encode

WIKITEXT = Path(__file__).parent / "data" / "wiki.test.raw.gz"
WIKITEXT_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
TELLING = 200_000  # characters of it by which tokenizers are told apart


def wikitext() -> str:
    """WikiText-2's raw test split (Merity et al., 2016; CC BY-SA 3.0), checked by its SHA-256.

    Raises:
        MintError: the installed file is damaged.
    """
    data = gzip.decompress(WIKITEXT.read_bytes())
    if hashlib.sha256(data).hexdigest() != WIKITEXT_SHA256:
        raise MintError(
            "the WikiText-2 text of this installation is damaged: install mint-mlx again"
        )
    return data.decode("utf-8")


def read_text(path: str | None) -> str:
    """A UTF-8 file, or WikiText-2 where no path is given.

    Raises:
        MintError: there is no such file, or it isn't UTF-8.
    """
    if path is None:
        return wikitext()
    file = Path(path).expanduser()
    if not file.is_file():
        raise MintError(f"there is no text file {path}: check the path")
    try:
        return file.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise MintError(f"{path} is not UTF-8 text: convert it to UTF-8 first") from None


def tokenizer_key(tokenizer: Any) -> str:
    """A hash of what a tokenizer does to WikiText-2, whatever file it came from."""
    ids = encode(tokenizer, wikitext()[:TELLING])
    return hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=8).hexdigest()


def check_same_tokenizer(source: str, key: str, tokenizer: Any) -> None:
    """Refuse to compare two models token by token whose tokens differ.

    Args:
        source: the other model's name.
        key: the other tokenizer's `tokenizer_key`.
        tokenizer: this model's.

    Raises:
        MintError: the tokenizers differ.
    """
    if tokenizer_key(tokenizer) != key:
        raise MintError(
            f"the tokenizers of the model and of {source} differ, so they cannot be compared token "
            "by token: give the source that the model was made from"
        )
