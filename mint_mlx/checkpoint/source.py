"""Where a model comes from: a local folder or a repository of the Hugging Face Hub.

A `Source` is a skeleton: config, headers and a fingerprint. `open_model` makes the lazy mlx-lm
model of it, whose weights are read only when a step evaluates them (`stream.py`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.errors import MintError
from ..base.hf_config import config_tables
from ..base.safetensors_header import TensorInfo, read_folder, read_header
from ..base.targets import check_name
from ..converters.sources.gguf import original_repo
from ..converters.sources.layouts import check_tensors
from . import hub, mlxlm

SAMPLE = 4096  # bytes read at the start, middle and end of each tensor for a local fingerprint
WHOLE = 512_000_000  # a local checkpoint of at most so many bytes is hashed in full
DEPTHS = (
    "num_hidden_layers",
    "num_layers",
    "n_layers",
    "n_layer",
    "num_kv_reuse_layers",
)  # in mlx-lm's classes


@dataclass(frozen=True)
class Source:
    """A checkpoint to read from.

    Attributes:
        name: the Hub id, or the folder's name.
        path: a folder with config.json and shards (shards of holes where `has_weights` is false).
        config: config.json as it stands.
        revision: the commit on the Hub, or None for a folder.
        structure: hash of the config and of all headers.
        content: hash of the weights: the Hub's own hashes, else all bytes (up to WHOLE), else
            samples of every tensor.
        weight_bytes: bytes of all shards.
        has_weights: whether the data are here, not only the headers.
        stamp: hash of the shards' sizes and times of change, for caches of what was measured.
        headers: of all shards, by file.
    """

    name: str
    path: Path
    config: dict[str, Any]
    revision: str | None
    structure: str
    content: str
    weight_bytes: int
    has_weights: bool
    stamp: str = ""
    headers: dict[str, dict[str, TensorInfo]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def fingerprint(self) -> str:
        return f"{self.structure}-{self.content}"


def find_model(model: str) -> Path | hub.RepoId:
    """The folder that a name means, or the repository.

    Raises:
        MintError: it is neither, or a folder whose path mlx-lm can't handle.
    """
    try:
        folder = Path(model).expanduser()
    except RuntimeError:
        raise MintError(f"{model} does not exist: there is no such user") from None
    if folder.exists():
        check_name(folder.absolute(), "model")
        return folder
    repo = hub.parse_repo(model)
    if repo is None or model.startswith((".", "/", "~")):
        raise MintError(
            f"{model} does not exist: give a folder, or a model of the Hugging Face Hub as org/name"
        )
    return repo


def load_source(model: str, weights: bool = True) -> Source:
    """Find a checkpoint; a Hub repository is downloaded only if `weights` is true.

    Raises:
        MintError: there is no such model, or what is there is incomplete or not a language model
            that mlx-lm knows.
        (Errors of huggingface_hub pass through; `errors.explain` has their sentences.)
    """
    repo = find_model(model)
    if not isinstance(repo, hub.RepoId):
        return _from_folder(
            repo.absolute(), hub.repo_of(repo.resolve()) or repo.resolve().name, None
        )
    local = hub.cached(repo)
    if local is not None and not weights:
        return _from_folder(local, repo.name, local.name)
    if weights:
        local, commit = hub.download(repo)
        return _from_folder(local, repo.name, commit)
    folder, commit, hashes, total = hub.headers(repo)
    config = read_config(folder)
    mlxlm.check_model(config, folder)
    headers = read_folder(folder)
    _check_depth(config, headers)
    check_tensors(config, folder, headers)
    structure = _hash_structure(config, headers)
    return Source(
        repo.name,
        folder,
        config,
        commit,
        structure,
        _digest(sorted(hashes.items())),
        total,
        False,
        "",
        headers,
    )


def _from_folder(folder: Path, name: str, revision: str | None) -> Source:
    files = [folder] if folder.is_file() else sorted(folder.iterdir())
    gguf = next((file for file in files if file.suffix.lower() == ".gguf"), None)
    if gguf is not None and not any(file.suffix == ".safetensors" for file in files):
        origin = original_repo(gguf)
        instead = (
            f"{origin}, which it was made from"
            if origin
            else "the original Hugging Face checkpoint"
        )
        raise MintError(f"{gguf.name} is a GGUF file, which mint-mlx does not read: give {instead}")
    if folder.is_file():
        raise MintError(
            f"{folder} is a file: give the folder that holds config.json and the weights"
        )
    config = read_config(folder)
    mlxlm.check_model(config, folder)
    headers = read_folder(folder)
    _check_depth(config, headers)
    check_tensors(config, folder, headers)
    stats = {file: (folder / file).stat() for file in headers}
    size = sum(stat.st_size for stat in stats.values())
    stamp = _digest(
        [[file, stat.st_size, stat.st_mtime_ns] for file, stat in sorted(stats.items())]
    )
    structure, content = (
        _hash_structure(config, headers),
        _hash_content(folder, headers, size <= WHOLE),
    )
    return Source(name, folder, config, revision, structure, content, size, True, stamp, headers)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a table.

    Raises:
        MintError: it is missing or malformed.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise MintError(
            f"{folder.name} has no config.json: give the folder of a Hugging Face checkpoint"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        raise MintError(
            f"config.json in {folder.name} is not valid JSON: download it again"
        ) from None
    if not isinstance(config, dict):
        raise MintError(f"config.json in {folder.name} is not a table: download it again")
    for key in ("text_config", "quantization_config", "quantization"):
        if not isinstance(config.get(key), (dict, type(None))):
            raise MintError(
                f"{key} in {folder.name}'s config.json is not a table: download it again"
            )
    names = config.get("architectures") or []
    if not isinstance(names, (list, str)) or any(not isinstance(name, str) for name in names):
        raise MintError(
            f"architectures in {folder.name}'s config.json is not a list of names: download it "
            "again"
        )
    text_types = [table.get("model_type") for table in config_tables(config)[1:]]
    if any(not isinstance(name, (str, type(None))) for name in text_types):
        raise MintError(
            f"text_config.model_type in {folder.name}'s config.json is not a name: download it "
            "again"
        )
    return config


def _check_depth(config: dict[str, Any], headers: dict[str, dict[str, TensorInfo]]) -> None:
    """Refuse a config with more blocks than there are tensors: building a million of them would
    take all memory.
    """
    tensors = sum(map(len, headers.values()))
    for table in config_tables(config):
        for key in DEPTHS:
            if isinstance(table.get(key), (int, float)) and table[key] > tensors:
                raise MintError(
                    f"config.json says {key} is {table[key]}, but there are {tensors} tensors: it "
                    "belongs to another checkpoint, or the download is incomplete"
                )


def open_model(source: Source, stream: Any = None) -> Any:
    """The lazy mlx-lm model of a source, read on a CPU stream. Evaluate its weights only if
    `source.has_weights`.
    """
    return mlxlm.build_model(source.path, stream)


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _hash_structure(config: dict[str, Any], headers: dict[str, dict[str, TensorInfo]]) -> str:
    tensors = [
        [file, name, t.dtype, list(t.shape), t.start]
        for file in sorted(headers)
        for name, t in headers[file].items()
    ]
    return _digest([config, tensors])


def _hash_content(folder: Path, headers: dict[str, dict[str, TensorInfo]], whole: bool) -> str:
    blobs = {name: hub.blob_hash(folder / name) for name in headers}
    if all(blobs.values()):
        return _digest(sorted(blobs.items()))
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(headers):
        data = read_header(folder / name)[1]
        with (folder / name).open("rb") as file:
            if whole:
                file.seek(data)
                while block := file.read(1 << 24):
                    digest.update(block)
                continue
            for info in headers[name].values():
                middle = (info.start + info.end) // 2
                for position in sorted({info.start, middle, max(info.start, info.end - SAMPLE)}):
                    file.seek(data + position)
                    digest.update(file.read(min(SAMPLE, info.end - position)))
    return digest.hexdigest()
