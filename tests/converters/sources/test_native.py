"""Packed layouts that a class of mlx-lm reads itself: DeepSeek-V4.1's, and Muse-Spark's NVFP4."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from families import write_family
from formulas import as_numpy, bf16, e4m3
from helpers import RawTensors, Weights, edit_config, rewrite_shards
from mlx_lm.utils import load_model
from quantized import raw_tensor

from mint_mlx.base.quant_config import NVFP4_GLOBAL, mx_mode
from mint_mlx.checkpoint.arrays import dense
from mint_mlx.checkpoint.layer_stream import stream
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.model import prepare

RNG = np.random.default_rng(4)
RENAMED = {
    "lm_head.weight": "head.weight",
    "model.embed_tokens.": "embed.",
    ".self_attn.": ".attn.",
    ".mlp.experts.switch_mlp.": ".ffn.experts.",
    ".mlp.": ".ffn.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    ".attn_hc.": ".hc_attn_",
    ".ffn_hc.": ".hc_ffn_",
    ".sinks": ".attn_sink",
    ".q_a_proj.": ".wq_a.",
    ".q_b_proj.": ".wq_b.",
    ".kv_proj.": ".wkv.",
    ".o_a_proj.": ".wo_a.",
    ".o_b_proj.": ".wo_b.",
    ".q_a_norm.": ".q_norm.",
    ".gate.e_score_correction_bias": ".gate.bias",
    "_experts.gate_proj.": "_experts.w1.",
    "_experts.down_proj.": "_experts.w2.",
    "_experts.up_proj.": "_experts.w3.",
    "experts.gate_proj.": "experts.w1.",
    "experts.down_proj.": "experts.w2.",
    "experts.up_proj.": "experts.w3.",
    "model.": "",
}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [32, 32],
    "expert_dtype": "fp4",
}


def known(family: str) -> bool:
    """Whether the installed mlx-lm has the family."""
    return find_spec(f"mlx_lm.models.{family}") is not None


def bfloat(array: mx.array) -> tuple[str, list[int], bytes]:
    """A tensor for `rewrite_shards` in bfloat16."""
    bits = np.array(array.astype(mx.bfloat16).view(mx.uint16))
    return "BF16", list(bits.shape), bits.tobytes()


def weights_of(folder: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Weights of a checkpoint's layers by name, dequantized."""
    job = prepare(str(folder))
    layers = {layer.path: layer for layer in job.inventory.layers}
    wanted = {name.removesuffix(".weight") for name in names}
    paths = [path for path in job.inventory.order if path in wanted]
    return {
        f"{path}.weight": as_numpy(dense(layers[path], tensors))
        for path, tensors in stream(job.source, job.inventory, paths)
    }


