#!/usr/bin/env bash
# What: DeepSeek-V3's kv_b_proj is stored as one matrix; mlx-lm's class keeps two, one of them
#   transposed. Loading a quantized checkpoint with the one matrix, it dequantizes, splits and
#   quantizes again with the same bits, so that a checkpoint that was packed by another tool, or by an
#   mlx-lm before the split, loses about as much once more. Nothing is said.
# Guess before running: only the transposed half changes, as its groups lie the other way; the other
#   half gets back the codes that it had.
# Seen (mlx-lm 0.32.2, mlx 0.32.4; 2026-11-30), which this script checks: at 4 bits the transposed half
#   is off by 8 %, of the 9 % that quantizing cost in the first place, and the other one by 3 %.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cat > "$folder/look.py" <<'PY'
import mlx.core as mx
from mlx_lm.models import deepseek_v3

mx.set_default_device(mx.cpu)
mx.random.seed(0)
HEADS, HALF, RANK, GROUP = 4, 64, 128, 64
arguments = deepseek_v3.ModelArgs(
    vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=32,
    num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=HEADS,
    n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1,
    kv_lora_rank=RANK, q_lora_rank=64, qk_rope_head_dim=32, qk_nope_head_dim=HALF,
    v_head_dim=HALF, max_position_embeddings=64,
)
model = deepseek_v3.Model(arguments)


def error(got, wanted):
    return (mx.linalg.norm(got - wanted) / mx.linalg.norm(wanted)).item()


for bits in (3, 4, 6, 8):
    original = mx.random.normal((HEADS * 2 * HALF, RANK)) * 0.02
    packed = mx.quantize(original, GROUP, bits)
    stored = mx.dequantize(*packed, GROUP, bits)
    place = "model.layers.0.self_attn."
    names = ("weight", "scales", "biases")
    loaded = model.sanitize(
        {f"{place}kv_b_proj.{name}": array for name, array in zip(names, packed)}
    )
    keys, values = (
        mx.dequantize(*(loaded[f"{place}{half}.{name}"] for name in names), GROUP, bits)
        for half in ("embed_q", "unembed_out")
    )
    heads = stored.reshape(HEADS, 2 * HALF, RANK)
    print(
        f"{bits} bits: stored with {error(stored, original):.3f} of error, loaded with another "
        f"{error(keys.swapaxes(-1, -2), heads[:, :HALF]):.3f} (transposed) and "
        f"{error(values, heads[:, HALF:]):.3f}"
    )
PY
"$folder/venv/bin/python" "$folder/look.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
3 bits: stored with 0.191 of error, loaded with another 0.145 (transposed) and 0.037
4 bits: stored with 0.090 of error, loaded with another 0.078 (transposed) and 0.032
6 bits: stored with 0.022 of error, loaded with another 0.021 (transposed) and 0.010
8 bits: stored with 0.005 of error, loaded with another 0.005 (transposed) and 0.002
SEEN
