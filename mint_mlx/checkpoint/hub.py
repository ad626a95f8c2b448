"""The Hugging Face Hub: names of models, headers without weights, downloads.

`fetch_skeleton` needs a few kilobytes per shard, so that a plan, a dry run or a refusal costs no
download.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..base.errors import MintError, naming
from ..base.files import BASE_MODEL, MTP_PLACES, OPTIQ, PLAN_FILE, TOWER_PLACES
from ..base.remove import Kind, discard, move
from ..base.safetensors_header import INDEX, parse_header, read_header, read_index
from ..base.scratch import note_name, noted_names, open_scratch, scratch_kind
from ..base.side_files import SIDE_FILES, TEMPLATES
from .tokenizer import has_tokenizer

SMALL_FILES = ["*.json", "*.py", *SIDE_FILES, f"{TEMPLATES}/*.jinja", "README.md", PLAN_FILE]
WEIGHTS = ["model*.safetensors"]
DOWNLOAD = "download"  # the folder in a skeleton that shards are downloaded into
TIMEOUT = 30.0  # seconds to wait for a part of a file
_TEXTS = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class MissingFile(MintError):
    """A repository or a folder lacks a file that others of its kind have."""


@dataclass(frozen=True)
class RepoId:
    """`org/name` with an optional revision."""

    name: str
    revision: str | None


def parse_repo(text: str) -> RepoId | None:
    """Read `org/name` or `org/name@revision`; None where the text can't be a Hub name."""
    name, _, revision = text.partition("@")
    return RepoId(name, revision or None) if _NAME.fullmatch(name) and ".." not in name else None


def repo_of(folder: Path) -> str | None:
    """`org/name` of a snapshot folder in Hugging Face's cache (named by its commit), else None."""
    cache_name = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not cache_name.startswith("models--"):
        return None
    return cache_name.removeprefix("models--").replace("--", "/", 1)


def _quiet_unless_terminal() -> None:
    """Keep huggingface_hub's progress bars out of logs."""
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()


def download(repo: RepoId) -> tuple[Path, str]:
    """Download the files that a conversion needs, or find them in the cache.

    Returns:
        The folder and the commit.
    """
    from huggingface_hub import snapshot_download

    _quiet_unless_terminal()
    folder = Path(
        snapshot_download(repo.name, revision=repo.revision, allow_patterns=SMALL_FILES + WEIGHTS)
    )

    # An index may name files that are called otherwise.
    others = sorted({name for name in _other_shards(folder) if not (folder / name).exists()})
    if others:
        snapshot_download(repo.name, revision=folder.name, allow_patterns=others)
    return folder, folder.name


def _other_shards(folder: Path) -> set[str]:
    """The shards that an index names and that aren't called model*.safetensors."""
    return {name for name in read_index(folder).values() if not name.startswith("model")}


def download_file(repo: RepoId, name: str) -> Path:
    """One file of a repository, downloaded or from the local cache.

    Raises:
        MissingFile: the repository has no such file. (Errors of huggingface_hub pass through.)
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    _quiet_unless_terminal()
    try:
        return Path(hf_hub_download(repo.name, name, revision=repo.revision))
    except LocalEntryNotFoundError as error:  # nobody knows whether the file exists
        with naming(repo.name):
            raise error
    except EntryNotFoundError:
        raise MissingFile(
            f"{repo.name} holds no {name}: give a checkpoint of mint-mlx that has one"
        ) from None


def cached(repo: RepoId) -> Path | None:
    """The repository's snapshot in the local cache, with all shards and a tokenizer; else None.

    Raises:
        MintError: its index is damaged.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                repo.name,
                revision=repo.revision,
                allow_patterns=SMALL_FILES + WEIGHTS,
                local_files_only=True,
            )
        )
    # LocalEntryNotFoundError and IncompleteSnapshotError are subclasses of it.
    except FileNotFoundError:
        return None
    shards = {f.name for f in folder.glob("*.safetensors")}
    wanted = set(read_index(folder).values()) or shards
    return folder if wanted and wanted <= shards and has_tokenizer(folder) else None


