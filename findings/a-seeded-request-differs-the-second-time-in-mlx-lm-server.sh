#!/bin/sh
# What: mlx_lm.server keeps the caches of prompts that it has read. A request with a `seed` isn't
#   batched, and on that path repetition, presence and frequency penalties are given the part of the
#   prompt that wasn't in the cache. So the same seeded, greedy request gives another text the second
#   time, when all but the last token of its prompt is cached; without a seed, batched, it doesn't. With
#   --kv-bits or a draft model all requests take that path, and in a chat each turn counts by itself.
# Guess before running: a seed makes a request repeatable, and a cache changes nothing but time.
# Seen (mlx-lm 0.32.2, mlx 0.32.4, CPU; 2026-12-01), which this script checks with a random model over
#   bytes, three penalties and four prompts (that hold all printable characters), each sent three times:
#   with a seed the second text differs from the first in all 12 cases and the third equals the second;
#   without a seed, or with a seed but no penalty, all three are equal.
# Why it matters: two quantizations compared through the server with a fixed seed differ by what was
#   asked before; and nobody looks for a difference where greedy text is repeated with a seed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 transformers==5.24.0 tokenizers==0.23.3
cat > "$folder/look.py" <<'PY'
import importlib.metadata
import json
import pathlib
import socket
import string
import subprocess
import sys
import time
import urllib.error
import urllib.request

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.utils import save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

mx.set_default_device(mx.cpu)
print("mlx-lm", importlib.metadata.version("mlx-lm"), "mlx", mx.__version__)
folder = pathlib.Path(sys.argv[1]) / "model"
characters = sorted(pre_tokenizers.ByteLevel.alphabet())
bpe = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)} | {"</s>": 256}, []))
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>").save_pretrained(folder)
config = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 257,
    "tie_word_embeddings": False, "max_position_embeddings": 512,
}
mx.random.seed(1)
model = llama.Model(llama.ModelArgs(**config))
model.lm_head.weight = model.lm_head.weight * 5
save_model(folder, model)
save_config(config, folder / "config.json")

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
command = [sys.executable, "-c", "import mlx.core as mx; mx.set_default_device(mx.cpu); from mlx_lm.server import main; main()"]
log = (pathlib.Path(sys.argv[1]) / "log").open("w")
server = subprocess.Popen([*command, "--model", str(folder), "--port", str(port)], stdout=log, stderr=log)


def ask(**more):
    body = {"prompt": "Once upon a time", "max_tokens": 64} | more
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=100) as answer:
        return json.load(answer)["choices"][0]


try:
    for _ in range(240):
        try:
            ask(max_tokens=1)
            break
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    PENALTIES = [{}, {"repetition_penalty": 1.5}, {"presence_penalty": 2.0}, {"frequency_penalty": 1.0}]
    seen = {}
    for seed in (None, 5):
        for penalty in PENALTIES:
            name = next(iter(penalty), "no penalty")
            more = {f"{name.removesuffix('_penalty')}_context_size": 300} if penalty else {}
            again, later = 0, 0
            for begin in ("Once upon a time", "In the beginning", "There is a house", "Call me Ishmael"):
                prompt = f"{begin}, said {seed} of {name}: {string.printable[:95]} {begin}"
                texts = [ask(prompt=prompt, temperature=0.0, max_tokens=24, seed=seed, **penalty, **more)["text"] for _ in range(3)]
                again += texts[1] == texts[0]
                later += texts[2] == texts[1]
            seen[seed, name] = again, later
            print(f"{'seed' if seed else 'no seed'}, {name}: the second text is the first in {again} of 4, the third the second in {later} of 4")
    wanted = {key: (0 if key[0] and key[1] != "no penalty" else 4, 4) for key in seen}
    if seen != wanted:
        sys.exit("changed: repeated requests with a seed and a penalty no longer differ just the second time")
finally:
    server.terminate()
    server.wait()
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder"
