#!/usr/bin/env bash
# What: FP8 checkpoints of DeepSeek's layout hold `weight_scale_inv`, which in spite of its name is
#   multiplied with the codes. GPTQModel takes the name at its word: its FP8 writes the inverse, a
#   weight is code / weight_scale_inv. Names, shapes, `quant_method: fp8` and `weight_block_size` are
#   those of all others, and a key that only GPTQModel knows, `weight_scale_semantics: inverse`, says
#   otherwise. transformers loads such a checkpoint in silence and multiplies.
# Expected: the same numbers as everyone's.
# Seen (gptqmodel 7.7.0, transformers 5.24.0, torch 2.13.0; 2026-12-01), which this script checks: of
#   a tiny Llama a weight has 2 % of error where codes are divided; as transformers loads it, its
#   error is more than a million times the weight, and no warning is given.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 setuptools wheel numpy
"$folder/venv/bin/pip" install --quiet --no-build-isolation gptqmodel==7.7.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
cat > "$folder/write.py" <<'PY'
import os
import sys

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its loader wants two
import torch
import transformers
from gptqmodel import GPTQModel
from gptqmodel.quantization.config import FP8Config
from tokenizers import Tokenizer, models

source, out = f"{sys.argv[1]}/source", f"{sys.argv[1]}/fp8"
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=False,
)
transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(source)
tokens = Tokenizer(models.WordLevel({str(i): i for i in range(128)}, unk_token="0"))
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="0", eos_token="1")
tokenizer.save_pretrained(source)

fp8 = FP8Config(weight_scale_method="block", weight_block_size=[128, 128])
fp8.offload_to_disk, fp8.pack_impl = False, "original"
model = GPTQModel.load(source, fp8, device="cpu", dtype=torch.bfloat16)
model.quantize([{"input_ids": list(range(64)), "attention_mask": [1] * 64}] * 4, batch_size=1)
model.save(out)
PY
cat > "$folder/look.py" <<'PY'
import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import load_file

folder = pathlib.Path(sys.argv[1])
name = "model.layers.0.mlp.up_proj.weight"
exact = load_file(folder / "source" / "model.safetensors")[name].float()
stored = load_file(folder / "fp8" / "model.safetensors")
codes, scales = stored[name].float(), stored[f"{name}_scale_inv"].float()
wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)


def error(weight):
    return float((weight.detach() - exact).norm() / exact.norm())


table = json.loads((folder / "fp8" / "config.json").read_text())["quantization_config"]
print({key: table[key] for key in ("quant_method", "weight_block_size", "weight_scale_semantics")})
print(sorted(k.removeprefix("model.layers.0.mlp.up_proj.") for k in stored if "up_proj" in k), stored[name].dtype)
print("code / weight_scale_inv:", "close" if error(codes / wide) < 0.05 else "far")
read = transformers.FineGrainedFP8Config(dequantize=True)
model = transformers.AutoModelForCausalLM.from_pretrained(folder / "fp8", quantization_config=read, dtype=torch.float32)
weight = model.model.layers[0].mlp.up_proj.weight.float()
print("as transformers loads it:", "a million times too large" if error(weight) > 1e6 else error(weight))
PY
cd "$folder"  # it writes a log there
"$folder/venv/bin/python" "$folder/write.py" "$folder" > "$folder/log" 2>&1 || { tail -n 5 "$folder/log"; exit 1; }
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/errors" | tee "$folder/seen"
! grep -iE "scale_inv|not used|newly" "$folder/errors"
diff "$folder/seen" - <<'SEEN'
{'quant_method': 'fp8', 'weight_block_size': [128, 128], 'weight_scale_semantics': 'inverse'}
['weight', 'weight_scale_inv'] torch.float8_e4m3fn
code / weight_scale_inv: close
as transformers loads it: a million times too large
SEEN
