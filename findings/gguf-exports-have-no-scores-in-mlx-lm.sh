#!/bin/sh
# What: `mlx_lm.fuse --export-gguf` writes the types of tokens as unsigned integers, which llama.cpp
#   refuses: none of its files loads. Corrected in place (one number of the file says of which type
#   they are), they load and read text otherwise than the model was trained: each token has the score
#   -1000, while llama.cpp joins pieces in the order of their scores. And byte-level vocabularies
#   (Llama 3) are written as SentencePiece too, without their merges.
# Guess before running: the file loads, and its tokens are those of the Hugging Face tokenizer.
# Seen (mlx-lm 0.32.2, mlx 0.32.4, gguf 0.19.0, xllamacpp 2026.10.11549, which is llama.cpp; 2026-12-01),
#   which this script checks: "invalid gguf type for tokenizer.ggml.token_type"; after the correction,
#   words in several pieces come out in others, and with scores that fall in the order of merges as
#   the tokenizer has them. A byte-level vocabulary says "llama" and has no merges.
# Why it matters: who corrects the first error, as many tools do in silence, gets a model that loads and
#   is worse than it should be, and takes that for a loss of bits.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 transformers==5.24.0 tokenizers==0.23.3 \
  gguf==0.19.0 xllamacpp==2026.10.11549
cat > "$folder/export.py" <<'PY'
import importlib.metadata
import json
import pathlib
import sys

import gguf
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.gguf import convert_to_gguf
from mlx_lm.models import llama
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

mx.set_default_device(mx.cpu)
print(*(f"{name} {importlib.metadata.version(name)}" for name in ("mlx-lm", "mlx", "gguf", "xllamacpp")))
folder = pathlib.Path(sys.argv[1])
LINES = pathlib.Path(json.__file__).read_text().split("\n")


def sentencepiece():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁[^▁]*"), "isolated")
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False))
    table = json.loads(tokenizer.to_str())
    learned = sorted(table["model"]["vocab"], key=table["model"]["vocab"].get)[3:]
    names = special + [f"<0x{i:02X}>" for i in range(256)] + learned
    table["model"]["vocab"] = {name: i for i, name in enumerate(names)}
    table["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(table))


def bytelevel():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


for kind in (sentencepiece, bytelevel):
    tokenizer, path = kind(), folder / kind.__name__
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(path)
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "vocab_size": tokenizer.get_vocab_size(), "tie_word_embeddings": False, "max_position_embeddings": 512,
    }
    model = llama.Model(llama.ModelArgs(**config))
    model.set_dtype(mx.float16)
    convert_to_gguf(path, dict(tree_flatten(model.parameters())), config, str(path / "exported.gguf"))
    fields = gguf.GGUFReader(path / "exported.gguf").fields
    said = fields["tokenizer.ggml.model"].contents()
    scores = set(fields["tokenizer.ggml.scores"].contents())
    print(f"{kind.__name__}: model {said}, scores {scores}, merges {'tokenizer.ggml.merges' in fields}")
    if said != "llama" or scores != {-1000.0} or "tokenizer.ggml.merges" in fields:
        sys.exit("changed: the exported vocabulary has scores or merges of its own")

path = folder / "sentencepiece"
for name in ("corrected", "scored"):
    (path / f"{name}.gguf").write_bytes((path / "exported.gguf").read_bytes())
    reader = gguf.GGUFReader(path / f"{name}.gguf", "r+")
    kind = reader.fields["tokenizer.ggml.token_type"].parts[3]
    if kind[0] != gguf.GGUFValueType.UINT32:
        sys.exit("changed: token types are no longer unsigned")
    kind[0] = gguf.GGUFValueType.INT32
    if name == "scored":  # pieces in the order of their merges, which is that of their numbers
        field = reader.fields["tokenizer.ggml.scores"]
        for number, part in enumerate(field.data):
            field.parts[part][0] = -float(number)
    reader.data.flush()
PY
cat > "$folder/read.py" <<'PY'
import json
import sys
import urllib.request

import xllamacpp
from transformers import AutoTokenizer

folder, name = sys.argv[1:]
TEXTS = ["class Error(Exception):", "hello world", "whatever is written here", "the value of a string"]
params = xllamacpp.CommonParams()
params.model.path = f"{folder}/sentencepiece/{name}.gguf"
params.n_ctx, params.warmup, params.port = 256, False, 0
server = xllamacpp.Server(params)
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/sentencepiece")
same = 0
for text in TEXTS:
    body = json.dumps({"content": text, "add_special": False}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        tokens = tokenizer.convert_ids_to_tokens(json.load(answer)["tokens"])
    same += tokens == tokenizer.tokenize(text)
    print(f"SEEN {name}: {' '.join(tokens)} | tokenizer: {' '.join(tokenizer.tokenize(text))}")
print(f"SAME {same} of {len(TEXTS)}")
PY
"$folder/venv/bin/python" "$folder/export.py" "$folder"
if "$folder/venv/bin/python" "$folder/read.py" "$folder" exported > "$folder/log" 2>&1; then
  echo "changed: llama.cpp loads what mlx-lm exports"; exit 1
fi
grep -o -m 1 "invalid gguf type for tokenizer.ggml.token_type" "$folder/log"
"$folder/venv/bin/python" "$folder/read.py" "$folder" corrected > "$folder/corrected" 2>&1
grep "SEEN" "$folder/corrected"
"$folder/venv/bin/python" "$folder/read.py" "$folder" scored > "$folder/scored" 2>&1
grep -q "SAME 4 of 4" "$folder/scored" || { echo "changed: scores by number don't give the tokenizer's tokens"; exit 1; }
if ! grep -q "SAME [012] of 4" "$folder/corrected"; then
  echo "changed: the exported scores give the tokenizer's tokens"; exit 1
fi
echo "with scores in the order of merges all four are as the tokenizer has them"
