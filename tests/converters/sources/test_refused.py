"""Formats that aren't read are refused by their names, with what would serve instead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_hub import FakeHub
from helpers import Maker, RawTensors, edit_config, qwen3_moe, rewrite_shards
from quantized import CODES, INT4, Arrays, matched

from mint_mlx.base.errors import MintError
from mint_mlx.converters.sources import refused
from mint_mlx.converters.sources.packed import Unread
from mint_mlx.jobs import convert

Q_PROJ = "model.layers.0.self_attn.q_proj"
WORDS = np.ones((128, 16), dtype=np.int32)
# What stands in place of a weight, config.json's quantization_config, and why it is not read.
UNREAD: dict[str, tuple[dict[str, tuple[str, np.ndarray]], dict[str, Any], str]] = {
    "SmoothQuant of ModelOpt": (
        {
            "weight": ("I8", np.ones((128, 128))),
            "weight_scale": ("F32", np.ones(128)),
            "pre_quant_scale": ("F32", np.ones(128)),
        },
        {"quant_method": "modelopt"},
        "was smoothed by ModelOpt (AWQ or SmoothQuant)",
    ),
    "int4 of ModelOpt": (
        {"weight": ("U8", np.ones((64, 128))), "weight_scale": ("F32", np.ones((128, 1)))},
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"},
        "is int4 of ModelOpt, with two rows in a byte",
    ),
    "int4 of Quark": (
        {
            "weight": ("I32", WORDS),
            "weight_scale": ("F32", np.ones((128, 4))),
            "weight_zero_point": ("I32", np.ones((128, 1))),
        },
        {"quant_method": "quark"},
        "is packed integers of Quark",
    ),
    "a rotation": (
        {
            "weight_packed": ("I32", WORDS),
            "weight_scale": ("F32", np.ones((128, 4))),
            "weight_shape": ("I64", np.array([128, 128])),
        },
        {
            "quant_method": "compressed-tensors",
            "transform_config": {"config_groups": {"R1": {}}},
            "config_groups": {"g": {"weights": INT4}},
        },
        "was rotated by compressed-tensors (transform_config)",
    ),
    "a rotation of AutoRound": (
        {
            "weight_packed": ("U8", np.ones((128, 64))),
            "weight_scale": ("U8", np.ones((128, 4))),
        },
        {"quant_method": "auto-round", "rotation_config": {"algorithm": "hadamard"}},
        "was rotated by AutoRound (rotation_config)",
    ),
    "a rotation of GPTQModel": (
        {
            "qweight": ("I32", np.ones((16, 128))),
            "qzeros": ("I32", np.ones((4, 16))),
            "scales": ("F16", np.ones((4, 128))),
        },
        {"quant_method": "gptq", "bits": 4, "rotation": "hadamard"},
        "was rotated by GPTQModel (rotation)",
    ),
    "what AutoRound rotates by": (
        {"spinquant_r1_size": ("I64", np.ones(1))},
        {"quant_method": "auto-round", "rotation_config": {"algorithm": "quarot"}},
        "was rotated by AutoRound (rotation_config)",
    ),
    "what AutoRound rotates by, exported without a word of it": (
        {
            "hadamard_matrix": ("F32", np.ones((32, 32))),
            "weight_packed": ("U8", np.ones((128, 64))),
            "weight_scale": ("U8", np.ones((128, 4))),
        },
        {"quant_method": "compressed-tensors", "provider": "auto-round"},
        "was rotated by AutoRound",
    ),
    "HQQ": ({"W_q": ("U8", np.ones((64, 128)))}, {"quant_method": "hqq"}, "is a tensor of HQQ"),
    "quanto": (
        {"weight._data": ("I8", np.ones((128, 128))), "weight._scale": ("F32", np.ones((128, 1)))},
        {"quant_method": "quanto"},
        "is a tensor of quanto",
    ),
    "EXL3": (
        {"trellis": ("I16", np.ones((8, 8, 64)))},
        {"quant_method": "exl3"},
        "is a tensor of EXL3",
    ),
    "AWQ of another version": (
        {
            "qweight": ("I32", np.ones((128, 16))),
            "qzeros": ("I32", np.ones((128, 1))),
            "scales": ("F32", np.ones((128, 8))),
        },
        {"quant_method": "awq", "version": "gemv"},
        "is AWQ of version gemv, whose codes lie in another order",
    ),
    "AWQ in words of 16 bits": (
        {
            "qweight": ("I16", np.ones((32, 128))),
            "qzeros": ("F16", np.ones((8, 128))),
            "scales": ("F16", np.ones((8, 128))),
        },
        {"quant_method": "awq", "format": "gemv_fast", "checkpoint_format": "gemv_fast"},
        "is AWQ of version gemv_fast, whose codes lie in another order",
    ),
    "ParoQuant": (
        {
            "qweight": ("I32", np.ones((128, 16))),
            "qzeros": ("I32", np.ones((2, 16))),
            "scales": ("F16", np.ones((2, 128))),
            "theta": ("F16", np.ones((8, 64))),
            "channel_scales": ("F16", np.ones((1, 128))),
        },
        {"quant_method": "paroquant", "format": "paroquant"},
        "ParoQuant, which mint-mlx does not read",
    ),
    "QQQ": (
        {"B": ("I32", np.ones((8, 256))), "s_channel": ("F32", np.ones((1, 128)))},
        {"quant_method": "qqq"},
        "is packed by QQQ",
    ),
    "integers without scales": (
        {"weight": ("I8", np.ones((128, 128)))},
        {"quant_method": "compressed-tensors"},
        "is packed as I8, but not as mint-mlx reads compressed-tensors (it has weight; is the "
        "checkpoint complete?)",
    ),
    "something new": (
        {"weight_packed": ("U8", np.ones((128, 32))), "weight_scale": ("U8", np.ones((128, 8)))},
        {"quant_method": "something-new"},
        "is packed as U8, but not as mint-mlx reads 'something-new' (it has weight_packed, "
        "weight_scale)",
    ),
    "integers of which config.json says nothing": (
        {"weight": ("I8", np.ones((128, 128)))},
        {},
        "is of type I8, of which config.json says nothing",
    ),
    "scales beside a weight that isn't packed": (
        {"weight": ("F32", np.ones((128, 128))), "weight_scale": ("F32", np.ones(128))},
        {"quant_method": "fp8"},
        "is not packed (F32), but has scales beside it",
    ),
}


def _in_place_of_a_weight(folder: Path, name: str) -> Path:
    """Put the tensors of an unread format in place of a layer's weight."""
    tensors, table, _ = UNREAD[name]

    def change(shards: RawTensors) -> None:
        del shards[f"{Q_PROJ}.weight"]
        for leaf, (code, values) in tensors.items():
            dtype = {"I16": np.int16}.get(code) or CODES[code]
            values = np.ascontiguousarray(values, dtype=dtype)
            shards[f"{Q_PROJ}.{leaf}"] = (code, list(values.shape), values.tobytes())

    rewrite_shards(folder, change)
    if table:
        edit_config(folder, quantization_config=table)
    return folder


