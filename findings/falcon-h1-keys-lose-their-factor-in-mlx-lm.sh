#!/usr/bin/env bash
# What: Falcon-H1 multiplies the keys of its attention by `key_multiplier` and the input of attention
#   by `attention_in_multiplier` (released configs have .39 for the first). mlx-lm folds such factors
#   into the weights when it converts a model, but looks for keys under a name that no checkpoint has,
#   and folds the second into queries and keys without values: it generates with another model.
# Guess before running: all nine factors are folded; only the order of rounding differs.
# Seen (mlx-lm 0.32.2, mlx 0.32.4, transformers 5.24.0, torch 2.13.0; 2026-11-30), which this script
#   checks: with both other than 1 the logits are off by more than one deviation, each alone as well;
#   the other seven make no difference.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cat > "$folder/look.py" <<'PY'
import mlx.core as mx
import numpy as np
import torch
import transformers
from mlx_lm.models import falcon_h1

transformers.logging.set_verbosity_error()
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "mamba_d_ssm": 64,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16,
    "mamba_expand": 1, "mamba_rms_norm": False, "tie_word_embeddings": False,
    "max_position_embeddings": 128,
}
FACTORS = {
    "attention_in_multiplier": 0.5, "attention_out_multiplier": 0.9375,
    "embedding_multiplier": 5.66, "key_multiplier": 0.390625, "lm_head_multiplier": 0.039,
    "mlp_multipliers": [0.88, 0.58], "ssm_in_multiplier": 1.25,
    "ssm_multipliers": [0.35, 0.25, 0.35, 0.5, 0.31], "ssm_out_multiplier": 0.23,
}
NONE = {key: [1.0] * len(v) if isinstance(v, list) else 1.0 for key, v in FACTORS.items()}
tokens = np.arange(24)[None] * 7 % 96


def difference(factors):
    """Of mlx-lm's logits from transformers', in deviations."""
    torch.manual_seed(0)
    config = transformers.FalconH1Config(**SIZES, **factors)
    theirs = transformers.FalconH1ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if weight.ndim > 1:
                sharp = 6 if "q_proj" in name or "k_proj" in name else 1
                weight.copy_(torch.randn_like(weight) * 0.1 * sharp)
        expected = theirs(torch.from_numpy(tokens)).logits[0].numpy()
    table = config.to_dict()
    table["rope_theta"] = table["rope_parameters"]["rope_theta"]
    ours = falcon_h1.Model(falcon_h1.ModelArgs.from_dict(table))
    weights = {name: mx.array(value.numpy()) for name, value in theirs.state_dict().items()}
    ours.load_weights(list(ours.sanitize(weights).items()))
    return np.abs(np.array(ours(mx.array(tokens))[0]) - expected).max() / expected.std()


cases = {"none": {}, **{key: {key: value} for key, value in FACTORS.items()}}
for name, changed in cases.items():
    off = difference({**NONE, **changed})
    print(name, "differs" if off > 1 else "same" if off < 1e-3 else f"? {off}")
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
none same
attention_in_multiplier differs
attention_out_multiplier same
embedding_multiplier same
key_multiplier differs
lm_head_multiplier same
mlp_multipliers same
ssm_in_multiplier same
ssm_multipliers same
ssm_out_multiplier same
SEEN
