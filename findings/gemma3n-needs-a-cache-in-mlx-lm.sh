#!/usr/bin/env bash
# What: Gemma 3n's last layers attend to keys and values of earlier layers. mlx-lm 0.32.2 hands these
#   on through the prompt cache alone: called without one, as whoever scores a text does
#   (model(tokens)), the class returns logits of another model, and nothing is said. Generating
#   always makes a cache, so that it looks fine there.
# Guess before running: gemma4_text, which shares keys and values as well, is wrong too.
# Seen (mlx-lm 0.32.2, mlx 0.32.4; 2026-11-29), which this script checks: gemma3n differs by more
#   than one standard deviation of the logits; gemma4_text, llama and gemma2 don't differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cat > "$folder/look.py" <<'PY'
import importlib

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

BASE = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-6, "intermediate_size": 48,
    "max_position_embeddings": 128, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 64, "num_kv_shared_layers": 2, "tie_word_embeddings": True,
    "rope_theta": 10000.0, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8,
}
GEMMA_3N = {
    "activation_sparsity_pattern": [0.0] * 4, "altup_active_idx": 0, "altup_coef_clip": 120.0,
    "altup_correct_scale": True, "altup_num_inputs": 2, "final_logit_softcapping": 30.0,
    "laurel_rank": 8, "rope_local_base_freq": 10000.0, "intermediate_size": [48] * 4,
}
GEMMA_4 = {"global_head_dim": 16, "num_global_key_value_heads": 1}


def build(family, extra):
    module = importlib.import_module(f"mlx_lm.models.{family}")
    config = {**BASE, **extra, "model_type": family}
    if family == "gemma3n":
        config = {"model_type": family, "text_config": config}
    mx.random.seed(0)
    return module.Model(module.ModelArgs.from_dict(config))


for family, extra in (("gemma3n", GEMMA_3N), ("gemma4_text", GEMMA_4), ("llama", {}),
                      ("gemma2", {"query_pre_attn_scalar": 16})):
    model, tokens = build(family, extra), mx.arange(20)[None]
    cached = model(tokens, cache=make_prompt_cache(model))
    difference = mx.abs(model(tokens) - cached).max() / mx.sqrt(mx.var(cached))
    print(family, "differs" if difference.item() > 1 else "same" if difference.item() < 1e-3 else "?")
PY
"$folder/venv/bin/python" "$folder/look.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
gemma3n differs
gemma4_text same
llama same
gemma2 same
SEEN
