#!/bin/sh
# What: mlx-lm answers several prompts in one batch by padding the shorter ones, and tells each layer
#   where the padding is. Mamba 1, Jamba and the linear Ling/Ring models (`bailing_moe_linear`) don't
#   listen: Mamba's class makes no mask, the other two make one and drop it on the way to the
#   recurrent layers. Their states go on over the padding, and the reply to a prompt is another one
#   beside a longer prompt. Nothing is said. The server (requests that arrive together),
#   `batch_generate` and the tasks of `mlx_lm.evaluate` all work so.
# Guess before running: greedy replies in float32 are the same alone and in a batch, in all families
#   that batch at all; those that don't raise "does not yet support batching".
# Seen (mlx-lm 0.32.2, mlx 0.32.4; 2026-12-01), which this script checks: with prompts of 5, 45 and 17
#   tokens, only the longest gets its own reply in these three. Mamba 2, Falcon-H1, Qwen3-Next and RWKV 7,
#   recurrent as well, are right. Alone, read whole or token by token, all give the same.
# Why it matters: scores of such a model depend on the batch size and on the other questions, and of
#   two quantizations one may differ from the other by padding alone.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cat > "$folder/look.py" <<'PY'
import dataclasses
import importlib
import importlib.metadata
import sys

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

mx.set_default_device(mx.cpu)
print("mlx-lm", importlib.metadata.version("mlx-lm"), "mlx", mx.__version__)
COMMON = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "state_size": 16, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4,
    "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2, "attn_layer_offset": 1,
    "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "norm_topk_prob": True, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0,
    "score_function": "sigmoid", "use_qkv_bias": False, "use_qk_norm": True, "layer_group_size": 2,
    "group_norm_size": 1, "partial_rotary_factor": 0.5, "mlp_only_layers": [], "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2, "attention_bias": False,
}
MORE = {
    "mamba": {}, "jamba": {}, "bailing_moe_linear": {}, "qwen3_next": {},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1, "layer_norm_epsilon": 1e-5, "expand": 2,
               "time_step_limit": [0.001, 100.0], "chunk_size": 16, "ssm_state_size": 16},
    "falcon_h1": {"num_hidden_layers": 2, "mamba_d_ssm": 64, "mamba_d_head": 16, "mamba_n_heads": 4},
    "rwkv7": {"norm_eps": 1e-5, "head_dim": 16, "num_heads": 4, "a_low_rank_dim": 8, "v_low_rank_dim": 8,
              "gate_low_rank_dim": 8, "decay_low_rank_dim": 8},
}
PROMPTS = [5, 45, 17]
right, wrong = [], []
for family, more in MORE.items():
    module = importlib.import_module(f"mlx_lm.models.{family}")
    names = {field.name for field in dataclasses.fields(module.ModelArgs)}
    config = {k: v for k, v in (COMMON | more).items() if k in names} | {"model_type": family}
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(mx.float32)

    def louder(_, layer):  # so that replies vary
        if isinstance(layer, nn.Linear):
            layer.weight = layer.weight * 2
        elif isinstance(layer, nn.Embedding):
            layer.weight = mx.random.normal(layer.weight.shape)

    model.apply_to_modules(louder)
    model.eval()
    tokens = mx.random.randint(1, 96, (80,), key=mx.random.key(3))
    whole = model(tokens[None, :40])[0, -1]
    cache = make_prompt_cache(model)
    for i in range(40):
        last = model(tokens[None, i : i + 1], cache=cache)[0, -1]
    if mx.abs(whole - last).max().item() > 1e-3:
        sys.exit(f"{family}: token by token is not what the whole prompt gives")

    prompts = [tokens[5 * i : 5 * i + n].tolist() for i, n in enumerate(PROMPTS)]
    alone = [[token for token, _ in generate_step(mx.array(p), model, max_tokens=12)] for p in prompts]
    generator = BatchGenerator(model, stop_tokens=None)
    numbers = generator.insert(prompts, [12] * len(prompts))
    batched = {number: [] for number in numbers}
    while responses := generator.next_generated():
        for response in responses:
            batched[response.uid].append(response.token)
    generator.close()
    same = [batched[number] == reply for number, reply in zip(numbers, alone)]
    print(f"{family}: prompts of {PROMPTS} tokens get in a batch the reply that they get alone: {same}")
    (right if all(same) else wrong).append(family)
    if not all(same) and same != [False, True, False]:
        sys.exit(f"{family}: others than the two padded replies differ")
if wrong != ["mamba", "jamba", "bailing_moe_linear"]:
    sys.exit(f"changed: the families whose replies depend on their batch are now {wrong}")
PY
"$folder/venv/bin/python" "$folder/look.py"
