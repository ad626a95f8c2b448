"""Where a model comes from: a local folder or a repository of the Hugging Face Hub.

A `Source` holds config, headers and a fingerprint, no weights. `open_model` makes the lazy mlx-lm
model of it, whose weights are read only when a step evaluates them (layer_stream.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..base.errors import MintError, NeedsWeights, naming
from ..base.hf_config import with_stated_dtype
from ..base.safetensors_header import TensorInfo, read_folder, read_header
from ..base.side_files import TOKENIZER, matches
from ..base.targets import check_name
from ..converters.sources.gguf import original_repo
from ..converters.sources.layouts import check_tensors
from . import hub, mlxlm
from .config_file import check_depth, read_config
from .config_keys import Brought, adapt, brought, encoded
from .config_values import check_values
from .origin import Origin
from .stored_dtype import with_stored_dtype
from .tied_head import unknown_head, with_own_head
from .unread_keys import check_keys

SAMPLE = 4096  # bytes read at the start, middle and end of each tensor for a local fingerprint
WHOLE = 512_000_000  # a local checkpoint of at most so many bytes is hashed in full


@dataclass(frozen=True)
class Source:
    """A checkpoint to read from.

    Attributes:
        name: the Hub id, or the folder's name.
        path: a folder with config.json and shards (sparse ones where `has_weights` is false).
        config: config.json, brought to the keys that mlx-lm's class reads (config_keys.py).
        revision: the commit on the Hub, or None for a folder.
        structure: hash of the config and of all headers.
        content: hash of the weights: the Hub's own hashes, else all bytes (up to WHOLE), else
            samples of every tensor.
        weight_bytes: bytes of all shards.
        has_weights: whether the shards are on this machine, not only their headers.
        stamp: hash of the sizes, times of change and places on the disk of shards, config.json and
            tokenizer; '' where the shards aren't on this machine.
        sampled: whether `content` is of samples only, so that a small change may be missed.
        headers: of all shards, by file.
        keep_nvfp4: leave experts of NVFP4 packed where mlx-lm's class can.
        dtype: the 16-bit type that it is written in, where one is asked for.
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
    sampled: bool = False
    headers: dict[str, dict[str, TensorInfo]] = field(
        default_factory=dict, repr=False, compare=False
    )
    keep_nvfp4: bool = False
    dtype: str | None = None

    @property
    def origin(self) -> Origin:
        """What is stated of these weights in all that is made from them."""
        return Origin(self.name, self.revision, self.structure, self.content)

    @property
    def fingerprint(self) -> str:
        """Names the weights in file names."""
        return self.origin.fingerprint

    @property
    def identity(self) -> str:
        """Names the weights for unfinished work, which must not mix two versions of them.

        Where the fingerprint is of samples, it is these very files.
        """
        name = f"{self.fingerprint}-{self.stamp}" if self.sampled else self.fingerprint
        return name if self.dtype is None else f"{name}-{self.dtype}"


def find_model(model: str) -> Path | hub.RepoId:
    """The folder or the repository that a user names.

    Raises:
        MintError: there is no such folder and the name can't be a repository's, or mlx-lm can't
            handle the folder's path, or it can't be read.
    """
    try:
        folder = Path(model).expanduser()
    except RuntimeError:
        raise MintError(f"{model} does not exist (there is no such user): check the path") from None
    if folder.exists():
        check_name(folder.absolute(), "model")
        _check_readable(folder)
        return folder
    repo = hub.parse_repo(model)
    if repo is None or model.startswith((".", "/", "~")):
        raise MintError(
            f"{model} does not exist: give a folder, or a model of the Hugging Face Hub as org/name"
        )
    return repo


def _check_readable(folder: Path) -> None:
    """Refuse a folder that this user may not look into (a MintError)."""
    if not folder.is_dir():
        return
    try:
        os.scandir(folder).close()
        os.stat(os.path.join(folder, "."))  # the right to list names is not the one to open files
    except PermissionError:
        raise MintError(
            f"the folder {folder} cannot be read: check its permissions, or give another one"
        ) from None


def load_source(model: str, weights: bool = True) -> Source:
    """Find a checkpoint; a Hub repository is downloaded only if `weights` is true or needed.

    Raises:
        MintError: there is no such model, or what is there is incomplete or not a language model
            that mlx-lm knows.
        (Errors of huggingface_hub pass through; `errors.explain` has their sentences.)
    """
    repo = find_model(model)
    if not isinstance(repo, hub.RepoId):
        folder = repo.absolute()
        name = hub.repo_of(repo.resolve()) or repo.resolve().name
        return _from_folder(folder, name, None)

    with naming(repo.name):
        return _from_hub(repo, weights)


