"""A head that is stored although the model has none: its class uses the embedding in its place.

Training tools save both. Equal ones are one tensor, and the copy is dropped. Where they differ, the
head was trained on its own, and the model is the one that has it: transformers 5 then unties the
two, and so does this file. mlx-lm drops the head in silence, or fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..base.errors import MintError
from ..base.hf_config import config_tables, edit_text_config, text_config
from ..base.safetensors_header import TensorInfo, read_header
from .arrays import FLOATS
from .block_path import block_of
from .model_classes import text_class
from .roles import TOWER

HEAD = re.compile(r"(.+\.)?lm_head\.weight")
# What a head's tensors, also packed ones, are called in the classes of mlx-lm.
HEADS = re.compile(r"(.+\.)?(lm_head|embed_out|output|head)\.\w+")
EMBEDDING = re.compile(
    r"(.+\.)?(embed_tokens|word_embeddings|tok_embeddings|embed_in|embeddings|embedding|wte)\.weight"
)
TIED = "tie_word_embeddings"
CHUNK = 1 << 24  # bytes compared at once
SAMPLE = 12  # rows that are compared of a model on the Hub

Headers = Mapping[str, Mapping[str, TensorInfo]]  # tensors by file and name
Build = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file: path, time of change, type, shape, and its bytes' place in the file."""

    file: Path
    changed: int
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def with_own_head(
    config: dict[str, Any], folder: Path, headers: Headers, bare_model: Build
) -> dict[str, Any]:
    """A config that unties head and embedding, where the folder holds two that differ.

    Of a text model inside a larger one it says in both tables what the tensors say.

    Args:
        config: config.json.
        folder: of the checkpoint; where its shards are sparse (hub.Skeleton) no tensors differ.
        headers: of its shards.
        bare_model: builds the model that a config describes (mlxlm.bare_model).

    Raises:
        MintError: they differ, and mlx-lm's class can't have a head of its own.
    """
    if "quantization" in config or (_agrees(config) and _is_untied(config)):
        return config
    head = _find(HEAD, folder, headers)
    embedding = _find(EMBEDDING, folder, headers)
    if not _agrees(config):
        config = _with_inner_tie(config, head, embedding, headers)
    if head is None or embedding is None or _is_untied(config) or _has_head(config, bare_model):
        return config
    if _equal(head, embedding):
        return config

    config_untied = _stating(config, tied=False)
    if not _has_head(config_untied, bare_model):
        raise MintError(
            f"{folder.name} holds an lm_head.weight that differs from its embedding, but "
            f"mlx-lm's class for {config.get('model_type')!r} has no head of its own: give a "
            "checkpoint whose head is tied to its embedding"
        )
    return config_untied


def unknown_head(
    config: dict[str, Any], folder: Path, headers: Headers, bare_model: Build
) -> dict[str, list[tuple[int, int]]]:
    """Which bytes of shards tell whether a stored head is a copy, where the weights aren't here.

    Args:
        config: that of `with_own_head`, to which all heads without weights are copies.
        folder: of the checkpoint.
        headers: of its shards.
        bare_model: as of `with_own_head`.

    Returns:
        By shard the first byte and the end of each of some rows of both tensors, from where the
        shard's data begins; nothing where there is no head that would be dropped.
    """
    if "quantization" in config or _is_untied(config):
        return {}
    head = _find(HEAD, folder, headers)
    embedding = _find(EMBEDDING, folder, headers)
    if head is None or embedding is None or head.shape != embedding.shape:
        return {}
    if _has_head(config, bare_model):
        return {}
    ranges: dict[str, list[tuple[int, int]]] = {}
    for tensor in (head, embedding):
        data = read_header(tensor.file)[1]
        width = (tensor.end - tensor.start) // tensor.shape[0]
        for row in np.unique(np.linspace(0, tensor.shape[0] - 1, SAMPLE).astype(int)):
            start = tensor.start - data + int(row) * width
            ranges.setdefault(tensor.file.name, []).append((start, start + width))
    return ranges


def drop_copy(
    model: Any, config: dict[str, Any], weights: dict[str, mx.array]
) -> dict[str, mx.array]:
    """A checkpoint's tensors without a copy of the embedding for a head that the model lacks.

    Where nothing but the copy is stored, it is the embedding: tools that store each tensor once
    keep the first of its names. `config` must be that of `with_own_head`.
    """
    if "quantization" in config:
        return weights
    parameters = list(_parameters(model))
    is_tied = not _holds_head(parameters)
    copies = {name: array for name, array in weights.items() if HEAD.fullmatch(name)}
    embeddings = [name for name in parameters if EMBEDDING.fullmatch(name)]
    only_copy = len(copies) == len(embeddings) == 1 and not any(map(EMBEDDING.fullmatch, weights))
    if not is_tied and not (only_copy and _says(config) is True):
        return weights
    kept = {name: array for name, array in weights.items() if name not in copies}
    return kept | dict(zip(embeddings, copies.values(), strict=True)) if only_copy else kept