@dataclass(frozen=True)
class Skeleton:
    """A repository's small files and headers, without its weights.

    Attributes:
        folder: with the small files, and for each shard a sparse file of about its size that holds
            only the header. Its data takes no disk space, and mlx-lm maps it like a real shard.
        commit: of the repository.
        hashes: the Hub's SHA-256 of each shard.
        weight_bytes: of all weights.
    """

    folder: Path
    commit: str
    hashes: dict[str, str]
    weight_bytes: int


def fetch_skeleton(repo: RepoId) -> Skeleton:
    """Download a repository's small files and headers into a folder that is removed at exit.

    Raises:
        MintError: it holds no safetensors, or a header is malformed.
        (Errors of huggingface_hub pass through.)
    """
    from huggingface_hub import HfApi, hf_hub_download

    _quiet_unless_terminal()
    api = HfApi()
    info = api.model_info(repo.name, revision=repo.revision, files_metadata=True)
    commit = info.sha or repo.revision or "main"
    siblings = {s.rfilename: s for s in info.siblings or []}
    folder, mark = open_scratch(SKELETON)
    atexit.register(_discard_skeleton, folder, mark)

    base = _base_model(info)
    if base is not None:
        note_name(folder, BASE_MODEL)
        (folder / BASE_MODEL).write_text(base, encoding="utf-8")

    for name in siblings:
        place, _, text = name.rpartition("/")
        template = place == TEMPLATES and text.endswith(".jinja")
        if template or (not place and (Path(text).suffix in _TEXTS or text == PLAN_FILE)):
            local = hf_hub_download(repo.name, name, revision=commit)
            note_name(folder, text)
            (folder / place).mkdir(exist_ok=True)
            shutil.copyfile(local, folder / name)

    # mlx-lm would also read a shard that the index doesn't name.
    shards = [name for name in siblings if re.fullmatch(r"model[^/]*\.safetensors", name)]
    if not shards and not _other_shards(folder):
        raise MintError(_no_weights(repo.name, info))
    files = api.get_safetensors_metadata(repo.name, revision=commit).files_metadata
    for name in shards:
        if name not in files:
            files[name] = api.parse_safetensors_file_metadata(repo.name, name, revision=commit)

    hashes = {}
    weight_bytes = 0
    for name, file in sorted(files.items()):
        if os.path.basename(name) != name:
            raise MintError(
                f"{repo.name} names the shard {name!r}, which is not a plain file name: refused, "
                "get the checkpoint from a source that you trust"
            )
        note_name(folder, name)
        weight_bytes += _write_sparse_shard(folder / name, file)
        lfs = siblings[name].lfs if name in siblings else None
        hashes[name] = lfs.sha256 if lfs else ""

    # No parts of the model, but the doctor looks for them.
    for name in (*MTP_PLACES, *TOWER_PLACES):
        if name in siblings and name not in files:
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            note_name(folder, path.name)
            beside = api.parse_safetensors_file_metadata(repo.name, name, revision=commit)
            _write_sparse_shard(path, beside)
    return Skeleton(folder, commit, hashes, weight_bytes)


def _discard_skeleton(folder: Path, mark: IO[str]) -> None:
    """Delete a skeleton's folder, whose mark is open and locked until then."""
    with mark:
        discard(folder, scratch_kind(SKELETON))


def _skeleton_kind() -> Kind:
    """A skeleton's folder: the files that it notes, and what huggingface_hub downloads through."""
    noted = Kind("a folder", ("*.metadata", "*.lock", "*.incomplete"))
    notes = (".gitignore", ".gitignore.lock", "CACHEDIR.TAG")
    hub_cache = Kind("a folder", (), {"huggingface": Kind("a folder", notes, {"download": noted})})

    def names_above(folder: Path) -> Collection[str]:
        return noted_names(folder.parent)

    download = Kind("a folder", (), {".cache": hub_cache}, named=names_above)
    noted_files = Kind("a folder", (), named=names_above)
    folders = {DOWNLOAD: download, TEMPLATES: noted_files, OPTIQ: noted_files}
    return Kind("a skeleton", (), folders, named=noted_names)


