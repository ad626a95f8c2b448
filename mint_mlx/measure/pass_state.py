"""How far a walk through a model has come: what its blocks read, and what was found on the way
back, in one folder.

An interrupted walk goes on from there, to the same numbers.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from ..base.files import atomic_write, lock_folder, read_tensors, write_tensors

if TYPE_CHECKING:
    import mlx.core as mx


NAME = "mint-mlx-walk-"  # how the folders begin


@dataclass
class Found:
    """Rows of one layer: their weights |g|^2, experts (or None) and tokens."""

    weight: np.ndarray
    part: np.ndarray | None
    token: np.ndarray


@dataclass
class Part:
    """What one block, or what comes after the last, adds to a sensitivity (sensitivity.py).

    Attributes:
        trace: by layer, float64 (experts,).
        rows: by layer, those of its batches.
        metric: of the block's output.
        embedding: float32 (hidden, hidden), where the embedding was visited.
        left: by layer, the share of its errors' cost that error feedback leaves.
    """

    trace: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, list[Found]] = field(default_factory=dict)
    metric: np.ndarray | None = None
    embedding: np.ndarray | None = None
    left: dict[str, float] = field(default_factory=dict)


@contextmanager
def spilled(key: str | None, refused: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """A folder for one walk, removed at its end.

    With a key an interruption (Ctrl-C, a full disk, too little memory) leaves it for the next run
    of that key; what is `refused` does not.
    """
    lock = None if key is None else _locked(Path(tempfile.gettempdir()) / f"{NAME}{key}")
    if lock is None:  # no key, or another run has it
        with tempfile.TemporaryDirectory(prefix="mint-mlx-") as name:
            yield Path(name)
        return
    with lock:
        folder = Path(lock.name).parent
        try:
            yield folder
        except refused:  # it would be so next time
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def abandoned() -> list[Path]:
    """Folders of interrupted walks in the temporary folder, which the same command would go on
    from.
    """
    found = []
    for folder in sorted(Path(tempfile.gettempdir()).glob(f"{NAME}*")):
        if _own(folder) and (lock := lock_folder(folder)) is not None:
            lock.close()
            found.append(folder)
    return found


def _own(folder: Path) -> bool:
    """Whether it is a folder, and this user's."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def _locked(folder: Path) -> IO[str] | None:
    """A lock on a folder of this user's own that no other process can read."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _own(folder):
        return None
    try:
        return lock_folder(folder)
    except OSError:  # a file system without locks
        return None


def hidden(folder: Path, index: int) -> mx.array | None:
    """What the block of this index reads, (windows, tokens, hidden), where it was kept."""
    file = folder / f"hidden-{index}.safetensors"
    return read_tensors(file)["array"] if file.is_file() else None


def has_hidden(folder: Path, index: int) -> bool:
    """Whether that was kept."""
    return (folder / f"hidden-{index}.safetensors").is_file()


def needed(blocks: int, numbers: int, size: int) -> int:
    """Bytes of what all blocks read and the last returns, each so many numbers of so many bytes."""
    return (blocks + 1) * size * numbers


def spent(folder: Path) -> int:
    """Bytes of what the blocks read that are there already."""
    return sum(file.stat().st_size for file in folder.glob("hidden-*"))


def keep_hidden(folder: Path, index: int, array: mx.array) -> None:
    """Keep what a block reads, in the type that it has there."""
    write_tensors(folder / f"hidden-{index}.safetensors", {"array": array})


def parts(folder: Path, depth: int) -> tuple[dict[int, Part], mx.array | None]:
    """What blocks added on the way back, from the last (after it: `depth`) to the one that was
    reached.

    Returns:
        By index, and the gradient at the input of the last one; None where nothing was kept.
    """
    found: dict[int, Part] = {}
    for index in range(depth, -1, -1):
        one = _part(folder, index)
        if one is None:
            break
        found[index] = one
    return found, read_tensors(folder / f"grad-{min(found)}.safetensors")[
        "array"
    ] if found else None


def _part(folder: Path, index: int) -> Part | None:
    try:
        with np.load(folder / f"part-{index}.npz") as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    made = Part(metric=arrays.pop("metric", None), embedding=arrays.pop("embedding", None))
    made.trace = {name[6:]: array for name, array in arrays.items() if name.startswith("trace.")}
    made.left = {
        name[5:]: float(array) for name, array in arrays.items() if name.startswith("left.")
    }
    for path in (name[7:] for name in arrays if name.startswith("weight.")):
        found = Found(arrays[f"weight.{path}"], arrays.get(f"part.{path}"), arrays[f"token.{path}"])
        made.rows[path] = [found]
    return made


def keep_part(folder: Path, index: int, made: Part, grad: mx.array) -> None:
    """Keep what a block added and the gradient at its input; the gradient after it is dropped."""
    arrays = {f"trace.{path}": trace for path, trace in made.trace.items()}
    arrays |= {f"left.{path}": np.array(share) for path, share in made.left.items()}
    for path, rows in made.rows.items():
        arrays[f"weight.{path}"] = np.concatenate([r.weight for r in rows])
        arrays[f"token.{path}"] = np.concatenate([r.token for r in rows])
        parts = [r.part for r in rows if r.part is not None]
        if parts:
            arrays[f"part.{path}"] = np.concatenate(parts)
    arrays |= {
        name: array
        for name in ("metric", "embedding")
        if (array := getattr(made, name)) is not None
    }
    write_tensors(folder / f"grad-{index}.safetensors", {"array": grad})
    with atomic_write(folder / f"part-{index}.npz") as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    (folder / f"grad-{index + 1}.safetensors").unlink(missing_ok=True)
