"""gpt-oss: MXFP4, and experts whose gate and up projections are fused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from formulas import E2M1, as_numpy, raw, weight
from helpers import Weights, edit_weights
from mlx.utils import tree_flatten
from released import RELEASED

from mint_mlx.base.errors import MintError
from mint_mlx.checkpoint.source import load_source, open_model


@pytest.mark.parametrize(
    ("projection", "fused", "rows"),
    [
        ("gate_proj", "gate_up_proj", slice(0, None, 2)),
        ("up_proj", "gate_up_proj", slice(1, None, 2)),
        ("down_proj", "down_proj", slice(None)),
    ],
)
def test_mxfp4_is_e2m1_times_a_power_of_two(projection: str, fused: str, rows: slice) -> None:
    folder = RELEASED / "gpt_oss"
    prefix = "model.layers.1.mlp.experts"
    blocks, scales = (raw(folder, f"{prefix}.{fused}_{name}") for name in ("blocks", "scales"))
    values = np.stack([E2M1[blocks & 15], E2M1[blocks >> 4]], axis=-1)
    sizes = 2.0 ** (scales[..., None].astype(np.float32) - 127)
    scaled = values.reshape(*blocks.shape[:3], 32) * sizes
    wanted = scaled.reshape(*blocks.shape[:2], -1)[:, rows]
    np.testing.assert_array_equal(weight(folder, f"{prefix}.{projection}"), wanted)


def test_gpt_oss_experts_in_bf16_are_those_of_the_fused_tensors() -> None:
    folder = RELEASED / "gpt_oss_bf16"
    prefix = "model.layers.0.mlp.experts"
    fused, bias = raw(folder, f"{prefix}.gate_up_proj"), raw(folder, f"{prefix}.gate_up_proj_bias")
    model = dict(tree_flatten(open_model(load_source(str(folder))).parameters()))
    for projection, start in (("gate_proj", 0), ("up_proj", 1)):
        weights, biases = (
            as_numpy(model[f"{prefix}.{projection}.{name}"]) for name in ("weight", "bias")
        )
        np.testing.assert_array_equal(weights, fused[:, :, start::2].transpose(0, 2, 1))
        np.testing.assert_array_equal(biases, bias[:, start::2])
    down = raw(folder, f"{prefix}.down_proj").transpose(0, 2, 1)
    np.testing.assert_array_equal(as_numpy(model[f"{prefix}.down_proj.weight"]), down)


def by_kind(name: str, number: int) -> str:
    """As unsloth names the linear layers that it makes of experts."""
    return f"{name.replace('_proj', '_projs')}.{number}"


def by_number(name: str, number: int) -> str:
    """As llm-compressor does."""
    base, _, leaf = name.rpartition(".")
    return f"{base}.{number}.{leaf}"


def single(folder: Path, rename: Callable[[str, int], str]) -> None:
    """Give each expert of a checkpoint linear layers of its own."""

    def change(weights: Weights) -> Weights:
        out: Weights = {}
        for name, array in weights.items():
            base, _, leaf = name.rpartition(".")
            kind = leaf.removesuffix("_bias")
            if not base.endswith("experts"):
                out[name.replace(".router.", ".router.linear.")] = array
                continue
            rows = array if leaf.endswith("_bias") else array.swapaxes(-1, -2)
            parts = {kind: rows}
            if kind == "gate_up_proj" and rename is by_number:
                parts = {"gate_proj": rows[:, ::2], "up_proj": rows[:, 1::2]}
            for part, values in parts.items():
                for number in range(len(values)):
                    end = "bias" if leaf.endswith("_bias") else "weight"
                    out[f"{rename(f'{base}.{part}', number)}.{end}"] = values[number]
        return out

    edit_weights(folder, change)


@pytest.mark.parametrize("rename", [by_kind, by_number])
def test_experts_as_single_linear_layers(rename: Callable[[str, int], str], tmp_path: Path) -> None:
    fused, folder = tmp_path / "fused", tmp_path / "single"
    for copy in (fused, folder):
        copy.mkdir()
        shutil.copy(RELEASED / "gpt_oss_bf16" / "config.json", copy)
        shards = sorted((RELEASED / "gpt_oss_bf16").glob("*.safetensors"))
        weights = {k: v for shard in shards for k, v in mx.load(str(shard)).items()}
        mx.save_safetensors(str(copy / "model.safetensors"), weights)
    single(folder, rename)
    models = [
        dict(tree_flatten(open_model(load_source(str(each))).parameters()))
        for each in (fused, folder)
    ]
    assert models[0].keys() == models[1].keys()
    for name, array in models[0].items():
        np.testing.assert_array_equal(as_numpy(array), as_numpy(models[1][name]))

    # Where one is missing nothing is guessed.
    missing = f"{rename('model.layers.0.mlp.experts.down_proj', 0)}.weight"
    edit_weights(folder, lambda w: {n: a for n, a in w.items() if n != missing})
    with pytest.raises(MintError, match="parameters not in model"):
        open_model(load_source(str(folder)))