SKELETON = _skeleton_kind()


def _write_sparse_shard(path: Path, file: Any) -> int:
    """Write a shard with its header and no data from huggingface_hub's metadata of it.

    Returns:
        The bytes of the data that it would hold.
    """
    header: dict[str, Any] = {
        tensor: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": list(t.data_offsets)}
        for tensor, t in file.tensors.items()
    }
    parse_header(header, path.name)
    raw = json.dumps(header).encode()
    data_bytes: int = max((t["data_offsets"][1] for t in header.values()), default=0)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(raw)) + raw)
        out.truncate(8 + len(raw) + data_bytes)
    return data_bytes


def fetch_shard(name: str, commit: str | None, file: str, folder: Path) -> None:
    """Download a shard in place of its sparse file; a partial download is resumed."""
    from huggingface_hub import hf_hub_download

    _quiet_unless_terminal()
    download_folder = folder / DOWNLOAD
    hf_hub_download(name, file, revision=commit, local_dir=download_folder)
    move(download_folder / file, folder / file)


def fetch_ranges(
    name: str, commit: str | None, file: str, ranges: Iterable[tuple[int, int]], folder: Path
) -> None:
    """Download parts of a shard's data into its sparse file; the rest of that stays empty.

    Args:
        name: of the repository.
        commit: of the repository.
        file: the shard.
        ranges: first byte and end of each part, from where the shard's data begins.
        folder: with the sparse file.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(name, file, revision=commit)

    def fetched(start: int, end: int) -> bytes:
        headers = build_hf_headers() | {"range": f"bytes={start}-{end - 1}"}
        response = get_session().get(url, headers=headers, timeout=TIMEOUT)
        hf_raise_for_status(response)
        return response.content[: end - start]

    # The header of the sparse file isn't as long as the shard's.
    data = 8 + int.from_bytes(fetched(0, 8), "little")
    local = read_header(folder / file)[1]
    with (folder / file).open("r+b") as out:
        for start, end in ranges:
            part = fetched(data + start, data + end)
            out.seek(local + start)
            out.write(part)


def drop_shard(path: Path) -> None:
    """Make a shard sparse again: its header and its size stay, its data is freed."""
    _, start = read_header(path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(start)
        file.truncate(size)


def fetch_small_files(name: str, commit: str | None, folder: Path) -> None:
    """Download the files beside the weights that a converted checkpoint keeps."""
    from huggingface_hub import snapshot_download

    snapshot = Path(snapshot_download(name, revision=commit, allow_patterns=SMALL_FILES))
    for pattern in SMALL_FILES:
        for file in snapshot.glob(pattern):
            target = folder / file.relative_to(snapshot)
            if file.name != INDEX and not target.exists():
                note_name(folder, file.name)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)


def _base_model(info: Any) -> str | None:
    """The repository that a repository's card says it was made from."""
    base = getattr(info.card_data, "base_model", None)
    base = base[0] if isinstance(base, list) and base else base
    return base if isinstance(base, str) else None


def _no_weights(name: str, info: Any) -> str:
    """The message for a repository without safetensors; one of GGUF files may name its original."""
    if not any(s.rfilename.endswith(".gguf") for s in info.siblings or []):
        return f"{name} holds no model*.safetensors: give a Hugging Face checkpoint in safetensors"
    base = _base_model(info)
    instead = f"{base}, which they were made from" if base else "the original checkpoint"
    return f"{name} holds GGUF files only, which mint-mlx does not read: give {instead}"


def blob_hash(path: Path) -> str:
    """The SHA-256 that the Hub's cache has for a file, '' outside of the cache."""
    name = os.path.basename(os.readlink(path)) if path.is_symlink() else ""  # it links to a blob
    return name if _SHA256.fullmatch(name) else ""
