#!/usr/bin/env bash
# What: a model class of mlx-lm 0.32.2 that declares `rope_scaling` need not use it. Models whose
#   long context rests on it (YaRN in Qwen3-MoE's cards, say) run without, and nothing is said.
#   qwen2_moe even checks the table, refuses every type but "linear", and then ignores that too.
# Guess before running: all six classes with routed experts ignore every type; those without experts
#   use it.
# Seen (mlx-lm 0.32.2, mlx 0.32.4; 2026-11-29), which this script checks: tiny models with the same
#   random weights, logits with a rope_scaling of factor 4 against none. deepseek was not guessed: it
#   takes "linear", and runs "yarn" as if there were no scaling.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cat > "$folder/look.py" <<'PY'
import importlib

import mlx.core as mx

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 4096,
    "tie_word_embeddings": False, "num_experts": 2, "num_local_experts": 2,
    "num_experts_per_tok": 1, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "norm_topk_prob": True, "shared_expert_intermediate_size": 32, "n_routed_experts": 2,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1, "attention_bias": False, "use_qk_norm": False,
    "partial_rotary_factor": 1.0, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
}


def logits(family, scaling):
    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(0)
    config = dict(TINY, model_type=family, rope_scaling=scaling)
    return module.Model(module.ModelArgs.from_dict(config))(mx.arange(40)[None])


def effect(family, kind):
    table = {"type": kind, "rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 64}
    try:
        difference = mx.abs(logits(family, table) - logits(family, None)).max().item()
    except ValueError:
        return "refused"
    return "used" if difference else "ignored"


for family in ("qwen3_moe", "mixtral", "glm4_moe", "solar_open", "qwen2_moe", "deepseek",
               "olmoe", "qwen3", "llama"):
    print(family, *(f"{kind}:{effect(family, kind)}" for kind in ("linear", "yarn")))
PY
"$folder/venv/bin/python" "$folder/look.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
qwen3_moe linear:ignored yarn:ignored
mixtral linear:ignored yarn:ignored
glm4_moe linear:ignored yarn:ignored
solar_open linear:ignored yarn:ignored
qwen2_moe linear:ignored yarn:refused
deepseek linear:used yarn:ignored
olmoe linear:used yarn:used
qwen3 linear:used yarn:used
llama linear:used yarn:used
SEEN
