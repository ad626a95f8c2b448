"""What is kept between runs: profiles and sensitivities by their source's fingerprint, and what was
scored.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..base.errors import MintError, UsageError
from ..base.quant_config import QuantConfig
from ..base.report import Report
from ..checkpoint.source import Source
from .pass_state import abandoned
from .profile import Profile
from .profile_file import load_profile
from .sample import EXACT
from .sensitivity import Sensitivity
from .sensitivity_file import load_sensitivity


def cache_dir() -> Path:
    """The user's cache folder: MINT_MLX_CACHE, else $XDG_CACHE_HOME/mint-mlx, else
    ~/.cache/mint-mlx.
    """
    if own := os.environ.get("MINT_MLX_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mint-mlx"


def file_name(name: str) -> str:
    """A model's or method's name as a part of a file name."""
    return name.replace("/", "--")[-80:]


def profile_path(
    source: Source, candidates: dict[str, tuple[QuantConfig, ...]], sample: str
) -> Path:
    """Where a source's profile with these candidates, measured on such a sample, lies."""
    text = "\n".join(
        f"{path} {' '.join(map(str, configs))}" for path, configs in candidates.items()
    )
    key = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    name = f"{file_name(source.name)}-{source.fingerprint}-{key}"
    return cache_dir() / "profiles" / f"{name}{'' if sample == EXACT else f'-{sample}'}.json"


def cached_profile(
    source: Source, candidates: dict[str, tuple[QuantConfig, ...]], sample: str
) -> Profile | None:
    """A profile from an earlier run, if there is one that still fits: an exact one, or one on such
    a sample.

    A damaged one counts as none.
    """
    for kind in dict.fromkeys((EXACT, sample)):
        path = profile_path(source, candidates, kind)
        try:
            found = load_profile(path) if path.is_file() else None
        except (
            MintError,
            OSError,
        ):  # written by another version, or cut short by a full disk: measured anew
            continue
        if found is not None and found.origin.fingerprint == source.fingerprint:
            return found
    return None


@contextmanager
def report_write_errors(what: str, report: Report) -> Iterator[None]:
    """Keep something; where that can't be done it is made again next time, and the job goes on."""
    try:
        yield
    except OSError as error:
        report.note(
            f"the {what} could not be kept in {cache_dir()} ({error.strerror}): set MINT_MLX_CACHE"
        )


def sensitivity_path(source: Source, tokens: int) -> Path:
    """Where a source's sensitivity lies, with the tokens that it was measured on."""
    return (
        cache_dir()
        / "sensitivities"
        / f"{file_name(source.name)}-{source.fingerprint}-{tokens}.npz"
    )


def cached_sensitivity(source: Source, tokens: int) -> Sensitivity | None:
    """The sensitivity of an earlier run on so many tokens, if there is one that can be read."""
    try:
        return load_sensitivity(sensitivity_path(source, tokens))
    except (MintError, OSError):
        return None


KINDS = {  # folders of the cache, and what lies there
    "profiles": "errors of every layer (`profile`)",
    "sensitivities": "a model's own tokens and what it minds (`sensitivity`)",
    "references": "a source's predictions (`eval --source`)",
    "replies": "a source's replies to prompts (`eval --chat`)",
    "compare": "checkpoints that `compare` built, and their scores",
    "walks": "what an interrupted `sensitivity` goes on from, in the temporary folder",
}


@dataclass(frozen=True)
class Entry:
    """One thing that is kept."""

    kind: str
    path: Path
    bytes: int
    modified: float


def entries() -> list[Entry]:
    """All that is kept, by kind and name."""
    found = []
    for kind in KINDS:
        folder = cache_dir() / kind
        for path in (
            abandoned() if kind == "walks" else sorted(folder.iterdir()) if folder.is_dir() else []
        ):
            files = (
                [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            )
            stats = [file.stat() for file in files]
            newest = max((s.st_mtime for s in stats), default=path.stat().st_mtime)
            found.append(Entry(kind, path, sum(s.st_size for s in stats), newest))
    return found


def clear(kinds: Sequence[str] = ()) -> int:
    """Drop all that is kept, or that of some kinds; returns the bytes that it took.

    Raises:
        UsageError: there is no such kind.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"the cache has no {kind!r}: there are {', '.join(KINDS)}")
    dropped = [entry for entry in entries() if not kinds or entry.kind in kinds]
    for entry in dropped:
        shutil.rmtree(entry.path) if entry.path.is_dir() else entry.path.unlink()
    return sum(entry.bytes for entry in dropped)