def fp8(shape: tuple[int, ...]) -> tuple[RawTensors, np.ndarray]:
    """An FP8 weight in tiles of 32x32 with scales of powers of two, and its values."""
    codes = RNG.integers(0, 0x60, shape).astype(np.uint8)
    tiles = tuple(-(-n // 32) for n in shape)
    exponents = RNG.integers(110, 120, tiles).astype(np.uint8)
    scales = np.repeat(np.repeat(2.0 ** (exponents - 127.0), 32, 0), 32, 1)
    tensors = {
        "weight": raw_tensor("F8_E4M3", codes),
        "scale": raw_tensor("F8_E8M0", exponents),
    }
    return tensors, e4m3(codes) * scales[: shape[0], : shape[1]]


@pytest.mark.skipif(
    find_spec("mlx_lm.models.deepseek_v41") is None, reason="this mlx-lm has no DeepSeek-V4.1"
)
def test_deepseek_v41_keeps_its_codes(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", "deepseek_v41")
    weights: Weights = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(weights)
    tensors: RawTensors = {}
    expected = {}
    for name, array in weights.items():
        released = name
        for ours, theirs in RENAMED.items():
            released = released.replace(ours, theirs)
        stem = released.removesuffix("weight")
        if ".ffn.experts." in released:
            codes, exponents = mx.quantize(array, 32, 4, mode="mxfp4")
            expected[name] = as_numpy(mx.dequantize(codes, exponents, None, 32, 4, mode="mxfp4"))
            for e in range(len(array)):
                one = stem.replace("experts.", f"experts.{e}.")
                tensors[f"{one}weight"] = raw_tensor("I8", np.array(codes[e]).view(np.int8))
                tensors[f"{one}scale"] = raw_tensor("F8_E8M0", np.array(exponents[e]))
        elif re.search(r"\.w\w{1,3}\.", released):
            packed, expected[name] = fp8((array.size // array.shape[-1], array.shape[-1]))
            tensors |= {f"{stem}{role}": tensor for role, tensor in packed.items()}
        else:
            tensors[released] = bfloat(array)
    rewrite_shards(folder, lambda stored: (stored.clear(), stored.update(tensors)))
    edit_config(folder, quantization_config=FP8)

    layers = {layer.path: layer for layer in prepare(str(folder)).inventory.layers}
    result = convert(str(folder), "16bpw", tmp_path / "out", effort="fast", smoke=False)
    load_model(tmp_path / "out")
    for name in expected:
        path = name.removesuffix(".weight")
        stored = mx_mode("mxfp4" if "switch_mlp" in path else "mxfp8")
        assert layers[path].stored == stored
        assert result.plan.choice[path] == stored
    for read in (weights_of(folder, expected), weights_of(tmp_path / "out", expected)):
        for name, values in expected.items():
            exact = bf16(values.reshape(read[name].shape))
            np.testing.assert_array_equal(read[name], exact, err_msg=name)


@pytest.mark.skipif(
    find_spec("mlx_lm.models.muse_spark") is None, reason="this mlx-lm has no Muse-Spark"
)
@pytest.mark.parametrize("keep", [False, True])
def test_muse_spark_is_dequantized_unless_it_shall_stay(tmp_path: Path, keep: bool) -> None:
    folder = write_family(tmp_path / "model", "muse_spark")
    weights: Weights = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(weights)
    tensors: RawTensors = {}
    expected = {}
    for name, array in weights.items():
        base, _, kind = name.partition(".mlp.experts.")
        if "_proj" in kind:
            expected[name] = array
        elif name.endswith("qkvg_proj.weight"):
            names = ("q_proj", "k_proj", "v_proj", "gate_proj")
            for one, part in zip(names, mx.split(array, [64, 96, 128]), strict=True):
                tensors[name.replace("qkvg_proj", one)] = bfloat(part)
        elif "_alpha" in name:
            for gate in ("post_attention", "post_feedforward"):
                block = name.rpartition(".")[0]
                tensors[f"{block}.{gate}_residual_gate.gate"] = bfloat(array)
        elif "_beta" not in name:
            tensors[name] = bfloat(array)

    # Experts of gate and up lie in one tensor, with a number each for every expert.
    for name in [name for name in expected if "gate_proj" in name]:
        base = name.removesuffix("gate_proj.weight")
        for fused, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj",) * 2):
            parts = (parts,) if isinstance(parts, str) else parts
            count = len(expected[name])
            whole = RNG.uniform(0.5, 2, (count, len(parts))).astype(np.float32)
            packed = []
            for part, number in zip(parts, whole.T, strict=True):
                codes, scales = mx.quantize(expected[f"{base}{part}.weight"], 16, 4, mode="nvfp4")
                values = mx.dequantize(codes, scales, None, 16, 4, mode="nvfp4", dtype=mx.float32)
                expected[f"{base}{part}.weight"] = values * mx.array(number)[:, None, None]
                packed.append((np.array(codes).view(np.uint8), np.array(scales)))
            stem = f"{base}{fused}"
            tensors[stem] = raw_tensor("U8", np.concatenate([c for c, _ in packed], 1))
            tensors[f"{stem}_weight_scale"] = raw_tensor(
                "F8_E4M3", np.concatenate([s for _, s in packed], 1)
            )
            numbers = whole if len(parts) > 1 else whole[:, 0]
            tensors[f"{stem}_weight_scale_2"] = raw_tensor("F32", numbers)
            tensors[f"{stem}_input_scale"] = raw_tensor("F32", np.ones(1))
    rewrite_shards(folder, lambda stored: (stored.clear(), stored.update(tensors)))
    edit_config(folder, quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"})
    (folder / "tokenizer.json").unlink()  # transformers' config for it takes no tiny model

    options = {"out": tmp_path / "out", "smoke": False, "keep_nvfp4": keep}
    result = convert(str(folder), uniform="keep", **options)
    load_model(tmp_path / "out")
    for name in expected:
        path = name.removesuffix(".weight")
        assert (result.plan.choice[path] == NVFP4_GLOBAL) is keep
    for read in (weights_of(folder, expected), weights_of(tmp_path / "out", expected)):
        for name, values in expected.items():
            np.testing.assert_array_equal(read[name], bf16(as_numpy(values)), err_msg=name)
