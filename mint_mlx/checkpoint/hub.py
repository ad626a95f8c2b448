"""The Hugging Face Hub: names, headers without weights, downloads.

`headers` needs a few kilobytes per shard, so that a plan, a dry run or a refusal costs no download.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import struct
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import MintError
from ..base.files import PLAN_FILE
from ..base.safetensors_header import INDEX, parse_header, read_header, read_index
from .tokenizer import has_tokenizer

SMALL_FILES = [
    "*.json",
    "*.jinja",
    "*.txt",
    "*.jsonl",
    "*.model",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "README.md",
    PLAN_FILE,
]
WEIGHTS = ["model*.safetensors"]
REPLACED = (
    *WEIGHTS,
    INDEX,
    "mint-*",
)  # of a repository's files, what an upload takes away unless it brings it anew
_TEXTS = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class MissingFile(MintError):
    """A repository or a folder that lacks a file which others of its kind have."""


@dataclass(frozen=True)
class RepoId:
    """`org/name` with an optional revision."""

    name: str
    revision: str | None


def parse_repo(text: str) -> RepoId | None:
    """Read `org/name` or `org/name@revision`; None where the text can't be a Hub id."""
    name, _, revision = text.partition("@")
    return RepoId(name, revision or None) if _NAME.fullmatch(name) and ".." not in name else None


def repo_of(folder: Path) -> str | None:
    """`org/name` where a folder is a snapshot in Hugging Face's cache, whose own name is that of a
    commit.
    """
    kept = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not kept.startswith("models--"):
        return None
    return kept.removeprefix("models--").replace("--", "/", 1)


def _quiet_unless_terminal() -> None:
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()


def download(repo: RepoId) -> tuple[Path, str]:
    """Download what a conversion needs, or find it in the cache: the folder and the commit."""
    from huggingface_hub import snapshot_download

    _quiet_unless_terminal()
    folder = Path(
        snapshot_download(repo.name, revision=repo.revision, allow_patterns=SMALL_FILES + WEIGHTS)
    )
    return folder, folder.name


def download_file(repo: RepoId, name: str) -> Path:
    """One file of a repository, downloaded or from the local cache.

    Raises:
        MissingFile: the repository has no such file. (Errors of huggingface_hub pass.)
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    _quiet_unless_terminal()
    try:
        return Path(hf_hub_download(repo.name, name, revision=repo.revision))
    except LocalEntryNotFoundError:  # no network, which is another matter
        raise
    except EntryNotFoundError:
        raise MissingFile(
            f"{repo.name} holds no {name}: give a checkpoint that mint-mlx wrote with one"
        ) from None


def cached(repo: RepoId) -> Path | None:
    """The repo's snapshot in the local cache, if there is one with all shards and a tokenizer.

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
    except (
        FileNotFoundError
    ):  # LocalEntryNotFoundError and IncompleteSnapshotError are both of this kind
        return None
    shards = {f.name for f in folder.glob("model*.safetensors")}
    wanted = set(read_index(folder).values()) or shards
    return folder if wanted and wanted <= shards and has_tokenizer(folder) else None


