#!/bin/sh
# What: mlx-lm's tokenizer passes `enable_thinking` to every chat template that is rendered without it:
#   True if the vocabulary has <think> and </think> (or another pair that it knows), else False. A
#   template's own default, for which the variable must be undefined, is never taken. So a model that
#   answers at once unless asked to think, thinks; and one that thinks unless told not to, but writes
#   its marks in several tokens, doesn't.
# Guess before running: the prompt is that of transformers, where nobody said anything of thinking.
# Seen (mlx-lm 0.32.2, mlx 0.32.4, transformers 5.24.0; 2026-12-01), which this script checks with
#   templates of both kinds and tokenizers with the marks and without: in all four cases what decides
#   is the vocabulary, in two of them the prompt isn't that of transformers. An explicit value is
#   taken. Training (`mlx_lm.lora`), DWQ's calibration and `mlx_lm.perplexity` render the same way.
# Why it matters: a quantized model is compared with its original in another mode than other engines
#   run it in, at several times the tokens, and is calibrated on another prompt.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 transformers==5.24.0 tokenizers==0.23.3
cat > "$folder/look.py" <<'PY'
import importlib.metadata
import pathlib
import sys

from mlx_lm.tokenizer_utils import load
from mlx_lm.tuner.datasets import ChatDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

print(*(f"{name} {importlib.metadata.version(name)}" for name in ("mlx-lm", "transformers")))
START = "{% for m in messages %}user : {{ m.content }} {% endfor %}"
TEMPLATES = {
    "thinks only if asked": START + "{% if enable_thinking %}think{% else %}answer{% endif %}",
    "thinks unless told not to": START + "{% if enable_thinking is defined and not enable_thinking %}answer{% else %}think{% endif %}",
}
WORDS = ["unk", "user", ":", "hi", "think", "answer"]
MESSAGES = [{"role": "user", "content": "hi"}]
seen = {}
for kind, template in TEMPLATES.items():
    for marks in ([], ["<think>", "</think>"]):
        folder = pathlib.Path(sys.argv[1]) / f"{len(seen)}"
        words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="unk"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="unk", eos_token="unk")
        made.add_tokens(marks)
        made.chat_template = template
        made.save_pretrained(folder)
        plain = AutoTokenizer.from_pretrained(folder).apply_chat_template(MESSAGES, tokenize=False)
        tokenizer = load(folder)
        rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
        trained, _ = ChatDataset([], tokenizer).process({"messages": MESSAGES})
        told = [tokenizer.apply_chat_template(MESSAGES, tokenize=False, enable_thinking=x) for x in (True, False)]
        if [t.split()[-1] for t in told] != ["think", "answer"]:
            sys.exit("an explicit enable_thinking isn't taken")
        last = [text.split()[-1] for text in (plain, rendered, tokenizer.decode(trained))]
        seen[kind, bool(marks)] = last
        print(f"{kind}, {'with' if marks else 'without'} <think> as a token: transformers {last[0]}, mlx-lm {last[1]}, training {last[2]}")
wanted = {
    ("thinks only if asked", False): ["answer", "answer", "answer"],
    ("thinks only if asked", True): ["answer", "think", "think"],
    ("thinks unless told not to", False): ["think", "answer", "answer"],
    ("thinks unless told not to", True): ["think", "think", "think"],
}
if seen != wanted:
    sys.exit("changed: mlx-lm no longer passes enable_thinking by the vocabulary")
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder"
