#!/usr/bin/env bash
# What: checkpoints of the format `gptq` hold zero points less one, packed eight 4-bit fields in a word, and readers add
#   one to each field. GPTQModel takes the ones from whole words: where a zero point is 0 (a group without negative
#   weights, `sym=False`) its field becomes 15 and borrows one from the next row's. It adds them to whole words again, and
#   reads its own files rightly; by fields every row that follows such a row has a zero point one too low.
# Guess before running: the word wraps within each field, as with AutoGPTQ.
# Seen (gptqmodel 7.7.0, torch 2.13.0, 4 bits in groups of 64; 2026-12-01), which this script checks: of a layer whose row
#   2 of each five has no negative weight in its first group, the rows after those, and no others, differ from what
#   GPTQModel itself reads when each field is taken by itself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 setuptools wheel numpy
"$folder/venv/bin/pip" install --quiet --no-build-isolation gptqmodel==7.7.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
cat > "$folder/look.py" <<'PY'
import os
import sys

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its loader wants two
import torch
import transformers
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

source, out = f"{sys.argv[1]}/source", f"{sys.argv[1]}/gptq"
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=False,
)
model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
with torch.no_grad():
    weight = model.model.layers[0].mlp.up_proj.weight
    weight[2::5, :64] = weight[2::5, :64].abs()
model.save_pretrained(source)
tokens = Tokenizer(models.WordLevel({str(i): i for i in range(128)}, unk_token="0"))
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="0", eos_token="1")
tokenizer.save_pretrained(source)

settings = QuantizeConfig(bits=4, group_size=64, sym=False)
model = GPTQModel.load(source, settings, device="cpu")
model.quantize([{"input_ids": list(range(64)), "attention_mask": [1] * 64}] * 4, batch_size=1)
model.save(out)

# As GPTQModel reads it, and with one added to each field.
layer = GPTQModel.load(out, backend=BACKEND.TORCH, device="cpu").model.model.layers[0].mlp.up_proj
exact = layer.dequantize_weight().float()
exact = exact.T if exact.shape[0] == 128 else exact
stored = {k.rpartition(".")[2]: v for k, v in load_file(f"{out}/model.safetensors").items() if ".up_proj." in k}
shifts = torch.arange(0, 32, 4)
codes = (stored["qweight"][:, None] >> shifts[:, None] & 15).reshape(128, 256)
zeros = (stored["qzeros"][..., None] >> shifts & 15).reshape(2, 256) + 1 & 15
group = stored["g_idx"].long()
weight = ((codes - zeros[group]) * stored["scales"].float()[group]).T
differ = ((weight - exact).abs().amax(1) > 0.2 * stored["scales"].float().amax(0)).nonzero().flatten().tolist()
zero = (zeros[0] == 0).nonzero().flatten()
print("format:", model.quantize_config.format.value)
print("rows with a zero point of 0:", zero.tolist() == list(range(2, 256, 5)))
print("rows that differ follow them within a word:", differ == [row + 1 for row in zero.tolist() if row % 8 < 7], len(differ))
PY
cd "$folder"  # it writes a log there
"$folder/venv/bin/python" "$folder/look.py" "$folder" > "$folder/log" 2> "$folder/errors" || { tail -n 5 "$folder/log" "$folder/errors"; exit 1; }
grep -E "^(format|rows)" "$folder/log" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
format: gptq
rows with a zero point of 0: True
rows that differ follow them within a word: True 44
SEEN
