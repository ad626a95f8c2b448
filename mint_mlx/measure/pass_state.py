"""State of an interrupted sensitivity pass: hidden states and gradients of the blocks, in a folder.

The next run of the same pass resumes from it, to the same numbers.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import IO

import mlx.core as mx
import numpy as np

from ..base import schema
from ..base.array_files import read_npz, read_tensors, write_npz, write_tensors
from ..base.checksum import Damaged, if_sound
from ..base.files import LOCK, lock_folder
from ..base.remove import UNFINISHED, Kind, discard, find_stranger, remove_file
from ..base.scratch import scratch_folder

NAME = "mint-mlx-walk-"  # how the folders' names begin
ARRAY = "array"  # the one array of a file of hidden states or gradients


@dataclass(frozen=True)
class RowWeights:
    """|g|^2 at one layer's output, by row of what it read.

    Attributes:
        weight: float32 (rows,).
        expert: int32 (rows,), the expert of each row; None for a layer without.
        token: int32 (rows,), the token of each row, counted through all windows.
    """

    weight: np.ndarray
    expert: np.ndarray | None
    token: np.ndarray


@dataclass
class Contribution:
    """What one block, or what comes after the last, adds to a sensitivity (sensitivity.py).

    Attributes:
        trace: by layer, float64 (experts,).
        rows: by layer, those of its batches.
        metric: of the block's output.
        embedding: float32 (hidden, hidden), where the embedding was visited.
        remaining: by layer, the share of its errors' cost that error feedback leaves.
    """

    trace: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, list[RowWeights]] = field(default_factory=dict)
    metric: np.ndarray | None = None
    embedding: np.ndarray | None = None
    remaining: dict[str, float] = field(default_factory=dict)


@contextmanager
def pass_folder(key: str | None, refused: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """A folder for the state of one pass, removed at its end.

    Args:
        key: with one, an interruption (Ctrl-C, a full disk, too little memory) leaves the folder
            for the next run of that key.
        refused: exceptions that the next run would meet again, after which nothing is left.
    """
    lock = None if key is None else _locked(Path(tempfile.gettempdir()) / f"{NAME}{key}")
    if lock is None:  # no key, or another run has it
        with scratch_folder(WALK) as folder:
            yield folder
        return

    with lock:
        folder = Path(lock.name).parent
        try:
            yield folder
        except refused:
            discard(folder, WALK)
            raise
        discard(folder, WALK)


def abandoned() -> list[Path]:
    """Folders of interrupted passes, which the same command would resume, in the temporary one."""
    folders = []
    for folder in sorted(Path(tempfile.gettempdir()).glob(f"{NAME}*")):
        if find_stranger(folder, WALK) is None and (lock := lock_folder(folder)) is not None:
            lock.close()
            folders.append(folder)
    return folders


def strangers() -> list[Path]:
    """What keeps such folders from being deleted: links and files that this program didn't make."""
    folders = sorted(Path(tempfile.gettempdir()).glob(f"{NAME}*"))
    return [path for folder in folders if (path := find_stranger(folder, WALK)) is not None]


def _is_walk(folder: Path) -> bool:
    """Whether it is a folder of this name, and this user's; its lock marks one that holds files."""
    status = folder.lstat()
    is_users = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not is_users or not folder.name.startswith(NAME):
        return False
    return (folder / LOCK).is_file() or not any(folder.iterdir())


_FILES = (LOCK, "hidden-[0-9]*.safetensors", "grad-[0-9]*.safetensors", "part-[0-9]*.npz")
WALK = Kind("a walk", (*_FILES, UNFINISHED), is_ours=_is_walk, marks=(LOCK,))


