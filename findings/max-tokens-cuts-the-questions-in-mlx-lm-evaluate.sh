#!/bin/sh
# What: `--max-tokens` of `mlx_lm.evaluate` is "Maximum number of tokens to generate". It also cuts the questions of
#   tasks that generate nothing: of multiple choice the model sees no more than the last so many tokens of
#   question and answer together. Examples, instructions and BOS go first. A question whose answers are longer
#   than that isn't asked at all: all its answers score minus infinity, and the first one counts. Nothing is said.
# Guess before running (and before reading evaluate.py): no effect on multiple choice.
# Seen (mlx-lm 0.32.2, mlx 0.32.4, lm-eval 0.4.13; 2026-12-01), which this script checks with a model that answers
#   by what stands at the beginning of the prompt: accuracy 1.0 without the option, and with 256; with 64, the
#   prompts being of 98 tokens and the answers of 10, it is that of chance, and with 8 the share of questions whose
#   first answer is right.
# Why it matters: `--tasks mmlu gsm8k --max-tokens 512`, given to bound the reasoning of the one, takes the
#   examples from the other.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 lm-eval==0.4.13 transformers==5.24.0 tokenizers==0.23.3
cat > "$folder/look.py" <<'PY'
import importlib.metadata
import json
import pathlib
import random
import sys

import lm_eval
import mlx.core as mx
from lm_eval.tasks import TaskManager
from mlx_lm.evaluate import MLXLM
from mlx_lm.models import llama
from mlx_lm.utils import save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

mx.set_default_device(mx.cpu)
print("SEEN", *(f"{name} {importlib.metadata.version(name)}" for name in ("mlx-lm", "mlx", "lm-eval")))
folder = pathlib.Path(sys.argv[1])
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64,
    "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 258,
    "tie_word_embeddings": False, "max_position_embeddings": 2048,
}
characters = sorted(pre_tokenizers.ByteLevel.alphabet())
bpe = Tokenizer(models.BPE({"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(characters)}, []))
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(folder / "model")
save_model(folder / "model", llama.Model(llama.ModelArgs(**CONFIG)))
save_config(dict(CONFIG), folder / "model/config.json")


class Reader:
    """In place of the network: it finds the capital letter that it has read and says it in small."""

    def __init__(self, model):
        self.layers, self.read = model.layers, []

    def __call__(self, tokens, cache=None):
        letters = [characters[t - 2] for t in tokens[0].tolist() if t > 1]
        self.read.append(len(letters))
        capitals = [c for c in letters if c.isascii() and c.isupper()]
        logits = mx.zeros((*tokens.shape, 258))
        if capitals:
            logits[..., characters.index(capitals[0].lower()) + 2] = 9
        return logits


random.seed(0)
rows = []
for _ in range(60):
    letter = random.choice("ABCD")
    rows.append({"question": letter + "." * 96, "choices": [c * 10 for c in "abcd"], "answer": "ABCD".index(letter)})
(folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
(folder / "choice.yaml").write_text(f"""
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
""")
first = sum(row["answer"] == 0 for row in rows) / len(rows)
seen = {}
for limit in (None, 256, 64, 8):
    lm = MLXLM(str(folder / "model"), max_tokens=limit, use_chat_template=False)
    lm._model = Reader(lm._model)
    results = lm_eval.simple_evaluate(
        model=lm, tasks=["choice"], task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    seen[limit] = results["results"]["choice"]["acc,none"], max(lm._model.read, default=0)
    print(f"SEEN --max-tokens {limit}: accuracy {seen[limit][0]:.2f}, the model reads {seen[limit][1]} characters of 97")
if [seen[limit][1] for limit in seen] != [97, 97, 55, 0] or [seen[limit][0] for limit in (None, 256)] != [1.0, 1.0]:
    sys.exit("changed: --max-tokens leaves other parts of the questions")
if seen[64][0] > 0.5 or seen[8][0] != first:
    sys.exit("changed: without their beginning the questions are still answered")
print(f"SEEN the first answer is right in {first:.2f} of the questions")
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" > "$folder/log" 2>&1 || { tail -n 5 "$folder/log"; exit 1; }
grep -o "SEEN .*" "$folder/log" | cut -c 6-