def _from_hub(repo: hub.RepoId, weights: bool) -> Source:
    """The source of a repository, downloaded only if `weights` is true or needed."""
    # Headers alone are fetched only where the cache doesn't hold the whole model already.
    if not weights:
        snapshot = hub.cached(repo)
        if snapshot is not None:
            return _from_folder(snapshot, repo.name, snapshot.name)
        # Weights of bitsandbytes tell their shapes only themselves: they are downloaded after all.
        with suppress(NeedsWeights):
            return _from_skeleton(repo)
    snapshot, commit = hub.download(repo)
    return _from_folder(snapshot, repo.name, commit)


def _from_skeleton(repo: hub.RepoId) -> Source:
    """The source of a repository whose weights stay on the Hub."""
    skeleton = hub.fetch_skeleton(repo)
    config, headers = _read_checked(skeleton.folder)
    config = _with_own_head(config, skeleton, headers, repo.name)
    return Source(
        name=repo.name,
        path=skeleton.folder,
        config=config,
        revision=skeleton.commit,
        structure=_hash_structure(config, headers),
        content=_digest(sorted(skeleton.hashes.items())),
        weight_bytes=skeleton.weight_bytes,
        has_weights=False,
        headers=headers,
    )


def _with_own_head(
    config: dict[str, Any],
    skeleton: hub.Skeleton,
    headers: dict[str, dict[str, TensorInfo]],
    name: str,
) -> dict[str, Any]:
    """The config of a repository whose head is stored, though its config ties it: untied where the
    head differs from the embedding, by some rows of both.

    Whatever opens the skeleton later must see the same, so its config.json says it too.

    Raises:
        MintError: they differ, and mlx-lm's class can't have a head of its own.
    """
    folder = skeleton.folder
    unknown = unknown_head(config, folder, headers, mlxlm.bare_model)
    for file, ranges in unknown.items():
        hub.fetch_ranges(name, skeleton.commit, file, ranges, folder)
    decided = with_own_head(config, folder, headers, mlxlm.bare_model)
    for file in unknown:
        hub.drop_shard(folder / file)  # a shard's rows say nothing beside empty ones of another
    if decided != config:
        (folder / "config.json").write_text(json.dumps(encoded(decided)), encoding="utf-8")
    return decided


def _from_folder(folder: Path, name: str, revision: str | None) -> Source:
    """The source of a folder that holds config.json and all shards."""
    _refuse_other_files(folder)
    config, headers = _read_checked(folder)
    size = sum((folder / file).stat().st_size for file in headers)
    stamp = _stamp(folder, headers)
    from_hub = all(hub.blob_hash(folder / file) for file in headers)
    return Source(
        name=name,
        path=folder,
        config=config,
        revision=revision,
        structure=_hash_structure(config, headers),
        content=_hash_content(folder, headers, in_full=size <= WHOLE),
        weight_bytes=size,
        has_weights=True,
        stamp=stamp,
        sampled=size > WHOLE and not from_hub,
        headers=headers,
    )


def _stamp(folder: Path, headers: Iterable[str]) -> str:
    """A hash of the sizes, times of change and places on the disk of all that the model is read
    from: shards, config.json and the tokenizer."""
    texts = [
        path.name
        for path in folder.iterdir()
        if path.is_file() and matches(path.name, ("config.json", *TOKENIZER))
    ]
    stats = {file: (folder / file).stat() for file in sorted([*headers, *texts])}
    return _digest([[file, s.st_size, s.st_mtime_ns, s.st_ino] for file, s in stats.items()])


def check_unchanged(source: Source, forget: Callable[[], None] = lambda: None) -> None:
    """Refuse what was made from a source whose files have changed since it was opened.

    Args:
        source: the source.
        forget: called before the refusal, to delete what the next run would take up.

    Raises:
        MintError: they have.
    """
    try:
        same = not source.stamp or _stamp(source.path, source.headers) == source.stamp
    except FileNotFoundError:
        same = False
    if not same:
        forget()
        raise MintError(
            f"the files of {source.name} have changed while they were read: run the same command "
            "again once nothing writes to them"
        )


