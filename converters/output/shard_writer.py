"""Writes shards tensor by tensor at the places that the layout gives: order and interruption never
change a byte.

Work goes to `NAME.partial` beside the target. A journal there says which modules are on disk, with
a hash each; a run that finds it goes on from there, after checking the hashes. Shards end in
`.part` until all is written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any

import mlx.core as mx

from ...base.distributed import ALONE, Ranks
from ...base.errors import MintError
from ...base.files import LOCK, lock_folder
from ...checkpoint.arrays import flat_view
from ...checkpoint.layers import MLX_DTYPES
from ...checkpoint.layout import Layout, TensorSpec

JOURNAL = "journal.jsonl"
AT_ONCE = 1 << 30  # bytes of one write: macOS refuses more than 2 GiB - 1
WAITING = 6  # tensors that may wait for the disk: a piece has up to three


class Writer:
    """An open work folder.

    Attributes:
        done: modules that an earlier run finished.
        intact: whether all shards were found at their sizes.
    """

    def __init__(
        self,
        work: Path,
        layout: Layout,
        units: Mapping[str, tuple[TensorSpec, ...]],
        identity: Mapping[str, Any],
        discard: bool = False,
        group: Ranks = ALONE,
    ) -> None:
        """Open or create a work folder.

        Args:
            work: the folder.
            layout: where each tensor lies.
            units: the tensors of each module.
            identity: what the work is made from (source, plan, versions); a folder made from
                something else is refused.
            discard: throw unfinished work of another kind away instead.
            group: the ranks that write into it together: the first one prepares and finishes it.

        Raises:
            MintError: another process works there, or the folder holds other work.
        """
        self.work, self.layout, self.units, self.group = work, layout, units, group
        if group.first:
            work.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] | None = lock(work)
        else:
            self._lock = None
        self.intact = True
        self._files: list[int] = []
        self._thread = ThreadPoolExecutor(1)
        self._writing: deque[Future[None]] = deque()
        try:
            same = json.loads(json.dumps(identity))
            done = sorted(self._resume(same, discard)) if group.first else []
            told = group.gather([same, done])
            if any(other != told[0][0] for other, _ in told):
                raise MintError(
                    "the machines don't agree on source, plan or versions: install the same on "
                    "all of them"
                )
            self.done = set(told[0][1])
            name = JOURNAL if group.first else f"{group.rank}-{JOURNAL}"
            if not group.first:
                self._files = [os.open(work / f"{name}.part", os.O_RDWR) for name in layout.names]
                (work / name).write_text(json.dumps(same) + "\n", encoding="utf-8")
            self._journal: IO[str] = (work / name).open("a", encoding="utf-8")
        except BaseException:
            self._release()
            raise

    def _resume(self, identity: Any, discard: bool) -> set[str]:
        journal = self.work / JOURNAL
        lines = journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else []
        entries = _decode(lines)
        others = sorted(self.work.glob(f"*-{JOURNAL}"))  # of the other ranks of an earlier run
        for other in others:
            theirs = _decode(other.read_text(encoding="utf-8").splitlines())
            entries += theirs[1:] if entries and theirs[:1] == entries[:1] else []
        if lines and (not entries or entries[0] != identity):
            if not discard:
                raise MintError(
                    f"{self.work} holds unfinished work from another source, plan or version: "
                    "delete it or give --force"
                )
            entries = []
        (self.work / "config.json").unlink(
            missing_ok=True
        )  # an end that was cut short: not whole any more
        if not entries:
            for path in self.work.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        named = {f"{name}{end}" for name in self.layout.names for end in ("", ".part")}
        for path in self.work.glob(
            "model*.safetensors*"
        ):  # of an earlier run with another number of shards
            if path.name not in named:
                path.unlink()
        for name in self.layout.names:  # finished in full before the end was cut short
            if (self.work / name).is_file():
                (self.work / name).replace(self.work / f"{name}.part")
        names = [self.work / f"{name}.part" for name in self.layout.names]
        for path, size, header in zip(names, self.layout.sizes, self.layout.headers, strict=True):
            whole = path.is_file() and path.stat().st_size == size
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            self._files.append(file)
            if not whole:
                self.intact = False
                _reserve(file, size)
            _write_all(file, header, 0)
        done = {
            e["unit"]
            for e in entries[1:]
            if e.get("unit") in self.units and self._hash(e["unit"]) == e.get("hash")
        }
        fresh = [identity] + [e for e in entries[1:] if e.get("unit") in done]
        partial = journal.with_suffix(".part")
        partial.write_text("".join(json.dumps(e) + "\n" for e in fresh), encoding="utf-8")
        partial.replace(journal)
        for other in others:
            other.unlink(missing_ok=True)
        return done

    def _hash(self, unit: str) -> str:
        """Hash of a module's bytes as they are on disk."""
        found = []
        for spec in self.units[unit]:
            place, digest = self.layout.tensors[spec.name], hashlib.sha256()
            position, end = place.offset, place.offset + spec.nbytes
            while position < end:
                block = os.pread(self._files[place.shard], min(1 << 24, end - position), position)
                if not block:
                    return ""
                digest.update(block)
                position += len(block)
            found.append(digest)
        return _together(found)

    def put(self, unit: str, pieces: Iterable[Mapping[str, mx.array]]) -> None:
        """Write one module's tensors (by local name), then enter it in the journal.

        The disk is written in a thread of its own while the next piece is quantized; what goes
        wrong there is raised by a later call or by `finish`.

        Args:
            unit: the module.
            pieces: its tensors whole, or cut along their first axes (a stack's experts and rows as
                one axis), in order.
        """
        specs = {spec.name.rpartition(".")[2]: spec for spec in self.units[unit]}
        written, digests = dict.fromkeys(specs, 0), {name: hashlib.sha256() for name in specs}
        for tensors in pieces:
            for name, spec in specs.items():
                array, place = tensors[name], self.layout.tensors[spec.name]
                if (
                    array.shape[-1:] != spec.shape[-1:]
                    or str(array.dtype) != f"mlx.core.{MLX_DTYPES[spec.dtype]}"
                ):
                    raise RuntimeError(
                        f"{spec.name} is {array.dtype} {array.shape}, the layout says {spec.dtype} "
                        f"{spec.shape}"
                    )
                file, position, data = (
                    self._files[place.shard],
                    place.offset + written[name],
                    _bytes(array),
                )
                written[name] += len(data)
                if written[name] > spec.nbytes:
                    raise RuntimeError(
                        f"{spec.name} has more than the {spec.nbytes} bytes of {spec.shape}"
                    )
                self._do(partial(_write_part, file, position, data, digests[name]))
        short = [spec.name for name, spec in specs.items() if written[name] != spec.nbytes]
        if short:
            raise RuntimeError(f"{short[0]} ended before its last row")
        self._do(partial(self._enter, unit, list(digests.values())))

    def _enter(self, unit: str, digests: list[Any]) -> None:
        """A module's line in the journal. (What a crash of the machine takes from it shows in its
        hash.)
        """
        self._journal.write(json.dumps({"unit": unit, "hash": _together(digests)}) + "\n")
        self._journal.flush()

    def _do(self, work: Callable[[], None]) -> None:
        """Have the thread do something, after all that it was given before."""
        while len(self._writing) > WAITING:
            self._writing.popleft().result()
        self._writing.append(self._thread.submit(work))

    def finish(self) -> None:
        """Flush the shards to disk and, once all ranks have, give them their final names."""
        while self._writing:
            self._writing.popleft().result()
        for file in self._files:
            os.fsync(file)
        self.group.wait()
        if self.group.first:
            for name in self.layout.names:
                (self.work / f"{name}.part").replace(self.work / name)

    def _release(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = []
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files and free the folder for others; once is enough."""
        if not self._journal.closed:
            self._thread.shutdown()
            self._journal.close()
            self._release()


def lock(work: Path) -> IO[str]:
    """Lock a work folder for this process, until the file that is returned is closed.

    Raises:
        MintError: another process works there.
    """
    file = lock_folder(work)
    if file is None:
        raise MintError(
            f"another run is writing to {work}: wait for it or choose another folder with -o"
        )
    return file


def _bytes(array: mx.array) -> memoryview:
    """The array's memory as bytes."""
    return flat_view(array, mx.uint8).data if array.size else memoryview(b"")


def check_work(work: Path) -> None:
    """Refuse a work folder that isn't one.

    Raises:
        MintError: something else has its name.
    """
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise MintError(
            f"{work} is in the way of the work folder: rename it or choose another output with -o"
        )
    if work.is_dir() and any(work.iterdir()) and not (work / LOCK).is_file():
        raise MintError(
            f"{work} holds other files than unfinished work: rename it or choose another output "
            "with -o"
        )


def _decode(lines: list[str]) -> list[Any]:
    """Journal entries up to the first line that a kill cut short."""
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    return entries


def _reserve(file: int, size: int) -> None:
    """Give a file its size, with its blocks where the system can, so that a full disk shows at
    once.
    """
    os.ftruncate(file, size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)


def _write_part(file: int, position: int, data: memoryview, digest: Any) -> None:
    _write_all(file, data, position)
    digest.update(data)


def _together(digests: Iterable[Any]) -> str:
    """One hash of several tensors' hashes."""
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def _write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        written = os.pwrite(file, view[:AT_ONCE], offset)
        view, offset = view[written:], offset + written


def write_index(folder: Path, layout: Layout, parameters: int) -> None:
    """Write model.safetensors.index.json, with the totals that mlx-lm writes too."""
    weight_map = {name: layout.names[place.shard] for name, place in sorted(layout.tensors.items())}
    total = sum(place.spec.nbytes for place in layout.tensors.values())
    index = {
        "metadata": {"total_size": total, "total_parameters": parameters},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=4) + "\n", encoding="utf-8"
    )