@pytest.mark.parametrize("name", UNREAD)
def test_other_formats_are_refused_by_their_reason(make: Maker, name: str) -> None:
    folder = _in_place_of_a_weight(make(qwen3_moe(1)), name)
    with pytest.raises(
        MintError, match=f"{re.escape(UNREAD[name][2])}.*: give the original in bf16"
    ):
        convert.convert(str(folder), "5bpw")


@pytest.mark.parametrize("location", ["weight_input", "input"])
def test_rotations_that_lie_in_the_weights_alone_are_no_reason(location: str) -> None:
    """llm-compressor's SpinQuant with R1 and R2 runs as a plain model."""
    uses = [{"location": "weight_output"}, {"location": location}]
    table = {"transform_config": {"config_groups": {"R1": {"apply": uses}}}}
    arrays: Arrays = {"packed": ("I32", np.ones((8, 8), np.int32))}
    arrays["scale"] = ("F32", np.ones((8, 1), np.float32))
    if location == "input":
        with pytest.raises(Unread, match="was rotated by compressed-tensors"):
            matched(refused, arrays, quant_method="compressed-tensors", **table)
    else:
        assert matched(refused, arrays, quant_method="compressed-tensors", **table) is None


@pytest.mark.parametrize(
    ("card", "instead"),
    [
        ("---\nbase_model: org/original\n---\n# A", "give org/original, which it was made from"),
        ("---\nbase_model:\n- org/first\n- org/b\n---\n", "give org/first, which it was made"),
        ("---\nbase_model: [\n---\n", "give the original in bf16"),
        ("no front matter", "give the original in bf16"),
    ],
)
def test_a_refusal_names_the_original(make: Maker, card: str, instead: str) -> None:
    folder = _in_place_of_a_weight(make(qwen3_moe(1)), "HQQ")
    (folder / "README.md").write_text(card)
    with pytest.raises(MintError, match=instead):
        convert.convert(str(folder), "5bpw")


def test_a_refusal_names_the_original_of_a_repository(hub: FakeHub) -> None:
    _in_place_of_a_weight(hub.folder, "HQQ")
    hub.card = {"base_model": ["org/original"]}
    done = hub.run("inspect", "org/tiny")
    assert done.returncode == 1, done.stderr
    assert "W_q is a tensor of HQQ, which mint-mlx does not read: give org/original" in " ".join(
        done.stderr.split()
    )
