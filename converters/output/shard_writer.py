"""Writes shards tensor by tensor at the places that the layout gives, resumably.

Neither order nor interruption changes a byte. The work folder is `NAME.partial` beside the target.
A journal there says which modules are on disk, with a hash each; a run that finds it checks the
hashes and resumes from there. Shards end in `.part` until all is written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
import numpy as np

from ...base.checksum import with_checksum
from ...base.distributed import ALONE, Ranks
from ...base.errors import MintError
from ...base.files import LOCK, MTP_FILE, lock_folder
from ...base.folders import JOURNAL, JOURNALS, SHARDS, WORK, is_work_folder
from ...base.remove import DESKTOP, PARTIAL, empty_folder, move, remove_file
from ...base.side_files import matches
from ...checkpoint.arrays import flat_view
from ...checkpoint.layers import MLX_DTYPES
from ...checkpoint.layout import Layout, TensorSpec
from .journal import combine, hash_of, read_journal

AT_ONCE = 1 << 30  # bytes of one write: macOS refuses more than 2 GiB - 1
WAITING = 6  # tensors that may wait for the disk: a piece of a layer has up to three


class Writer:
    """An open work folder.

    Attributes:
        done: modules that an earlier run finished.
        hashes: SHA-256 of each tensor by name, as it was written; of all
            ranks once `finish` is done.
    """

    def __init__(
        self,
        work: Path,
        layout: Layout,
        units: Mapping[str, tuple[TensorSpec, ...]],
        identity: Mapping[str, Any],
        discard: bool = False,
        group: Ranks = ALONE,
        replaced: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        """Open or create a work folder.

        Args:
            work: the folder.
            layout: where each tensor lies.
            units: the tensors of each module.
            identity: what the work is made from (source, plan, versions); a folder made from
                something else is refused.
            discard: delete unfinished work of another identity instead of refusing it.
            group: the ranks that write into it together: the first one prepares and finishes it.
            replaced: gives hashes of tensors that may stand in a shard in place of what was
                written there (refined ones); called once the folder is known to be of this work.

        Raises:
            MintError: another process works there, or the folder holds other work.
        """
        self.work = work
        self.layout = layout
        self.units = units
        self.group = group
        self._lock: IO[str] | None = None
        if group.first:
            work.mkdir(parents=True, exist_ok=True)
            self._lock = lock(work)
        self.hashes: dict[str, str] = {}
        self._files: list[int] = []
        self._thread = ThreadPoolExecutor(1)
        self._writing: deque[Future[None]] = deque()

        # The first rank prepares the folder; the others then open the shards that it made.
        try:
            identity = json.loads(json.dumps(identity))
            done = sorted(self._resume(identity, discard, replaced)) if group.first else []
            gathered = group.gather([identity, done])
            if any(other != gathered[0][0] for other, _ in gathered):
                raise MintError(
                    "the machines differ in source, plan or versions: install the same versions on "
                    "all of them, and give all of them the same files"
                )
            self.done = set(gathered[0][1])
            journal = work / JOURNAL
            if not group.first:
                self._files = [os.open(work / f"{name}.part", os.O_RDWR) for name in layout.names]
                journal = work / f"{group.rank}-{JOURNAL}"
                journal.write_text(with_checksum(json.dumps(identity)) + "\n", encoding="utf-8")
            self._journal: IO[str] = journal.open("a", encoding="utf-8")
        except BaseException:
            self._release()
            raise

    def _resume(
        self, identity: Any, discard: bool, replaced: Callable[[], Mapping[str, str]]
    ) -> set[str]:
        """Prepare the folder and open its shards; returns the modules that are already done."""
        entries = self._read_journals(identity, discard)
        self._clean(wipe=not entries)
        self._open_shards()

        # A crash of the machine may have lost bytes of a module whose line is in the journal.
        also = replaced() if entries else {}
        done: dict[str, Any] = {}
        for entry in entries[1:]:
            unit = entry["unit"]
            if unit in self.units and unit not in done and self._is_whole(entry, also):
                done[unit] = entry
        lines = [identity, *done.values()]
        journal = self.work / JOURNAL
        partial_journal = journal.with_suffix(".part")
        text = "".join(with_checksum(json.dumps(line)) + "\n" for line in lines)
        partial_journal.write_text(text, encoding="utf-8")
        move(partial_journal, journal)
        for other in self._other_journals():
            remove_file(other)
        return set(done)

    def _is_whole(self, entry: Mapping[str, Any], also: Mapping[str, str]) -> bool:
        """Whether a module lies on the disk as its entry says; if so its hashes are noted.

        Args:
            entry: of the journal.
            also: hashes of tensors that may stand there in place of what was written.
        """
        specs = self.units[entry["unit"]]
        actual = [self._hash(spec.name) for spec in specs]
        noted = entry.get("hashes") or []
        same = combine(actual) == entry["hash"] or (
            len(noted) == len(specs)
            and all(
                now in (then, also.get(spec.name))
                for now, then, spec in zip(actual, noted, specs, strict=True)
            )
        )
        if same:
            self.hashes |= {spec.name: now for spec, now in zip(specs, actual, strict=True)}
        return same

    def _other_journals(self) -> list[Path]:
        """The journals of the other ranks of an earlier run."""
        return sorted(p for p in self.work.iterdir() if matches(p.name, JOURNALS[1:]))

    def _read_journals(self, identity: Any, discard: bool) -> list[Any]:
        """The entries of all ranks, the identity first; none where the work begins anew.

        Raises:
            MintError: they are of another identity, and may not be discarded.
        """
        entries = read_journal(self.work / JOURNAL)
        for other in self._other_journals():
            others = read_journal(other)
            entries += others[1:] if entries and others[:1] == entries[:1] else []
        if entries and entries[0] != identity:
            if not discard:
                raise MintError(
                    f"{self.work} holds unfinished work from another source, plan or version: "
                    "delete it or give --force"
                )
            return []
        return entries

    def _clean(self, wipe: bool) -> None:
        """Bring the folder back to the state in which shards are written; `wipe` empties it.

        Raises:
            Stranger: it holds something of someone else's, and would be emptied.
        """
        if wipe:
            empty_folder(self.work, WORK, keep=LOCK)
        # A run that was killed at its end may have written it: the folder isn't whole any more.
        remove_file(self.work / "config.json")

        # An earlier run may have had another number of shards, or have given them their names.
        named = {f"{name}{end}" for name in self.layout.names for end in ("", PARTIAL)}
        for path in self.work.iterdir():
            if matches(path.name.removesuffix(PARTIAL), SHARDS) and path.name not in named:
                remove_file(path)
        for name in self.layout.names:
            if (self.work / name).is_file():
                move(self.work / name, self.work / f"{name}{PARTIAL}")

    def _open_shards(self) -> None:
        """Open all shards, at their full size and with their headers."""
        layout = self.layout
        for name, size, header in zip(layout.names, layout.sizes, layout.headers, strict=True):
            path = self.work / f"{name}.part"
            complete = path.is_file() and path.stat().st_size == size
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            self._files.append(file)
            if not complete:
                _reserve(file, size)
            _write_all(file, header, 0)

    def _hash(self, tensor: str) -> str:
        """SHA-256 of a tensor's bytes as they are on disk, in hex."""
        place = self.layout.tensors[tensor]
        return hash_of(self._files[place.shard], place.offset, place.spec.nbytes)

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
        written = dict.fromkeys(specs, 0)
        digests = {name: hashlib.sha256() for name in specs}
        for tensors in pieces:
            for name, spec in specs.items():
                _check_piece(tensors[name], spec)
                data = _bytes(tensors[name])
                place = self.layout.tensors[spec.name]
                position = place.offset + written[name]
                written[name] += len(data)
                if written[name] > spec.nbytes:
                    raise RuntimeError(
                        f"{spec.name} has more than the {spec.nbytes} bytes of {spec.shape}"
                    )
                file = self._files[place.shard]
                self._do(partial(_write_part, file, position, data, digests[name]))

        # The journal's line follows in the same thread, so it never comes before the bytes.
        short = [spec.name for name, spec in specs.items() if written[name] != spec.nbytes]
        if short:
            raise RuntimeError(f"{short[0]} ended before its last row")
        self._do(partial(self._enter, unit, list(digests.values())))

    def _enter(self, unit: str, digests: list[Any]) -> None:
        """Write a module's line into the journal.

        It may reach the disk before the bytes do; after a crash of the machine the hash shows that.
        """
        hashes = [digest.hexdigest() for digest in digests]
        entry = {"unit": unit, "hash": combine(hashes), "hashes": hashes}
        self._journal.write(with_checksum(json.dumps(entry)) + "\n")
        self._journal.flush()
        self.hashes |= {
            spec.name: value for spec, value in zip(self.units[unit], hashes, strict=True)
        }

    def _do(self, work: Callable[[], None]) -> None:
        """Let the thread do some work after all that it was given before."""
        while len(self._writing) > WAITING:
            self._writing.popleft().result()
        self._writing.append(self._thread.submit(work))

    def finish(self) -> None:
        """Flush the shards to disk and, once all ranks have, give them their final names."""
        while self._writing:
            self._writing.popleft().result()
        for file in self._files:
            os.fsync(file)
        for hashes in self.group.gather(self.hashes):
            self.hashes |= hashes
        if self.group.first:
            for name in self.layout.names:
                move(self.work / f"{name}{PARTIAL}", self.work / name)

    def _release(self) -> None:
        """Close the shards and free the lock."""
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
        """Close all files and free the folder for others; a second call has no effect."""
        if not self._journal.closed:
            self._thread.shutdown()
            self._journal.close()
            self._release()