def headers(repo: RepoId) -> tuple[Path, str, dict[str, str], int]:
    """A folder with the repo's small files and, for each shard, a file of about its size that holds
    only the header.

    The data of these files are holes: they take no space, and mlx-lm maps them as if they were
    whole.

    Returns:
        The folder (removed at exit), the commit, the Hub's SHA-256 of each shard, and the bytes of
        all weights.
    """
    from huggingface_hub import HfApi, hf_hub_download

    _quiet_unless_terminal()
    api = HfApi()
    info = api.model_info(repo.name, revision=repo.revision, files_metadata=True)
    commit = info.sha or repo.revision or "main"
    folder = Path(tempfile.mkdtemp(prefix="mint-mlx-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    siblings = {s.rfilename: s for s in info.siblings or []}
    for name in siblings:
        if "/" not in name and (Path(name).suffix in _TEXTS or name == PLAN_FILE) and name != INDEX:
            local = hf_hub_download(repo.name, name, revision=commit)
            shutil.copyfile(local, folder / name)
    shards = [name for name in siblings if re.fullmatch(r"model[^/]*\.safetensors", name)]
    if not shards:
        raise MintError(_no_weights(repo.name, info))
    files = api.get_safetensors_metadata(repo.name, revision=commit).files_metadata
    for name in shards:
        if name not in files:  # its index doesn't name it, but mlx-lm would read it
            files[name] = api.parse_safetensors_file_metadata(repo.name, name, revision=commit)
    hashes, total = {}, 0
    for name, file in sorted(files.items()):
        if os.path.basename(name) != name:
            raise MintError(
                f"{repo.name} names the shard {name!r}, which is not a plain file name: refused"
            )
        table: dict[str, Any] = {
            tensor: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": list(t.data_offsets)}
            for tensor, t in file.tensors.items()
        }
        parse_header(table, name)
        raw = json.dumps(table).encode()
        end = max((t["data_offsets"][1] for t in table.values()), default=0)
        with (folder / name).open("wb") as out:
            out.write(struct.pack("<Q", len(raw)) + raw)
            out.truncate(8 + len(raw) + end)
        lfs = siblings[name].lfs if name in siblings else None
        hashes[name] = lfs.sha256 if lfs else ""
        total += end
    return folder, commit, hashes, total


def fetch_shard(name: str, commit: str | None, file: str, folder: Path) -> None:
    """Put a shard in the place of its file of holes; what was half downloaded is gone on from."""
    from huggingface_hub import hf_hub_download

    _quiet_unless_terminal()
    aside = folder / "download"
    hf_hub_download(name, file, revision=commit, local_dir=aside)
    (aside / file).replace(folder / file)


def drop_shard(path: Path) -> None:
    """Make a shard a file of holes again: its header, and its size."""
    _, start = read_header(path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(start)
        file.truncate(size)


def fetch_small_files(name: str, commit: str | None, folder: Path) -> None:
    """Everything beside the weights that a copy of the checkpoint keeps."""
    from huggingface_hub import snapshot_download

    found = Path(snapshot_download(name, revision=commit, allow_patterns=SMALL_FILES))
    for pattern in SMALL_FILES:
        for file in found.glob(pattern):
            if file.name != INDEX and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def _no_weights(name: str, info: Any) -> str:
    """What to say of a repository without safetensors; one of GGUF files may name its original."""
    if not any(s.rfilename.endswith(".gguf") for s in info.siblings or []):
        return f"{name} holds no model*.safetensors: give a Hugging Face checkpoint in safetensors"
    base = getattr(info.card_data, "base_model", None)
    base = base[0] if isinstance(base, list) and base else base
    instead = (
        f"{base}, which they were made from" if isinstance(base, str) else "the original checkpoint"
    )
    return f"{name} holds GGUF files only, which mint-mlx does not read: give {instead}"


def blob_hash(path: Path) -> str:
    """The SHA-256 by which the Hub knows a file of its cache (the name of the blob it links to), or
    ''.
    """
    name = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    return name if _SHA256.fullmatch(name) else ""


def check_upload(repo: str, private: bool) -> None:
    """Refuse an upload that can't be, before the work: no login, or a repository that is public
    where a private one is wanted, or the other way round.

    Raises:
        MintError: saying which. (Errors of huggingface_hub pass through.)
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError

    api = HfApi()
    try:
        api.whoami()
    except LocalTokenNotFoundError:
        raise MintError("--upload-repo needs a login: run `hf auth login` first") from None
    try:
        found = api.repo_info(repo)
    except RepositoryNotFoundError:
        return
    if private and not found.private:
        raise MintError(f"{repo} exists and is public: give --public, or choose another name")
    if found.private and not private:
        raise MintError(
            f"{repo} exists and is private: leave --public out, or make it public on its page first"
        )


def upload(folder: Path, repo: str, private: bool) -> str:
    """Upload a written checkpoint; returns its page. Chunks that arrived before an interruption are
    not sent again.

    What an earlier upload left of another size goes: mlx-lm would load its shards as well.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo, repo_type="model", folder_path=folder, delete_patterns=[*REPLACED]
    )
    return str(url)
