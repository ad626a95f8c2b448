"""Write a Hugging Face checkpoint with a released model's true shapes and random weights.

    python eval/bench/make_model.py qwen3-30b-a3b --layers 2 -o FOLDER

Names, shapes, types and shards are those of the released files (config.json and index of each model
on the Hub), for a few of its layers. The weights are heavy-tailed (Student's t with six degrees of
freedom, a scale of its own for each row), drawn from one pool of such numbers, so that writing is
bound by the disk. The tokenizer knows bytes only.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mint_mlx.eval.bench.shapes import COMMON, SHAPES, Shapes

SHARD = 4_000_000_000  # bytes at most
POOL = 1 << 24  # numbers that weights are drawn from
ITEMSIZE = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}


def dtype_of(name: str, config: dict[str, Any]) -> str:
    """The safetensors type of a tensor in the released file."""
    if name.endswith(("_blocks", "_scales")):
        return "U8"
    if name.endswith(("_scale_inv", "e_score_correction_bias", "A_log")):
        return "F32"
    fp8 = config.get("quantization_config", {}).get("quant_method") == "fp8"
    return "F8_E4M3" if fp8 and name.endswith(("_proj.weight", "_mqa.weight")) else "BF16"


def _bf16(x: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 of float32 numbers, truncated."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


class Weights:
    """Random tensors by name, shape and type."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        normal = self.rng.standard_normal(POOL, dtype=np.float32)
        spread = self.rng.chisquare(6, POOL).astype(np.float32) / 6
        self.pool = normal / np.sqrt(spread)
        self.codes = self.rng.integers(0, 256, POOL, dtype=np.uint8)

    def make(self, name: str, shape: tuple[int, ...], dtype: str) -> bytes:
        """The tensor's bytes."""
        size = int(np.prod(shape))
        if name.endswith("_scales"):
            # Exponents of MXFP4, around 2^-6.
            return self.rng.integers(119, 123, size, dtype=np.uint8).tobytes()
        if dtype == "U8":
            return self._repeat(self.codes, size).tobytes()
        if dtype == "F8_E4M3":
            # No NaN: its code is 127 with either sign.
            codes = self._repeat(self.codes, size)
            return np.where((codes & 127) == 127, codes ^ 1, codes).tobytes()
        if name.endswith("_scale_inv"):
            return (self.rng.uniform(0.5, 1.5, size) * 2e-4).astype(np.float32).tobytes()
        if len(shape) == 1 or name.endswith("A_log"):
            start = 1.0 if "norm" in name else 0.0
            values = (start + 0.02 * self.rng.standard_normal(size)).astype(np.float32)
            return values.tobytes() if dtype == "F32" else _bf16(values).tobytes()

        # A matrix; its rows differ in scale.
        rows = size // shape[-1]
        spread = np.exp(0.3 * self.rng.standard_normal((rows, 1), dtype=np.float32))
        scale = spread * 0.7 / np.sqrt(shape[-1])
        values = self._repeat(self.pool, size).reshape(rows, shape[-1]) * scale.astype(np.float32)
        return _bf16(values).tobytes()

    def _repeat(self, pool: np.ndarray, size: int) -> np.ndarray:
        """So many numbers of the pool from a random place on, as often around as it takes."""
        start = int(self.rng.integers(0, POOL))
        return np.resize(np.roll(pool, -start) if size > POOL - start else pool[start:], size)


def write(shape: str, layers: int, folder: Path) -> int:
    """Write the checkpoint; returns the bytes of its weights."""
    builder, _ = SHAPES[shape]
    config, shapes = builder(layers)
    config = COMMON | {"eos_token_id": 0, "bos_token_id": 1} | config
    dtypes = {name: dtype_of(name, config) for name in shapes}
    sizes = {name: int(np.prod(s)) * ITEMSIZE[dtypes[name]] for name, s in shapes.items()}

    # Shards are filled in the order of the tensors.
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > SHARD:
            shards.append([])
        shards[-1].append(name)

    folder.mkdir(parents=True)
    weights = Weights()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file).open("wb") as out:
            out.write(_header(names, dtypes, shapes, sizes))
            for name in names:
                out.write(weights.make(name, shapes[name], dtypes[name]))
        weight_map |= dict.fromkeys(names, file)

    total = sum(sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    return total


def _header(
    names: list[str], dtypes: dict[str, str], shapes: Shapes, sizes: dict[str, int]
) -> bytes:
    """A safetensors file's first bytes: a length, and what lies where."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        offsets = [position, position + sizes[name]]
        header[name] = {"dtype": dtypes[name], "shape": shapes[name], "data_offsets": offsets}
        position += sizes[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    shape = options.shape
    if options.out.exists():
        sys.exit(f"error: {options.out} exists already: choose another folder with -o")

    # The two kinds of layers of gpt-oss take turns.
    least = 2 if shape == "gpt-oss-20b" else 1
    most = SHAPES[shape][1]
    if not least <= options.layers <= most:
        sys.exit(f"error: {shape} has {most} layers: give --layers from {least} to {most}")

    total = write(shape, options.layers, options.out)
    print(f"{options.out}: {shape}, {options.layers} of {most} layers, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
