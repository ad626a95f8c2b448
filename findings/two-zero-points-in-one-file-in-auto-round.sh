#!/usr/bin/env bash
# What: without iterations AutoRound quantizes a checkpoint without loading the model ("model-free").
#   Where single layers are asymmetric in a symmetric scheme, config.json says of the whole file that
#   zero points are stored less one (`packing_format: auto_round:auto_gptq`), which is so of the
#   symmetric layers; the asymmetric ones hold them as they are. The ordinary route writes the same
#   words and zero points less one throughout: only `model_free` tells the files apart.
# Expected (the guess, written before it was run): one convention for one packing format.
# Seen (auto-round 0.16.1, transformers 5.24.0, torch 2.13.0; 2026-12-01), which this script checks:
#   an asymmetric layer in 4 bits has 8 % of error with its zero points as they are, and 29 % read as
#   config.json says; by the ordinary route it is the other way round.
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
LAYER, GROUP, BITS = "model.layers.0.mlp.up_proj", 32, 4


def write_source(folder):
    """A tiny Llama with its tokenizer; returns the layer's weight."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIG).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokens = Tokenizer(models.WordLevel({str(i): i for i in range(96)}, unk_token="0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(folder)
    return model.get_submodule(LAYER).weight.detach().float().numpy()


def export(source, target, model_free):
    """The layer's tensors, and what config.json says."""
    more = {} if model_free else {"disable_model_free": True}
    rounded = AutoRound(
        str(source), bits=BITS, group_size=GROUP, sym=True, iters=0, disable_opt_rtn=True, nsamples=2,
        seqlen=32, dataset=TEXTS, device_map="cpu", layer_config={LAYER: {"sym": False}}, **more,
    )
    rounded.quantize_and_save(str(target), format="auto_round")
    file = next(target.glob("**/model*.safetensors"))
    config = json.loads((file.parent / "config.json").read_text())["quantization_config"]
    with safe_open(file, "pt") as tensors:
        return [tensors.get_tensor(f"{LAYER}.{n}") for n in ("qweight", "qzeros", "scales")], config


def fields(words, axis):
    """Numbers of four bits from words of 32, along an axis."""
    words = np.moveaxis(words.numpy().view(np.uint32), axis, -1)
    single = words[..., None] >> np.arange(0, 32, BITS, dtype=np.uint32) & (2**BITS - 1)
    return np.moveaxis(single.reshape(*words.shape[:-1], -1).astype(int), -1, axis)


def main(folder):
    exact = write_source(folder / "source")
    for model_free in (True, False):
        (codes, zeros, scales), config = export(folder / "source", folder / str(model_free), model_free)
        print("seen:", config["packing_format"], "model_free" if config.get("model_free") else "ordinary")
        codes, zeros, scales = fields(codes, 0), fields(zeros, 1), scales.float().numpy()
        for what, zero in (("as they are", zeros), ("less one", (zeros + 1) % 2**BITS)):
            weight = ((codes - np.repeat(zero, GROUP, 0)) * np.repeat(scales, GROUP, 0)).T
            print(f"seen: zero points {what}: {np.linalg.norm(weight - exact) / np.linalg.norm(exact):.2f}")


if __name__ == "__main__":  # AutoRound starts processes of its own
    main(pathlib.Path(sys.argv[1]))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/errors" > "$folder/printed" || { tail -n 5 "$folder/errors"; exit 1; }
grep "^seen:" "$folder/printed" > "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
seen: auto_round:auto_gptq model_free
seen: zero points as they are: 0.08
seen: zero points less one: 0.29
seen: auto_round:auto_gptq ordinary
seen: zero points as they are: 0.29
seen: zero points less one: 0.08
SEEN
