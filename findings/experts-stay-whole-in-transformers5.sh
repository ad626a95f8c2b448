#!/usr/bin/env bash
# What: since transformers 5 keeps all experts of a layer in one parameter, its quantizers that look
#   for linear layers pass them by. Asked for 8 or 4 bits, torchao, quanto and bitsandbytes quantize
#   the attention of a Qwen3-MoE, and nearly all of the model stays in bfloat16. They raise
#   no error.
# Guess before running: of the experts none; only that a model which is saved reloads the same, which
#   held for torchao.
# Seen (transformers 5.24.0, torch 2.13.0, torchao 0.18.0, optimum-quanto 0.2.7, bitsandbytes
#   0.50.2; 2026-11-30), which this script checks: of a dense Qwen3's layers nothing stays,
#   of a small Qwen3-MoE's 92 %.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0 torchao==0.18.0 optimum-quanto==0.2.7 bitsandbytes==0.50.2
cat > "$folder/look.py" <<'PY'
import sys

import torch
import transformers
from torchao.quantization import Int8WeightOnlyConfig

SIZES = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
QUANTIZERS = {
    "torchao": lambda: transformers.TorchAoConfig(Int8WeightOnlyConfig()),
    "quanto": lambda: transformers.QuantoConfig(weights="int8"),
    "bitsandbytes": lambda: transformers.BitsAndBytesConfig(load_in_4bit=True),
}
torch.manual_seed(0)
for kind, config in (
    ("dense", transformers.Qwen3Config(**SIZES)),
    ("experts", transformers.Qwen3MoeConfig(**SIZES, **EXPERTS)),
):
    source = f"{sys.argv[1]}/{kind}"
    whole = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    whole.save_pretrained(source)
    matrices = sum(p.numel() for name, p in whole.model.layers.named_parameters() if p.dim() > 1)

    for name, quantizer in QUANTIZERS.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.bfloat16, device_map="cpu", quantization_config=quantizer()
        )
        same = sum(
            p.numel() for p in model.model.layers.parameters()
            if p.dim() > 1 and type(p.data) is torch.Tensor and p.dtype == torch.bfloat16
        )
        print(f"{kind}, {name}: {same / matrices:.0%} of the layers' weights in bfloat16")
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/log" | tee "$folder/seen" || { tail -n 5 "$folder/log"; exit 1; }
diff "$folder/seen" - <<'SEEN'
dense, torchao: 0% of the layers' weights in bfloat16
dense, quanto: 0% of the layers' weights in bfloat16
dense, bitsandbytes: 0% of the layers' weights in bfloat16
experts, torchao: 92% of the layers' weights in bfloat16
experts, quanto: 92% of the layers' weights in bfloat16
experts, bitsandbytes: 92% of the layers' weights in bfloat16
SEEN
