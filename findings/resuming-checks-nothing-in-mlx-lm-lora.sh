#!/bin/sh
# What: `mlx_lm.lora --resume-adapter-file` takes from the file what fits by name, and looks at nothing else.
#   Where no name fits (an adapter of PEFT, one from another wrapper of the model), the run starts anew, as if
#   nothing had been asked for. Where the rank is another, the old rank's tensors go into the new layers and train on;
#   adapter_config.json states the new rank, and mlx-lm itself refuses what it has saved. `load_adapters`,
#   as used for generating and fusing, has checked both since mlx-lm #1725.
# Guess before running: an error in both cases.
# Seen (mlx-lm 0.32.2, mlx 0.32.4; 2026-12-01), which this script checks with a small Llama and 2 steps.
# Why it matters: hours of training are lost, or what was to be built on isn't there.
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
from mlx_lm import lora
from mlx_lm.models import llama
from mlx_lm.utils import load, save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

mx.set_default_device(mx.cpu)
print("SEEN", *(f"{name} {importlib.metadata.version(name)}" for name in ("mlx-lm", "mlx")))
folder = pathlib.Path(sys.argv[1])
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 258,
    "tie_word_embeddings": True, "max_position_embeddings": 2048,
}
characters = sorted(pre_tokenizers.ByteLevel.alphabet())
bpe = Tokenizer(models.BPE({"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(characters)}, []))
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(folder / "model")
mx.random.seed(0)
save_model(folder / "model", llama.Model(llama.ModelArgs(**CONFIG)))
save_config(dict(CONFIG), folder / "model/config.json")
(folder / "data").mkdir()
for name in ("train", "valid"):
    lines = [json.dumps({"text": f"the cat and the dog number {i}"}) for i in range(8)]
    (folder / "data" / f"{name}.jsonl").write_text("\n".join(lines))


def train(name, rank, rate, resume=None):
    """The adapter's tensors after 2 steps."""
    settings = folder / f"{name}.yaml"
    settings.write_text(json.dumps({"lora_parameters": {"rank": rank, "scale": 20.0, "dropout": 0.0}}))
    sys.argv = ["mlx_lm.lora", "--model", folder / "model", "--train", "--data", folder / "data", "--iters", 2,
                "--num-layers", 2, "--learning-rate", rate, "--adapter-path", folder / name, "-c", settings,
                *(["--resume-adapter-file", resume] if resume else [])]
    sys.argv = [str(a) for a in sys.argv]
    lora.main()
    return mx.load(str(folder / name / "adapters.safetensors"))


def far(adapter):
    return sum(mx.abs(w).sum().item() for k, w in adapter.items() if k.endswith("lora_b"))


first = train("first", 8, 1e-2)
again = train("again", 8, 0, folder / "first/adapters.safetensors")
if far(first) == 0 or abs(far(again) - far(first)) > 1e-3:
    sys.exit("changed: resuming with the same rank doesn't begin where the adapter was")
print("SEEN the same rank and names: resumed with what was learned")
mx.save_safetensors(str(folder / "peft.safetensors"), {f"base_model.model.{k}": w for k, w in first.items()})
other = train("other", 8, 0, folder / "peft.safetensors")
print(f"SEEN other names: {'nothing' if far(other) == 0 else 'something'} of it is there, no error")
ranked = train("ranked", 4, 1e-2, folder / "first/adapters.safetensors")
stated = json.loads((folder / "ranked/adapter_config.json").read_text())["lora_parameters"]["rank"]
ranks = {w.shape[-1] for k, w in ranked.items() if k.endswith("lora_a")}
print(f"SEEN rank 4 from an adapter of rank 8: trains {ranks}, states {stated}, no error")
try:
    load(str(folder / "model"), adapter_path=str(folder / "ranked"))
    sys.exit("changed: the adapter loads")
except ValueError as error:
    print("SEEN mlx-lm then says:", str(error).splitlines()[1].strip())
if far(other) or ranks != {8} or stated != 4:
    sys.exit("changed: resuming looks at names or ranks")
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" > "$folder/log" 2>&1 || { tail -n 5 "$folder/log"; exit 1; }
grep "^SEEN" "$folder/log" | cut -c 6-
