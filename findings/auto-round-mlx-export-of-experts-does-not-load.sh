#!/usr/bin/env bash
# What: AutoRound's `mlx` export says of itself "load with: from mlx_lm import load". Of a Qwen3-MoE
#   stock mlx-lm loads it in no way: config.json calls the number of experts `num_local_experts`,
#   which mlx-lm's class doesn't read, and the codes of each expert lie by themselves, where the
#   class stacks tensors called `weight` alone and refuses the scales and biases that remain. On a
#   CPU without bf16 all that isn't quantized is written in float32, embeddings above all.
# Guess before running: experts are stacked as mlx-lm's own conversion writes them.
# Seen (auto-round 0.16.1, transformers 5.24.0, torch 2.13.0, mlx-lm 0.32.2, mlx 0.32.4;
#   2026-11-30), which this script checks: the export of a dense Qwen3 of the same size loads; that
#   of the MoE doesn't, neither as written nor with `num_experts` put back; with its experts stacked
#   by hand it does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet auto-round==0.16.1 transformers==5.24.0 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cat > "$folder/export.py" <<'PY'
import sys

import torch
import transformers
from auto_round import AutoRound
from tokenizers import Tokenizer, models

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 128, "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
torch.manual_seed(0)
tokens = Tokenizer(models.WordLevel({str(i): i for i in range(96)}, unk_token="0"))
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens)
for name, config in (
    ("dense", transformers.Qwen3Config(**SIZES)),
    ("experts", transformers.Qwen3MoeConfig(**SIZES, **EXPERTS)),
):
    source = f"{sys.argv[1]}/{name}"
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(source)
    tokenizer.save_pretrained(source)
    rounded = AutoRound(source, tokenizer, scheme="W4A16", group_size=64, sym=False, iters=0, device_map="cpu")
    rounded.quantize_and_save(f"{source}-mlx", format="mlx")
PY
cat > "$folder/look.py" <<'PY'
import json
import pathlib
import re
import sys

import mlx.core as mx
from mlx_lm.utils import load_model

folder = pathlib.Path(sys.argv[1])


def export(name):
    return next(folder.glob(f"{name}-mlx/**/config.json")).parent


def loads(path):
    try:
        load_model(path)
    except (TypeError, ValueError) as error:
        return f"does not load: {'num_experts' if 'num_experts' in str(error) else 'tensors'}"
    return "loads"


print("dense", loads(export("dense")))
experts = export("experts")
config = json.loads((experts / "config.json").read_text())
print("experts", "num_experts" in config, config.get("num_local_experts"), loads(experts))
config["num_experts"] = 4
(experts / "config.json").write_text(json.dumps(config))
print("with num_experts", loads(experts))

weights, stacks = {}, {}
for name, array in mx.load(str(experts / "model.safetensors")).items():
    match = re.fullmatch(r"(.*\.mlp)\.experts\.(\d)\.(.*)", name)
    if match:
        stacks.setdefault(f"{match[1]}.switch_mlp.{match[3]}", []).append((match[2], array))
    else:
        weights[name] = array
weights |= {name: mx.stack([array for _, array in sorted(parts, key=lambda p: p[0])]) for name, parts in stacks.items()}
mx.save_safetensors(str(experts / "model.safetensors"), weights)
block = {re.sub(r"experts\.\d", "switch_mlp", path): entry for path, entry in config["quantization"].items()}
config["quantization"] = config["quantization_config"] = block
(experts / "config.json").write_text(json.dumps(config))
print("stacked", loads(experts))
PY
"$folder/venv/bin/python" "$folder/export.py" "$folder" > "$folder/log" 2>&1 || { tail -n 5 "$folder/log"; exit 1; }
"$folder/venv/bin/python" "$folder/look.py" "$folder" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
dense loads
experts False 4 does not load: num_experts
with num_experts does not load: tensors
stacked loads
SEEN
