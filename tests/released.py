"""The tiny checkpoints of fixtures/, copied for a test to work on."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import numpy as np
from drawn import read_table, values
from helpers import write_tokenizer
from mlx_lm.utils import MODEL_REMAPPING

RELEASED = Path(__file__).parent / "fixtures"
# What mlx-lm 0.32.2 can't run as these families' own classes do, by what the refusal says.
REFUSED = {
    "bitnet": "reads packed ternary weights only",
    "cohere_untied": "has no head of its own",
    "glm": "partial_rotary_factor is 0.5, which mlx-lm's class glm does not read",
    "minimax": "layer_types is .* mlx-lm's class minimax does not read",
    "olmo": "needs a package",
}
METAL = ("muse_spark",)  # what mlx-lm runs on a Mac alone
TYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
FAMILIES = sorted(
    folder.name for folder in RELEASED.iterdir() if (folder / "config.json").is_file()
)


def known(family: str) -> bool:
    """Whether the installed mlx-lm has the family's model."""
    kind = json.loads((RELEASED / family / "config.json").read_text())["model_type"]
    return find_spec(f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}") is not None


def released(family: str, folder: Path) -> Path:
    """A copy of a family's checkpoint, with a tokenizer.

    The weights that make.py draws lie on a grid, as few released ones do: the copy's don't.
    """
    shutil.copytree(RELEASED / family, folder)
    for file in folder.glob("*.safetensors"):
        _move_off_grid(file)
    write_tokenizer(folder)
    if family == "kimi_k2":  # its tokenizer is code that nobody should have to run
        settings = {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _move_off_grid(file: Path) -> None:
    """Move a shard's bfloat16 weights by up to 4 %; mx.save would lose the type of FP8."""
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    drawn = np.random.default_rng(0)
    for entry in json.loads(data[8:start]).values():
        if entry.get("dtype") != "BF16" or len(entry["shape"]) < 2:
            continue
        begin, end = entry["data_offsets"]
        halves = np.frombuffer(data, "<u2", (end - begin) // 2, start + begin)
        numbers = (halves.astype("<u4") << 16).view("<f4")
        moved = numbers * drawn.uniform(0.96, 1.04, numbers.shape).astype("<f4")
        halves[:] = moved.view("<u4") >> 16
    file.write_bytes(data)


def saved(folder: Path, target: Path) -> Path:
    """A checkpoint of drawn_4/ or drawn_5/ with its weights, and without a tokenizer."""
    target.mkdir(parents=True)
    shutil.copyfile(folder / "config.json", target / "config.json")
    weights = {
        name: mx.array(values(name, line)).astype(TYPES[line[0]])
        for name, line in read_table(folder).items()
    }
    mx.save_safetensors(str(target / "model.safetensors"), weights, metadata={"format": "pt"})
    return target
