"""GGUF files beside a source: writes its weights as one, and reads one back as a checkpoint.

A GGUF file that was read back is a checkpoint in float32, which is scored like any other; its size
is that of the tensors in the GGUF file, which the checkpoint's metadata say. (The `gguf` package is
optional, and imported on use.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..base.errors import MintError
from ..base.hf_config import edit_text_config, text_config
from ..checkpoint.source import Source, open_model
from ..converters.output.small_files import copy_small_files
from .gguf_names import ARCHITECTURES, gguf_name, rotated_heads

GGUF = ".gguf"
MAGIC = b"GGUF"  # what each file begins with
WEIGHTS = "model.safetensors"
HEAD, EMBEDDING = "output.weight", "model.embed_tokens.weight"
POSITIONS = ("rope_freqs", "rope_factors")  # follow from config.json
PACKED = "gguf_bytes"  # the key of its metadata


def gguf_package() -> Any:
    """The `gguf` package.

    Raises:
        MintError: it isn't installed.
    """
    try:
        import gguf
    except ImportError:
        raise MintError("GGUF files are read by the gguf package: `pip install gguf`") from None
    return gguf


def check_gguf(source: Source, files: Sequence[Path]) -> None:
    """Refuse GGUF files that can't be read as checkpoints of a source.

    Raises:
        MintError: one is missing or no GGUF file, the package is missing, or the family is none
            of those known.
    """
    for file in files:
        if not file.is_file():
            raise MintError(f"{file} does not exist: check the path")
        with file.open("rb") as opened:
            if opened.read(len(MAGIC)) != MAGIC:
                raise MintError(f"{file} is no GGUF file: download it again")
    if files:
        gguf_package()
        architecture_of(source)


def architecture_of(source: Source) -> str:
    """What GGUF calls a source's architecture.

    Raises:
        MintError: compare knows no GGUF files of this family.
    """
    family = text_config(source.config).get("model_type", "")
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise MintError(f"GGUF files of {family} cannot be compared, only those of {known}")
    return ARCHITECTURES[family]


def write_gguf(source: Source, file: Path) -> None:
    """Write a source's weights as a GGUF file in float32, without its vocabulary.

    Raises:
        MintError: the package is missing, or the family is none of those known.
    """
    gguf = gguf_package()
    architecture = architecture_of(source)
    writer = gguf.GGUFWriter(file, architecture)
    _write_settings(writer, text_config(source.config))
    for _, name, array, heads in _tensors(source, architecture, False):
        values = np.array(array.astype(mx.float32))
        writer.add_tensor(name, values if heads is None else _reorder(values, heads, to_pairs=True))
        mx.clear_cache()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(source: Source, file: Path, out: Path) -> None:
    """Write what a GGUF file holds as a checkpoint of the source's layout, in float32.

    Args:
        source: the model that it was made from.
        file: the GGUF file.
        out: the checkpoint's folder, which must not exist.

    Raises:
        MintError: the package is missing, or the file is of another model.
    """
    gguf = gguf_package()
    architecture = architecture_of(source)
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise MintError(f"{file.name} is no GGUF file that can be read ({error})") from None
    _check_settings(reader, file, source, architecture)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    other = f"{file.name} is of another model than {source.name}"

    weights: dict[str, mx.array] = {}
    for parameter, name, array, heads in _tensors(source, architecture, HEAD in stored):
        tensor = stored.pop(name, None)
        if tensor is None:
            raise MintError(f"{other}: it lacks {name}")
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.shape != array.shape:
            raise MintError(
                f"{other}: {name} has the shape {values.shape} in place of {array.shape}"
            )
        weights[parameter] = mx.array(
            values if heads is None else _reorder(values, heads, to_pairs=False)
        )
    if unread := sorted(name for name in stored if not name.startswith(POSITIONS)):
        raise MintError(f"{other}: it holds {unread[0]}, which that one has no place for")

    out.mkdir(parents=True)
    metadata = {"format": "mlx", PACKED: str(sum(int(t.n_bytes) for t in reader.tensors))}
    mx.save_safetensors(str(out / WEIGHTS), weights, metadata=metadata)
    config = edit_text_config(source.config, lambda text: text | {"torch_dtype": "float32"})
    config = {key: value for key, value in config.items() if key != "dtype"}
    if "lm_head.weight" in weights:  # also where the source has none
        config["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    copy_small_files(source, out, "text")


def _check_settings(reader: Any, file: Path, source: Source, architecture: str) -> None:
    """Refuse a file of another architecture, or a part of one (a MintError)."""
    fields = {name: reader.get_field(name) for name in ("general.architecture", "split.count")}
    stated, parts = (field and field.contents() for field in fields.values())
    if isinstance(parts, int) and parts > 1:
        raise MintError(
            f"{file.name} is one of {parts} parts: join them with `llama-gguf-split --merge`"
        )
    if stated != architecture:
        raise MintError(
            f"{file.name} is of another model than {source.name}: its architecture is {stated} in "
            f"place of {architecture}"
        )


def packed_bytes(folder: Path) -> int | None:
    """Bytes of the GGUF file that a checkpoint was read from; None for all others."""
    file = folder / WEIGHTS
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        stated = json.loads(opened.read(size)).get("__metadata__", {}).get(PACKED)
    return None if stated is None else int(stated)


def _tensors(
    source: Source, architecture: str, head: bool
) -> Iterator[tuple[str, str, mx.array, int | None]]:
    """Each parameter with GGUF's name of it, its (lazy) array and the heads to be reordered.

    Args:
        source: the model.
        architecture: what GGUF calls it.
        head: give the embedding a second time as the head where the model has none of its own.

    Raises:
        MintError: GGUF has no name for one.
    """
    text = text_config(source.config)
    heads = text["num_attention_heads"]
    key_heads = text.get("num_key_value_heads") or heads
    parameters = dict(tree_flatten(open_model(source).parameters()))
    if head and EMBEDDING in parameters:
        parameters.setdefault("lm_head.weight", parameters[EMBEDDING])
    for parameter, array in parameters.items():
        name = gguf_name(parameter)
        if name is None:
            raise MintError(f"GGUF has no name for {parameter}: it cannot be compared")
        yield parameter, name, array, rotated_heads(name, architecture, heads, key_heads)


def _reorder(values: np.ndarray, heads: int, to_pairs: bool) -> np.ndarray:
    """Rows of queries or keys in the other order of their rotation.

    transformers rotates the first half of a head's rows with the second, llama.cpp rows that are
    neighbours.

    Args:
        values: (rows, ...).
        heads: of the rows.
        to_pairs: from transformers' order to llama.cpp's, or back.
    """
    shape = (heads, 2, -1) if to_pairs else (heads, -1, 2)
    by_head = values.reshape(*shape, *values.shape[1:])
    return np.ascontiguousarray(by_head.swapaxes(1, 2).reshape(values.shape))


def _write_settings(writer: Any, text: dict[str, Any]) -> None:
    """The settings without which llama.cpp opens no file."""
    heads = text["num_attention_heads"]
    head = text.get("head_dim") or text["hidden_size"] // heads
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text.get("max_position_embeddings", 2048))
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(text.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_freq_base(float(text.get("rope_theta", 1e4)))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(text["vocab_size"])
    writer.add_file_type(0)
    if text.get("num_experts"):
        writer.add_expert_count(text["num_experts"])
        writer.add_expert_used_count(text["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(text["moe_intermediate_size"])
