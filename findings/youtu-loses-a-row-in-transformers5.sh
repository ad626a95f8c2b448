#!/usr/bin/env bash
# What: `from_pretrained` of transformers' Youtu class puts zeros into the stored embedding of the
#   padding token. Where head and embedding are one, its logit is 0 then. `_init_weights` initializes
#   a slice of the loaded weight, which is not marked as loaded. Of 157 other causal models that a
#   small config builds, none changes any parameter on loading.
# Guess before running: none of them changes.
# Seen (transformers 5.24.0, torch 2.13.0; 2026-12-01), which this script checks for Youtu, Llama and
#   DeepSeek-V3: of Youtu the row of `pad_token_id`, and no other, is 0 after loading.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
cat > "$folder/look.py" <<'PY'
import sys

import torch
import transformers

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "pad_token_id": 3, "tie_word_embeddings": True,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
for name, more in (("Llama", {}), ("DeepseekV3", LATENT | EXPERTS), ("Youtu", LATENT)):
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES, **more))
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    stored = model.get_input_embeddings().weight.detach().clone()
    model.save_pretrained(f"{sys.argv[1]}/{name}")
    loaded = type(model).from_pretrained(f"{sys.argv[1]}/{name}").get_input_embeddings().weight.detach()
    changed = (loaded != stored).any(dim=1).nonzero().flatten().tolist()
    print(name, "rows that changed:", changed, "all zeros:", [not loaded[row].any() for row in changed])
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/errors" > "$folder/seen" || { tail -n 5 "$folder/errors"; exit 1; }
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
Llama rows that changed: [] all zeros: []
DeepseekV3 rows that changed: [] all zeros: []
Youtu rows that changed: [3] all zeros: [True]
SEEN
