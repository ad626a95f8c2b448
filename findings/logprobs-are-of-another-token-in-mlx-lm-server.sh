#!/bin/sh
# What: asked for `top_logprobs`, mlx_lm.server fills the entry of each generated token, `content[i]`
#   with its id, token and logprob, with the first one of the list of top tokens. That list comes from
#   an argpartition: it holds the most likely tokens in no order, and need not hold the generated one.
#   Without `top_logprobs` the same request gets the generated tokens and their own values.
# Guess before running: `content[i]` is the generated token, as in OpenAI's format, and the list falls.
# Seen (mlx-lm 0.32.2, mlx 0.32.4, CPU; 2026-12-01), which this script checks: of 64 tokens that are
#   sampled at temperature 1 with a seed, and of as many greedy ones, the text is the same with
#   `top_logprobs` and without, but fewer than a third of the entries are the generated token (1 of 64
#   and none), and the sum of their logprobs is another: -170 in place of -188, and -200 in place of
#   -50, where the most likely token is the generated one and is in the list, but never first.
# Why it matters: whoever measures a quantized model through the server by the usual client code reads
#   the values of tokens that were not generated.
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
    body = {"prompt": "Once upon a time", "max_tokens": 64, "logprobs": True, "seed": 5} | more
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
    changed = []
    for temperature in (1.0, 0.0):
        plain = ask(temperature=temperature)
        listed = ask(temperature=temperature, top_logprobs=5)
        if plain["text"] != listed["text"]:
            sys.exit("changed: the same seed gives another text")
        plain, listed = plain["logprobs"]["content"], listed["logprobs"]["content"]
        same = sum(a["id"] == b["id"] for a, b in zip(plain, listed))
        missing = sum(a["id"] not in [t["id"] for t in b["top_logprobs"]] for a, b in zip(plain, listed))
        values = [[t["logprob"] for t in entry["top_logprobs"]] for entry in listed]
        falling = sum(row == sorted(row, reverse=True) for row in values)
        sums = [sum(entry["logprob"] for entry in content) for content in (plain, listed)]
        print(
            f"temperature {temperature}: {same} of {len(plain)} entries are the generated token, in "
            f"{missing} the list lacks it, {falling} lists fall; logprobs add up to {sums[0]:.1f}, "
            f"as listed to {sums[1]:.1f}"
        )
        if not (same < len(plain) / 3 and falling < len(plain) / 3 and abs(sums[0] - sums[1]) > 10):
            changed.append(temperature)
    if changed:
        sys.exit(f"changed: at temperature {changed} entries are now more often the generated token")
finally:
    server.terminate()
    server.wait()
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder"
