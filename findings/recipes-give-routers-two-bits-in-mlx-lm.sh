#!/usr/bin/env bash
# What: mlx-lm's classes of mixture-of-experts models ask for 8 bits for the router. A recipe of its
#   `convert` (`--quant-predicate mixed_2_6` and its like) takes the place of that wish instead of
#   adding to it, and the router gets the low bits. So does a tied head: the recipe knows the head as
#   `lm_head`, which a model with tied embeddings hasn't. Nothing is said.
# Guess before running: a tied head gets the high bits, as a head does. (Of routers none: the code was
#   read first.)
# Seen (mlx-lm 0.32.2, mlx 0.32.4; 2026-11-30), which this script checks with the two functions that
#   `convert` calls: `mixed_2_6` gives 2 bits to each router and to a tied head.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cat > "$folder/look.py" <<'PY'
import contextlib
import io

import mlx.core as mx
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.models import qwen3_moe
from mlx_lm.utils import quantize_model

mx.set_default_device(mx.cpu)
SIZES = {
    "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 8,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 64, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "norm_topk_prob": True,
}
for tied in (False, True):
    for recipe in (None, "mixed_2_6", "mixed_3_4", "mixed_4_6"):
        arguments = qwen3_moe.ModelArgs.from_dict({**SIZES, "tie_word_embeddings": tied})
        model = qwen3_moe.Model(arguments)
        predicate = mixed_quant_predicate_builder(recipe, model, 64) if recipe else None
        with contextlib.redirect_stdout(io.StringIO()):
            quantize_model(model, {}, 64, 2, quant_predicate=predicate)
        routers = {layer.mlp.gate.bits for layer in model.layers}
        head = model.model.embed_tokens if tied else model.lm_head
        print(f"{recipe}: routers {routers} bits, {'tied ' if tied else ''}head {head.bits}")
PY
"$folder/venv/bin/python" "$folder/look.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
None: routers {8} bits, head 2
mixed_2_6: routers {2} bits, head 6
mixed_3_4: routers {3} bits, head 4
mixed_4_6: routers {4} bits, head 6
None: routers {8} bits, tied head 2
mixed_2_6: routers {2} bits, tied head 2
mixed_3_4: routers {3} bits, tied head 3
mixed_4_6: routers {4} bits, tied head 4
SEEN