def with_copy(
    model: Any, config: dict[str, Any], weights: dict[str, mx.array]
) -> dict[str, mx.array]:
    """A checkpoint's tensors with the embedding as head, for a class that always has one.

    transformers ties any family's head; some classes of mlx-lm don't read that their config does.
    """
    if "quantization" in config or _says(config) is not True or _holds_head(weights):
        return weights
    embeddings = [name for name in weights if EMBEDDING.fullmatch(name)]
    heads = [name for name in _parameters(model) if HEAD.fullmatch(name)]
    if len(embeddings) != 1 or len(heads) != 1:
        return weights
    return weights | {heads[0]: weights[embeddings[0]]}


def _stated(config: dict[str, Any]) -> list[bool]:
    """What the tables of a config say, the outer one first; nothing of a table that is silent."""
    tables = config_tables(config)
    return [table[TIED] for table in tables if isinstance(table.get(TIED), bool)]


def _agrees(config: dict[str, Any]) -> bool:
    """Whether all tables of a config say the same; a single one does, whatever it says."""
    return text_config(config) is config or _stated(config) in ([True, True], [False, False])


def _with_inner_tie(
    config: dict[str, Any], head: _Stored | None, embedding: _Stored | None, headers: Headers
) -> dict[str, Any]:
    """The config of a text model inside a larger one whose table says whether it has a head.

    mlx-lm's classes read that table alone, transformers 4 one of the two, transformers 5 the outer
    one, and each leaves out what is its default: only the tensors tell it for all.
    """
    if embedding is None or (head is None and _has_other_head(headers)):
        return config

    # A head that is missing is no tied one where all that is stated denies it.
    denied = _stated(config) == [False]
    if head is None:
        return config if denied else _stating(config, tied=True)
    return _stating(config, tied=not denied and _equal(head, embedding))


def _has_other_head(headers: Headers) -> bool:
    """Whether a head may be stored in packed form, or by another name."""
    names = (name for table in headers.values() for name in table)
    return _holds_head(name for name in names if not TOWER.search(name))


def _stating(config: dict[str, Any], tied: bool) -> dict[str, Any]:
    """The config that says so in all its tables."""
    return edit_text_config(config | {TIED: tied}, lambda table: table | {TIED: tied})


def _says(config: dict[str, Any]) -> Any:
    """Whether a config ties both; None where it doesn't say it."""
    text = text_config(config)
    return text.get(TIED, config.get(TIED))


def _is_untied(config: dict[str, Any]) -> bool:
    """Whether a config says so, and the class of its text model knows heads at all."""
    if _says(config) is not False:
        return False
    reader = text_class(config)
    return reader is None or "lm_head" in reader.code


def _has_head(config: dict[str, Any], bare_model: Build) -> bool:
    """Whether the class of a config builds a head (true also where it builds no model at all)."""
    try:
        return _holds_head(_parameters(bare_model(config)))
    except MintError:
        return True


def _holds_head(names: Iterable[str]) -> bool:
    """Whether a head is among tensors of these names."""
    return any(HEADS.fullmatch(name) and block_of(name) is None for name in names)


def _parameters(model: Any) -> Iterator[str]:
    return (name for name, _ in tree_flatten(model.parameters()))


def _find(pattern: re.Pattern[str], folder: Path, headers: Headers) -> _Stored | None:
    """The one 16- or 32-bit matrix of this name outside of towers; None where there is none."""
    matrices = []
    for file, table in headers.items():
        for name, info in table.items():
            if pattern.fullmatch(name) and not TOWER.search(name) and not name.startswith("mtp."):
                matrices.append((file, info))
    matrices = [
        (file, info) for file, info in matrices if info.dtype in FLOATS and len(info.shape) == 2
    ]
    if not matrices:
        return None

    # (Of several, as in Gemma-3n, the largest is the vocabulary's.)
    file, info = max(matrices, key=lambda pair: pair[1].end - pair[1].start)
    path = folder / file
    data = read_header(path)[1]
    changed = path.stat().st_mtime_ns
    return _Stored(path, changed, info.dtype, info.shape, data + info.start, data + info.end)


@lru_cache(maxsize=8)
def _equal(head: _Stored, embedding: _Stored) -> bool:
    """Whether two tensors hold the same numbers; true where the weights of one aren't here."""
    if head.shape != embedding.shape:
        return False
    known = True
    rows = max(1, CHUNK // (4 * head.shape[1]))
    for start in range(0, head.shape[0], rows):
        pair = [_read(tensor, start, rows) for tensor in (head, embedding)]
        if not all(values.any() for values in pair):
            continue  # what was not downloaded reads as zeros
        if head.dtype == embedding.dtype:
            known = np.array_equal(pair[0], pair[1])
        else:
            numbers = _floats(pair[0], head.dtype)
            known = bool(mx.array_equal(numbers, _floats(pair[1], embedding.dtype)))
        if not known:
            return False
    return known


def _read(tensor: _Stored, start: int, rows: int) -> np.ndarray:
    """Rows of a tensor, with numpy's types (BF16 as its bits)."""
    kind = np.dtype(FLOATS[tensor.dtype])
    row_bytes = tensor.shape[1] * kind.itemsize
    begin = tensor.start + start * row_bytes
    count = min(rows * row_bytes, tensor.end - begin) // kind.itemsize
    return np.fromfile(tensor.file, dtype=kind, count=count, offset=begin)


def _floats(values: np.ndarray, dtype: str) -> mx.array:
    array = mx.array(values)
    return (array.view(mx.bfloat16) if dtype == "BF16" else array).astype(mx.float32)