def _refuse_other_files(path: Path) -> None:
    """Refuse a file in place of a folder, GGUF, with the name of its original, pipes and devices.

    Raises:
        MintError: saying what to give instead.
    """
    files = [path] if path.is_file() else sorted(path.iterdir())
    gguf = next((file for file in files if file.suffix.lower() == ".gguf"), None)
    if gguf is not None and not any(file.suffix == ".safetensors" for file in files):
        origin = original_repo(gguf)
        instead = "the original Hugging Face checkpoint"
        if origin:
            instead = f"{origin}, which it was made from"
        raise MintError(f"{gguf.name} is a GGUF file, which mint-mlx does not read: give {instead}")
    if path.is_file():
        raise MintError(f"{path} is a file: give the folder that holds config.json and the weights")

    # mlx-lm and transformers would wait for a pipe for ever, or read a device without end.
    strange = [f.name for f in files if f.exists() and not (f.is_file() or f.is_dir())]
    if strange:
        raise MintError(
            f"{path} holds {strange[0]}, which is a pipe or a device and not a file: remove it"
        )


def _read_checked(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, TensorInfo]]]:
    """The config and the headers of a folder.

    Raises:
        MintError: they are malformed, don't belong together, or mint-mlx can't read such a model.
    """
    stated = read_config(folder)
    check_values(stated)
    config = adapt(stated)
    mlxlm.check_model(config)
    check_values(config)
    check_keys(config)
    headers = read_folder(folder)
    check_depth(config, headers)
    check_tensors(config, folder, headers)
    config = with_stored_dtype(config, headers)
    return with_own_head(config, folder, headers, mlxlm.bare_model), headers


def with_nvfp4_kept(source: Source) -> Source:
    """The same source with its NVFP4 experts as they are packed; measurements are others then."""
    structure = _digest([source.structure, "keep nvfp4"])
    return replace(source, structure=structure, keep_nvfp4=True)


def with_dtype(source: Source, dtype: str) -> Source:
    """The same source, written in another 16-bit type.

    What was measured by running it holds for both; a profile is of the type that is written.

    Args:
        source: the source.
        dtype: a name of HALVES.
    """
    return replace(source, config=with_stated_dtype(source.config, dtype), dtype=dtype)


def read_as(source: Source, keep_nvfp4: bool, dtype: str | None) -> Source:
    """A source as a request wants it read (see `with_nvfp4_kept`, `with_dtype`)."""
    source = with_nvfp4_kept(source) if keep_nvfp4 else source
    return with_dtype(source, dtype) if dtype is not None else source


def brought_keys(source: Source) -> tuple[Brought, ...]:
    """What a source's config.json says where mlx-lm's class doesn't read it."""
    return brought(read_config(source.path))


def open_model(source: Source, stream: Any = None, exact: bool = False) -> Any:
    """The lazy mlx-lm model of a source, read on a CPU stream.

    Its weights may be evaluated only if `source.has_weights`. With `exact` the scales and biases of
    foreign formats are in float32, else in the type that they will be written in.
    """
    dtype = None if source.dtype is None else getattr(mlxlm.mx, source.dtype)
    return mlxlm.build_model(source.path, stream, exact, dtype, source.keep_nvfp4)


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _hash_structure(config: dict[str, Any], headers: dict[str, dict[str, TensorInfo]]) -> str:
    """A hash of the config and of where each tensor lies, with its type and shape."""
    tensors = [
        [file, name, t.dtype, list(t.shape), t.start]
        for file in sorted(headers)
        for name, t in headers[file].items()
    ]
    return _digest([config, tensors])


def _hash_content(folder: Path, headers: dict[str, dict[str, TensorInfo]], in_full: bool) -> str:
    """A hash of the weights: of the Hub's own hashes in its cache, else of all bytes or samples."""
    blobs = {name: hub.blob_hash(folder / name) for name in headers}
    if all(blobs.values()):
        return _digest(sorted(blobs.items()))

    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(headers):
        data = read_header(folder / name)[1]
        with (folder / name).open("rb") as file:
            if in_full:
                file.seek(data)
                while block := file.read(1 << 24):
                    digest.update(block)
                continue
            # The start, the middle and the end of each tensor.
            for info in headers[name].values():
                middle = (info.start + info.end) // 2
                for position in sorted({info.start, middle, max(info.start, info.end - SAMPLE)}):
                    file.seek(data + position)
                    digest.update(file.read(min(SAMPLE, info.end - position)))
    return digest.hexdigest()
