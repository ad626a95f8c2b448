#!/bin/sh
# What: `mlx_lm.fuse` of a DoRA adapter stores the fused layers of a bfloat16 model in float32: the magnitudes
#   that DoRA trains are float32, and so is their product with the weights. The rest stays bfloat16, config.json
#   says nothing, and from the first such layer on the model runs in float32, its KV cache included. Fused into
#   4 bits, the scales and biases become float32, with the same effect. With LoRA the types stay.
# Guess before running (and before reading dora.py): bfloat16, and a file as large as the original.
# Seen (mlx-lm 0.32.2, mlx 0.32.4; 2026-12-01), which this script checks with a small Llama: 1.96 times the
#   file, 1.11 times at 4 bits; logits and the KV cache are float32 (twice the memory), where the model with
#   the adapter beside it, not fused, has bfloat16.
# Why it matters: a fine-tune of a model that just fits doesn't fit, and is slower, and "bf16" isn't what is compared.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 transformers==5.24.0 tokenizers==0.23.3
cat > "$folder/look.py" <<'PY'
import importlib.metadata
import json
import pathlib
import sys

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import fuse, lora
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load, quantize_model, save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

mx.set_default_device(mx.cpu)
print("SEEN", *(f"{name} {importlib.metadata.version(name)}" for name in ("mlx-lm", "mlx")))
folder = pathlib.Path(sys.argv[1])
CONFIG = {
    "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 258,
    "tie_word_embeddings": True, "max_position_embeddings": 2048,
}
characters = sorted(pre_tokenizers.ByteLevel.alphabet())
(folder / "data").mkdir()
for name in ("train", "valid"):
    lines = [json.dumps({"text": f"the cat and the dog number {i}"}) for i in range(8)]
    (folder / "data" / f"{name}.jsonl").write_text("\n".join(lines))


def write(path, bits):
    bpe = Tokenizer(models.BPE({"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(characters)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    mx.random.seed(0)
    model, config = llama.Model(llama.ModelArgs(**CONFIG)), dict(CONFIG)
    model.set_dtype(mx.bfloat16)
    if bits:
        model, config = quantize_model(model, config, 64, bits)
    save_model(path, model)
    save_config(config, path / "config.json")
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(path)


def run(command, *arguments):
    sys.argv = [command.__name__, *map(str, arguments)]
    command.main()


def look(path, adapter=None):
    """Types of logits and of the KV cache."""
    model, _ = load(str(path), adapter_path=adapter and str(adapter))
    cache = make_prompt_cache(model)
    logits = model(mx.array([[5, 6, 7]]), cache=cache)
    return [str(t.dtype).split(".")[-1] for t in (logits, cache[-1].keys)]


wrong = []
for bits in (None, 4):
    base = folder / f"base-{bits}"
    write(base, bits)
    for kind in ("lora", "dora"):
        adapter, fused = folder / f"{kind}-{bits}", folder / f"fused-{kind}-{bits}"
        run(
            lora, "--model", base, "--train", "--data", folder / "data", "--fine-tune-type", kind, "--iters", 2,
            "--batch-size", 4, "--num-layers", 4, "--adapter-path", adapter, "--val-batches", 1,
        )
        run(fuse, "--model", base, "--adapter-path", adapter, "--save-path", fused)
        grown = (fused / "model.safetensors").stat().st_size / (base / "model.safetensors").stat().st_size
        beside, inside = look(base, adapter), look(fused)
        print(f"SEEN {kind}, {f'{bits} bits' if bits else 'bfloat16'}: {grown:.2f} times the file; logits and cache "
              f"{beside} with the adapter beside the model, {inside} fused")
        wrong.append((beside == ["bfloat16"] * 2, inside == ["float32"] * 2, grown > 1.05))
if wrong != [(True, False, False), (True, True, True)] * 2:
    sys.exit("changed: not just fused DoRA runs in float32")
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" > "$folder/log" 2>&1 || { tail -n 5 "$folder/log"; exit 1; }
grep "^SEEN" "$folder/log" | cut -c 6-
