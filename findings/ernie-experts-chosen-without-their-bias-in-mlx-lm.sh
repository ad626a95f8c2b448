#!/usr/bin/env bash
# What: ERNIE 4.5's mixtures keep a trained bias for each expert, `e_score_correction_bias`, that takes
#   part in choosing experts. mlx-lm's class deletes it on loading and chooses without: other experts
#   run. All is loaded strictly and nothing is said. Its classes of other families that have such a
#   bias use it.
# Guess before running: every class reads all that takes part in routing; what some ignore is the
#   name of the activation.
# Seen (mlx-lm 0.32.2, mlx 0.32.4, transformers 5.24.0, torch 2.13.0; 2026-11-30), which this script
#   checks: with a bias of 0 mlx-lm has transformers' logits; with a bias of deviation 0.03,
#   where scores are 1/16 on average, 98 % of the tokens get other ones. DeepSeek-V3 and GLM 4.5 stay the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cat > "$folder/look.py" <<'PY'
import json
import pathlib
import sys

import mlx.core as mx
import numpy as np
import torch
import transformers
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
EXPERTS = {"n_routed_experts": 16, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
FAMILIES = {
    "ernie4_5_moe": {"moe_num_experts": 16, "moe_k": 2, "moe_layer_start_index": 1},
    "deepseek_v3": EXPERTS | {
        "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "glm4_moe": EXPERTS,
}
tokens = np.arange(64)[None] * 7 % 96


def compare(family, more, size):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }
    if family != "deepseek_v3":
        sizes["head_dim"] = 16
    config = transformers.AutoConfig.for_model(family, **sizes | more)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    state = model.state_dict()
    biases = [name for name in state if "e_score_correction_bias" in name]
    with torch.no_grad():
        for name, weight in state.items():
            if name in biases:
                weight.copy_(torch.randn_like(weight) * size)
            elif weight.ndim > 1:
                weight.copy_(torch.randn_like(weight) * 0.1)
        wanted = model(torch.from_numpy(tokens)).logits[0].numpy()
    folder = pathlib.Path(sys.argv[1]) / family
    model.save_pretrained(folder)
    table = json.loads((folder / "config.json").read_text())
    names = type(config).attribute_map
    # What mlx-lm reads under another name than transformers 5 writes.
    others = {key: table[name] for key, name in names.items() if name in table}
    table = {"rope_scaling": None, **table["rope_parameters"], **others, **table}
    (folder / "config.json").write_text(json.dumps(table))
    ours, _ = load_model(folder)
    kept = sum("correction_bias" in name for name, _ in tree_flatten(ours.parameters()))
    off = np.abs(np.array(ours(mx.array(tokens))[0]) - wanted).max(axis=-1) / wanted.std()
    print(f"{family}: bias of {size} in {len(biases)} layers, kept in {kept}: {(off > 0.01).mean():.0%} of the tokens differ")


for family, more in FAMILIES.items():
    for size in (0.0, 0.03):
        compare(family, more, size)
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/log" | tee "$folder/seen" || { tail -n 5 "$folder/log"; exit 1; }
diff "$folder/seen" - <<'SEEN'
ernie4_5_moe: bias of 0.0 in 2 layers, kept in 0: 0% of the tokens differ
ernie4_5_moe: bias of 0.03 in 2 layers, kept in 0: 98% of the tokens differ
deepseek_v3: bias of 0.0 in 2 layers, kept in 2: 0% of the tokens differ
deepseek_v3: bias of 0.03 in 2 layers, kept in 2: 0% of the tokens differ
glm4_moe: bias of 0.0 in 2 layers, kept in 2: 0% of the tokens differ
glm4_moe: bias of 0.03 in 2 layers, kept in 2: 0% of the tokens differ
SEEN
