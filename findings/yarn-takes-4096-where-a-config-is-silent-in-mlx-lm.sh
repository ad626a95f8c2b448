#!/usr/bin/env bash
# What: a config may give YaRN a factor alone: transformers takes the model's `max_position_embeddings`
#   for the context that the factor stretches. mlx-lm's YarnRoPE has a default of its own, 4096, and
#   `initialize_rope` hands it no other, though it is called with the model's context.
# Guess: none was written down before; one would expect `max_position_embeddings`, which it is given.
# Seen (mlx-lm 0.32.2, transformers 5.24.0; 2026-11-30), which this script checks: of a Llama with a
#   context of 32768, theta 1e6 and a factor of 4, the periods of positions differ by up to 2.3 times,
#   and are equal once the config says 32768. Nothing is said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2' 'transformers==5.24.0'
cat > "$folder/look.py" <<'PY'
import math

import mlx.core as mx
import numpy as np
from mlx_lm.models.rope_utils import initialize_rope
from transformers import LlamaConfig

CONTEXT, THETA, FACTOR, SIZE = 32_768, 1e6, 4.0, 64
mx.set_default_device(mx.cpu)
stated = {"rope_type": "yarn", "factor": FACTOR}
config = LlamaConfig(
    max_position_embeddings=CONTEXT, rope_theta=THETA, rope_scaling=dict(stated), head_dim=SIZE
)
original = config.rope_parameters["original_max_position_embeddings"]
print("transformers stretches", original)


def formula(context):
    """YaRN's periods, as its paper and transformers have them."""

    def dimension(turns):
        return SIZE * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = math.floor(dimension(32)), math.ceil(dimension(1))
    ramp = np.clip((np.arange(SIZE // 2) - low) / (high - low), 0, 1)
    period = THETA ** (np.arange(0, SIZE, 2) / SIZE)
    return 1 / (ramp / (FACTOR * period) + (1 - ramp) / period)


for table in (stated, stated | {"original_max_position_embeddings": CONTEXT}):
    ours = np.array(initialize_rope(SIZE, THETA, False, table, CONTEXT)._freqs)
    for context in (CONTEXT, 4096):
        ratio = np.maximum(ours / formula(context), formula(context) / ours).max()
        print(f"mlx-lm of {sorted(table)}: at most {ratio:.2f} times the periods for {context}")
PY
"$folder/venv/bin/python" "$folder/look.py" 2> /dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
transformers stretches 32768
mlx-lm of ['factor', 'rope_type']: at most 2.33 times the periods for 32768
mlx-lm of ['factor', 'rope_type']: at most 1.00 times the periods for 4096
mlx-lm of ['factor', 'original_max_position_embeddings', 'rope_type']: at most 1.00 times the periods for 32768
mlx-lm of ['factor', 'original_max_position_embeddings', 'rope_type']: at most 2.33 times the periods for 4096
SEEN
