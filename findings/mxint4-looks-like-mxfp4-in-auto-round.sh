#!/usr/bin/env bash
# What: AutoRound writes MXINT4 in the very tensors of MXFP4: `weight_packed` of two codes a byte and
#   a power of two for each 32 weights in `weight_scale`, of the same names, types and shapes. Words
#   in config.json alone tell them apart. Nor are its integers two's complement: a code is a sign and
#   a number of quarters, so that there are two zeros and nothing below -1.75.
# Expected: two's complement, and a name or a type of tensor of their own.
# Seen (auto-round 0.16.1, transformers 5.24.0, torch 2.13.0; 2026-12-01), which this script checks:
#   names, types and shapes of all tensors are equal; config.json differs in `data_type` and
#   `act_data_type` (mx_int, mx_fp) and in `packing_format`; codes 1 to 7 are .25 to 1.75 times the
#   scale, 8 to 15 the same below zero; read as MXFP4 the weights have more error than zeros have.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet auto-round==0.16.1 transformers==5.24.0
cat > "$folder/look.py" <<'PY'
import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from auto_round import AutoRound
from safetensors import safe_open
from tokenizers import Tokenizer, models

CONFIG = transformers.LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
)
TEXTS = [" ".join(map(str, range(i, i + 64))) for i in range(4)]
PATH = "model.layers.0.mlp.up_proj.weight"


def export(folder, scheme, form):
    """Tensors and config of a tiny Llama, the same one each time."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIG).to(torch.bfloat16)
    tokens = Tokenizer(models.WordLevel({str(i): i for i in range(96)}, unk_token="0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens)
    rounded = AutoRound(
        model, tokenizer, scheme=scheme, iters=0, disable_opt_rtn=True, nsamples=2, seqlen=32, dataset=TEXTS,
        device_map="cpu",
    )
    rounded.quantize_and_save(str(folder / f"{scheme}-{form}"), format=form)
    at = next((folder / f"{scheme}-{form}").glob("**/config.json")).parent
    with safe_open(at / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return tensors, json.loads((at / "config.json").read_text())


def outside(tensors):
    return {name: (str(t.dtype), tuple(t.shape)) for name, t in tensors.items()}


def main(folder):
    integers, stated = export(folder, "MXINT4", "auto_round")
    floats, stated_floats = export(folder, "MXFP4", "auto_round")
    values, _ = export(folder, "MXINT4", "fake")
    print("same tensors:", outside(integers) == outside(floats))
    one, other = stated["quantization_config"], stated_floats["quantization_config"]
    print("config differs in", sorted(k for k in one | other if one.get(k) != other.get(k)))

    packed = integers[f"{PATH}_packed"].numpy()
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    scale = np.repeat(2.0 ** (integers[f"{PATH}_scale"].numpy().astype(float) - 127), 32, axis=1)
    exact = values[PATH].float().numpy()
    for code in (1, 7, 8, 9, 15):
        print("code", code, "is", sorted(set((exact / scale)[codes == code].tolist())))
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    as_floats = np.where(codes & 8, -1, 1) * e2m1[codes & 7] * scale
    print("as MXFP4 worse than zeros:", bool(np.square(as_floats - exact).sum() > np.square(exact).sum()))


if __name__ == "__main__":  # AutoRound starts processes that import this file
    main(pathlib.Path(sys.argv[1]))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" > "$folder/log" 2> "$folder/errors" || { tail -n 5 "$folder/errors"; exit 1; }
grep -E "^(same|config|code|as MXFP4) " "$folder/log" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
same tensors: True
config differs in ['act_data_type', 'data_type', 'packing_format']
code 1 is [0.25]
code 7 is [1.75]
code 8 is [-0.0]
code 9 is [-0.25]
code 15 is [-1.75]
as MXFP4 worse than zeros: True
SEEN
