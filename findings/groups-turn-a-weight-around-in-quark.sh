#!/usr/bin/env bash
# What: Quark stores 8-bit integers with a scale a row as the weight lies, (outputs, inputs), and with a
#   scale a group of inputs turned around, (inputs, outputs), scales with it. config.json tells of
#   neither: `ch_axis` is that of the weight before. The shape of a square weight shows nothing.
# Expected (the guess, written before it was run): the same orientation, with more scales.
# Seen (amd-quark 0.13, transformers 5.24.0, torch 2.13.0; 2026-12-01), which this script checks: a weight
#   of 128 x 64 is I8 [128, 64] with scales [128], and in groups of 32 I8 [64, 128] with scales
#   [2, 128]; the config says ch_axis -1 of groups, 0 of rows. Turned back, both agree with the original
#   to 1 %; as it lies, a square one has an error of 141 %.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet amd-quark==0.13 transformers==5.24.0 accelerate
cat > "$folder/look.py" <<'PY'
import json
import pathlib
import sys

import torch
import transformers
from quark.torch import ModelQuantizer, export_safetensors
from quark.torch.quantization.config.config import (
    Int8PerChannelSpec,
    Int8PerGroupSpec,
    QConfig,
    QLayerConfig,
)
from safetensors.torch import load_file

CONFIG = transformers.LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=False,
)
UP, SQUARE = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
MORE = {"symmetric": True, "scale_type": "float", "round_method": "half_even", "is_dynamic": False}


def export(folder, spec):
    """The tensors that Quark writes of a tiny Llama, what config.json says, and the original."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(CONFIG).eval()
    exact = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = QLayerConfig(weight=spec.to_quantization_spec())
    quantizer = ModelQuantizer(QConfig(global_quant_config=weights, exclude=["lm_head"]))
    tokens = [torch.arange(16)]
    model = quantizer.freeze(
        quantizer.quantize_model(model, torch.utils.data.DataLoader(tokens, batch_size=1))
    )
    with torch.no_grad():
        export_safetensors(model, str(folder), custom_mode="quark")
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return tensors, config["global_quant_config"]["weight"], exact


def error(weight, exact):
    return f"{float((weight - exact).norm() / exact.norm()):.2f}"


folder = pathlib.Path(sys.argv[1])
rows, stated, exact = export(folder / "rows", Int8PerChannelSpec(ch_axis=0, **MORE))
codes, scales = rows[f"{UP}.weight"], rows[f"{UP}.weight_scale"].float()
print("seen: a scale a row:", list(codes.shape), list(scales.shape), "ch_axis", stated["ch_axis"])
print("seen: error", error(codes.float() * scales[:, None], exact[f"{UP}.weight"]))

groups, stated, exact = export(folder / "groups", Int8PerGroupSpec(ch_axis=-1, group_size=32, **MORE))
codes, scales = groups[f"{UP}.weight"], groups[f"{UP}.weight_scale"].float()
print("seen: a scale a group:", list(codes.shape), list(scales.shape), "ch_axis", stated["ch_axis"])
wide = codes.float() * scales.repeat_interleave(32, 0)
print("seen: error, turned back", error(wide.T, exact[f"{UP}.weight"]))
codes, scales = groups[f"{SQUARE}.weight"], groups[f"{SQUARE}.weight_scale"].float()
wide = codes.float() * scales.repeat_interleave(32, 0)
print("seen: error of a square one as it lies", error(wide, exact[f"{SQUARE}.weight"]))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/errors" > "$folder/printed" || { tail -n 5 "$folder/errors"; exit 1; }
grep "^seen:" "$folder/printed" > "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
seen: a scale a row: [128, 64] [128] ch_axis 0
seen: error 0.01
seen: a scale a group: [64, 128] [2, 128] ch_axis -1
seen: error, turned back 0.01
seen: error of a square one as it lies 1.41
SEEN
