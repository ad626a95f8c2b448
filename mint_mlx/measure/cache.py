"""The cache between runs: profiles and sensitivities by their source's fingerprint, and scores."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..base.checksum import Damaged, if_sound
from ..base.errors import MintError, UsageError
from ..base.files import lock_file, open_to_append, shared
from ..base.quant_config import QuantConfig
from ..base.remove import DESKTOP, Stranger
from ..base.report import Report
from ..checkpoint.layers import Inventory
from ..checkpoint.source import Source
from ..runtime.speed_table import SpeedTable
from ..runtime.speed_table_file import load_table
from . import cache_files, pass_state
from .profile import Profile
from .profile_file import load_profile
from .sample import EXACT
from .sensitivity import Sensitivity
from .sensitivity_file import check_sensitivity, load_sensitivity


def cache_dir() -> Path:
    """The user's cache folder: MINT_MLX_CACHE, $XDG_CACHE_HOME/mint-mlx or ~/.cache/mint-mlx."""
    if folder := os.environ.get("MINT_MLX_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mint-mlx"


def file_name(name: str) -> str:
    """The name of a model or a method, made fit for a file name."""
    return name.replace("/", "--")[-80:]


def profile_path(
    source: Source, candidates: dict[str, tuple[QuantConfig, ...]], sample: str
) -> Path:
    """The cache's file for a source's profile with these candidates, measured on this sample."""
    text = "\n".join(
        f"{path} {' '.join(map(str, configs))}" for path, configs in candidates.items()
    )
    # Profiles of versions that looked for no grids, or at no gains, have keys without these words.
    text += "\ngrids gains" + ("" if source.dtype is None else f"\n{source.dtype}")
    key = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    name = f"{file_name(source.name)}-{source.fingerprint}-{key}"
    suffix = "" if sample == EXACT else f"-{sample}"
    return cache_dir() / "profiles" / f"{name}{suffix}.json"


def cached_profile(
    source: Source, candidates: dict[str, tuple[QuantConfig, ...]], sample: str
) -> Profile | None:
    """A source's profile from an earlier run, exact or on this sample.

    None where there is none, one of another version, or a damaged one (with a warning).
    """

    def read(path: Path) -> Profile:
        profile = load_profile(path)
        wanted = {p: tuple(c for c in configs if c.quantized) for p, configs in candidates.items()}
        if {p: curve.configs for p, curve in profile.curves.items()} != wanted:
            raise Damaged(f"{path} is the profile of other layers")
        return profile

    for kind in dict.fromkeys((EXACT, sample)):
        profile = if_sound(profile_path(source, candidates, kind), read)
        if profile is not None and profile.origin.fingerprint == source.fingerprint:
            return profile
    return None


@contextmanager
def report_write_errors(what: str, report: Report) -> Iterator[None]:
    """Report a failure to write to the cache, and go on: the next run makes the thing again.

    Args:
        what: is written.
        report: is told.
    """
    try:
        yield
    except OSError as error:
        report.note(
            f"the {what} could not be written to the cache {cache_dir()} ({error.strerror}): set "
            "MINT_MLX_CACHE to another folder"
        )


@contextmanager
def using(kind: str) -> Iterator[None]:
    """Keep `clear` from deleting files of one kind, while something is made of them or read."""
    with shared(_lock_path(kind)):
        yield


@contextmanager
def _unused(kind: str) -> Iterator[bool]:
    """Keep others from using files of one kind; False where a run uses them already."""
    if kind == "walks":  # each has a lock of its own
        yield True
        return
    with open_to_append(_lock_path(kind)) as file:
        yield lock_file(file)


def _lock_path(kind: str) -> Path:
    return cache_dir() / f".{kind}.lock"


def sensitivity_path(source: Source, tokens: int, twin: str = "") -> Path:
    """The cache's file for a source's sensitivity, measured on so many tokens.

    Args:
        source: the model.
        tokens: of its text.
        twin: the key of the twin that wrote them (jobs/twin.py); '' for the source's own text.
    """
    name = f"{file_name(source.name)}-{source.fingerprint}-{tokens}"
    suffix = f"-twin-{twin}" if twin else ""
    return cache_dir() / "sensitivities" / f"{name}{suffix}.npz"


def cached_sensitivity(
    source: Source, inventory: Inventory, tokens: int, twin: str = ""
) -> Sensitivity | None:
    """The sensitivity of an earlier run on so many tokens, of the source's own or a twin's.

    None where there is none, one of another version, or a damaged one (with a warning).
    """

    def read(path: Path) -> Sensitivity:
        sensitivity = load_sensitivity(path)
        check_sensitivity(sensitivity, inventory)
        rows, length = sensitivity.tokens.shape
        fits = rows == -(-tokens // length)
        if not fits or not sensitivity.origin.matches(source.origin):
            raise Damaged(f"{path} is the sensitivity of another model or text")
        return sensitivity

    return if_sound(sensitivity_path(source, tokens, twin), read)


def speed_path(name: str, key: str, machine: str, versions: Mapping[str, str]) -> Path:
    """The cache's file for the times of a model's layers on a machine.

    Args:
        name: of the model.
        key: of its layers (speed_table.model_key).
        machine: its name.
        versions: of what ran.
    """
    text = f"{machine} {sorted(versions.items())}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return cache_dir() / "speeds" / f"{file_name(name)}-{key}-{digest}.json"


def cached_speeds(key: str, machine: str, versions: Mapping[str, str]) -> SpeedTable | None:
    """The times of a model's layers from an earlier run, whatever the model was called.

    None where there are none, of another version, or damaged ones (with a warning).
    """
    place = speed_path("*", key, machine, versions)
    for path in sorted(place.parent.glob(place.name)):
        table = if_sound(path, load_table)
        if table is not None and table.machine == machine and key in table.rests:
            return table
    return None


# The folders of the cache, and what lies there.
KINDS = {
    "profiles": "errors of every layer (`profile`)",
    "sensitivities": "text that a model wrote, and which errors it is sensitive to (`sensitivity`)",
    "references": "a source's predictions (`eval --source`)",
    "speeds": "times of a model's layers on this machine (`speed`)",
    "replies": "a source's replies to prompts (`eval --chat`)",
    "compare": "checkpoints that `compare` built, and their scores",
    "walks": "what an interrupted `sensitivity` resumes from, in the temporary folder",
}


@dataclass(frozen=True)
class Entry:
    """One file or folder of the cache."""

    kind: str
    path: Path
    bytes: int
    modified: float


def entries() -> list[Entry]:
    """All entries of the cache that this program wrote, by kind and name."""
    listed = []
    for kind in KINDS:
        for path in _paths(kind):
            files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
            stats = [file.lstat() for file in files]
            newest = max((s.st_mtime for s in stats), default=path.stat().st_mtime)
            listed.append(Entry(kind, path, sum(s.st_size for s in stats), newest))
    return listed


def strangers(kinds: Sequence[str] = ()) -> list[Path]:
    """What lies in the cache's folders and is not this program's: it stays."""
    paths = []
    for kind in kinds or KINDS:
        folder = cache_dir() / kind
        if kind == "walks":
            paths += pass_state.strangers()
        elif folder.is_symlink():
            paths.append(folder)
        elif folder.is_dir():
            ours = {path for path in folder.iterdir() if cache_files.is_ours(kind, path)}
            paths += sorted(
                path for path in folder.iterdir() if path not in ours and path.name != DESKTOP
            )
    return paths


def _paths(kind: str) -> list[Path]:
    """The files and folders of one kind that are ours; none in a folder that is only linked."""
    if kind == "walks":
        return pass_state.abandoned()
    folder = cache_dir() / kind
    if folder.is_symlink() or not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if cache_files.is_ours(kind, path))


def clear(kinds: Sequence[str] = ()) -> int:
    """Delete all entries, or those of some kinds; returns how many bytes they took.

    Raises:
        UsageError: there is no such kind.
        MintError: another run uses what a kind holds, or a checkpoint in the cache holds something
            that isn't ours; that stays, and all others are deleted.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"the cache has no {kind!r}: there are {', '.join(KINDS)}")
    freed = 0
    refused: MintError | None = None
    listed = entries()
    for kind in kinds or KINDS:
        chosen = [entry for entry in listed if entry.kind == kind]
        if not chosen:
            continue
        with _unused(kind) as unused:
            if not unused:
                refused = refused or MintError(
                    f"another run uses `{kind}` of the cache, which stays: run the same command "
                    "again once it has ended"
                )
                continue
            for entry in chosen:
                try:
                    cache_files.remove(kind, entry.path)
                    freed += entry.bytes
                except Stranger as error:
                    refused = refused or error
    if refused is not None:
        raise refused
    return freed