def _locked(folder: Path) -> IO[str] | None:
    """A lock on a folder of this user's that no other user can read; None where there is none."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if find_stranger(folder, WALK) is not None:
            return None
    try:
        return lock_folder(folder)
    except OSError:  # a file system without locks
        return None


def _hidden_file(folder: Path, index: int) -> Path:
    return folder / f"hidden-{index}.safetensors"


def read_hidden(folder: Path, index: int, windows: tuple[int, ...]) -> mx.array | None:
    """What the block of this index reads, (windows, tokens, hidden), where it was written.

    A damaged file is deleted: it is written anew.

    Args:
        folder: of the pass.
        index: of the block.
        windows: the shape of the tokens.
    """
    return _read_array(_hidden_file(folder, index), windows)


def _read_array(file: Path, windows: tuple[int, ...]) -> mx.array | None:
    """The array in a file of one; None where it is missing or was damaged, and is deleted."""

    def read(file: Path) -> mx.array:
        tensors = read_tensors(file)
        if tensors.keys() != {ARRAY}:
            raise Damaged(f"{file} is damaged")
        array = tensors[ARRAY]
        sound = array.ndim == 3 and array.shape[:2] == windows
        if not (sound and mx.issubdtype(array.dtype, mx.floating) and mx.isfinite(array).all()):
            raise Damaged(f"{file} is damaged")
        return array

    array = if_sound(file, read)
    if array is None:
        remove_file(file)
    return array


def has_hidden(folder: Path, index: int) -> bool:
    """Whether that was written."""
    return _hidden_file(folder, index).is_file()


def write_hidden(folder: Path, index: int, array: mx.array) -> None:
    """Write what a block reads, in the type that it has there."""
    write_tensors(_hidden_file(folder, index), {ARRAY: array})


def bytes_needed(blocks: int, numbers: int, size: int) -> int:
    """Bytes of what all blocks read and the last returns.

    Args:
        blocks: how many.
        numbers: of each hidden state.
        size: bytes of a number.
    """
    return (blocks + 1) * size * numbers


def bytes_written(folder: Path) -> int:
    """Bytes of the hidden states that are there already."""
    return sum(file.stat().st_size for file in folder.glob("hidden-*"))


def read_contributions(
    folder: Path, depth: int, windows: tuple[int, ...], experts: Mapping[str, int]
) -> tuple[dict[int, Contribution], mx.array | None]:
    """What an earlier run computed on the way back.

    Args:
        folder: of the pass.
        depth: how many blocks there are, and the index of what comes after the last.
        windows: the shape of the tokens.
        experts: of each layer that is followed, by path.

    Returns:
        By index, from what comes after the last block down to the block that was reached; and the
        gradient at the input of that one. None where nothing was written.
    """
    contributions: dict[int, Contribution] = {}
    for index in range(depth, -1, -1):
        contribution = _read_contribution(folder, index, prod(windows), experts)
        if contribution is None:
            break
        contributions[index] = contribution

    # Gradients of blocks before the last that was reached aren't stored: without it all is lost.
    grad = _read_array(_grad_file(folder, min(contributions)), windows) if contributions else None
    return (contributions, grad) if grad is not None else ({}, None)


def _grad_file(folder: Path, index: int) -> Path:
    return folder / f"grad-{index}.safetensors"


def _contribution_file(folder: Path, index: int) -> Path:
    return folder / f"part-{index}.npz"


def _read_contribution(
    folder: Path, index: int, tokens: int, experts: Mapping[str, int]
) -> Contribution | None:
    """What was written for one index; None where it is missing or damaged."""

    def read(file: Path) -> Contribution:
        try:
            contribution = _contribution(read_npz(file))
            _check_contribution(contribution, tokens, experts)
            return contribution
        except (ValueError, KeyError):
            raise Damaged(f"{file} is damaged") from None

    return if_sound(_contribution_file(folder, index), read)


def _contribution(arrays: dict[str, np.ndarray]) -> Contribution:
    """A contribution from its arrays (a ValueError or KeyError where they are impossible)."""
    for array in arrays.values():
        schema.check_array(array, schema.FLOAT + schema.INTEGER, [None] * array.ndim)

    def by_layer(prefix: str) -> dict[str, np.ndarray]:
        return {
            name.removeprefix(prefix): array
            for name, array in arrays.items()
            if name.startswith(prefix)
        }

    experts = by_layer("part.")
    tokens = by_layer("token.")
    return Contribution(
        trace=by_layer("trace."),
        rows={
            path: [RowWeights(weight, experts.get(path), tokens[path])]
            for path, weight in by_layer("weight.").items()
        },
        metric=arrays.get("metric"),
        embedding=arrays.get("embedding"),
        remaining={path: float(share) for path, share in by_layer("left.").items()},
    )


def _check_contribution(
    contribution: Contribution, tokens: int, experts: Mapping[str, int]
) -> None:
    """Hold a contribution that was read against the layers.

    Args:
        contribution: to check.
        tokens: how many there are in all windows.
        experts: of each layer that is followed, by path.

    Raises:
        ValueError, KeyError: it is of another model.
    """
    for path, trace in contribution.trace.items():
        schema.check_array(trace, schema.FLOAT, (experts[path],), 0)
    for path, batches in contribution.rows.items():
        for rows in batches:
            count = len(schema.check_array(rows.weight, schema.FLOAT, (None,), 0))
            schema.check_array(rows.token, schema.INTEGER, (count,), 0, tokens - 1)
            if rows.expert is not None:
                schema.check_array(rows.expert, schema.INTEGER, (count,), 0, experts[path] - 1)
    for matrix in (contribution.metric, contribution.embedding):
        if matrix is not None and (matrix.ndim not in (1, 2) or len(set(matrix.shape)) != 1):
            raise ValueError("no metric")


def write_contribution(
    folder: Path, index: int, contribution: Contribution, grad: mx.array
) -> None:
    """Write what a block adds and the gradient at its input; the gradient after it is dropped."""
    arrays = {f"trace.{path}": trace for path, trace in contribution.trace.items()}
    arrays |= {f"left.{path}": np.array(share) for path, share in contribution.remaining.items()}
    for path, batches in contribution.rows.items():
        arrays[f"weight.{path}"] = np.concatenate([rows.weight for rows in batches])
        arrays[f"token.{path}"] = np.concatenate([rows.token for rows in batches])
        experts = [rows.expert for rows in batches if rows.expert is not None]
        if experts:
            arrays[f"part.{path}"] = np.concatenate(experts)
    if contribution.metric is not None:
        arrays["metric"] = contribution.metric
    if contribution.embedding is not None:
        arrays["embedding"] = contribution.embedding

    # The .npz comes last: where it is, the gradient is too, and the one after it isn't needed.
    write_tensors(_grad_file(folder, index), {ARRAY: grad})
    write_npz(_contribution_file(folder, index), arrays)
    remove_file(_grad_file(folder, index + 1))