def lock(work: Path) -> IO[str]:
    """Lock a work folder for this process until the returned file is closed.

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
    return flat_view(array, np.uint8).data if array.size else memoryview(b"")


def check_work(work: Path) -> None:
    """Refuse to work in a folder that isn't of unfinished work, or through a link (a MintError)."""
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise MintError(
            f"{work} is where the work folder would be: rename it or choose another output with -o"
        )
    names = {path.name for path in work.iterdir()} if work.is_dir() else set()
    if names - {DESKTOP} and not is_work_folder(work):
        raise MintError(
            f"{work} is the work folder, but holds other files: rename it or choose another output "
            "with -o"
        )

    # What is written into a link lands elsewhere; a pipe takes nothing.
    for path in (work / name for name in sorted(names)):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            what = "link" if path.is_symlink() else "pipe or device"
            raise MintError(
                f"{work} holds the {what} {path.name}, which mint-mlx did not make: move it away, "
                "or choose another output with -o"
            )


def _check_piece(array: mx.array, spec: TensorSpec) -> None:
    """Refuse an array that isn't a piece of a tensor: a bug in what made it."""
    dtype = f"mlx.core.{MLX_DTYPES[spec.dtype]}"
    if array.shape[-1:] != spec.shape[-1:] or str(array.dtype) != dtype:
        raise RuntimeError(
            f"{spec.name} is {array.dtype} {array.shape}, the layout says {spec.dtype} {spec.shape}"
        )


def _reserve(file: int, size: int) -> None:
    """Give a file its size, and its blocks where the system can: a full disk shows at once."""
    os.ftruncate(file, size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)


def _write_part(file: int, position: int, data: memoryview, digest: Any) -> None:
    """Write a part of a tensor and add it to the tensor's hash."""
    _write_all(file, data, position)
    digest.update(data)


def _write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of the data, in as many calls as the system needs."""
    view = memoryview(data)
    while len(view):
        written = os.pwrite(file, view[:AT_ONCE], offset)
        view, offset = view[written:], offset + written


def write_index(folder: Path, layout: Layout, parameters: int) -> None:
    """Write model.safetensors.index.json, with the totals that mlx-lm writes too.

    What lies beside the model's shards is not in it (checkpoint/towers.py).
    """
    files = {name: layout.names[place.shard] for name, place in sorted(layout.tensors.items())}
    weight_map = {name: file for name, file in files.items() if file != MTP_FILE}
    total = sum(layout.tensors[name].spec.nbytes for name in weight_map)
    index = {
        "metadata": {"total_size": total, "total_parameters": parameters},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=4) + "\n", encoding="utf-8"
    )
