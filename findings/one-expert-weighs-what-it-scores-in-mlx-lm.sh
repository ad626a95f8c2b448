#!/usr/bin/env bash
# What: with `norm_topk_prob` the weights of the chosen experts are divided by their sum. Where a config
#   chooses one expert for each token, the routers of DeepSeek-V3 and its relatives in mlx-lm skip that
#   and leave the weight at its score; transformers divides, which makes it 1.
# Guess before running: both divide whenever the config says so.
# Seen (mlx-lm 0.32.2, mlx 0.32.4, transformers 5.24.0, torch 2.13.0; 2026-11-30), which this script
#   checks: deepseek_v3, dots1 and glm4_moe differ with one expert and agree with two; qwen3_moe, whose
#   router is another, agrees with both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cat > "$folder/look.py" <<'PY'
import importlib

import mlx.core as mx
import numpy as np
import torch
import transformers

transformers.logging.set_verbosity_error()
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
SHARED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
          "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
          "v_head_dim": 16}
FAMILIES = {
    "deepseek_v3": ("DeepseekV3", SHARED | LATENT),
    "dots1": ("Dots1", SHARED),
    "glm4_moe": ("Glm4Moe", SHARED | {"partial_rotary_factor": 0.5, "use_qk_norm": False}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": []}),
}
tokens = np.arange(24)[None] * 7 % 96


def difference(family, experts):
    """Of mlx-lm's logits from transformers', in deviations."""
    name, more = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SIZES, **more, num_experts_per_tok=experts)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn_like(weight) * 0.3)
        expected = theirs(torch.from_numpy(tokens), use_cache=False).logits[0].numpy()
    table = config.to_dict()
    rope = table["rope_parameters"]
    table |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "attention_bias": False}
    table["partial_rotary_factor"] = rope.get("partial_rotary_factor", 1.0)
    table.setdefault("num_experts", 4)  # transformers 5 calls it num_local_experts
    module = importlib.import_module(f"mlx_lm.models.{family}")
    ours = module.Model(module.ModelArgs.from_dict({**table, "model_type": family}))
    weights = {}
    for key, value in theirs.state_dict().items():
        array = mx.array(value.numpy())
        if key.endswith("experts.gate_up_proj"):  # as checkpoints store them
            for expert in range(array.shape[0]):
                for half, part in zip(("gate_proj", "up_proj"), mx.split(array[expert], 2)):
                    place = key.replace("gate_up_proj", f"{expert}.{half}.weight")
                    weights[place] = part
        elif key.endswith("experts.down_proj"):
            for expert in range(array.shape[0]):
                weights[key.replace("down_proj", f"{expert}.down_proj.weight")] = array[expert]
        else:
            weights[key] = array
    ours.load_weights(list(ours.sanitize(weights).items()))
    return np.abs(np.array(ours(mx.array(tokens))[0]) - expected).max() / expected.std()


for family in FAMILIES:
    for experts in (1, 2):
        off = difference(family, experts)
        verdict = "differs" if off > 0.1 else "same" if off < 1e-3 else f"? {off}"
        print(f"{family}, {experts} of 4 experts: {verdict}")
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | tee "$folder/seen" || cat "$folder/warnings"
diff "$folder/seen" - <<'SEEN'
deepseek_v3, 1 of 4 experts: differs
deepseek_v3, 2 of 4 experts: same
dots1, 1 of 4 experts: differs
dots1, 2 of 4 experts: same
glm4_moe, 1 of 4 experts: differs
glm4_moe, 2 of 4 experts: same
qwen3_moe, 1 of 4 experts: same
qwen3_moe, 2 of 4 experts: same
SEEN
