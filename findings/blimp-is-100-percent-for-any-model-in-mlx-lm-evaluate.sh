#!/bin/sh
# What: BLiMP and its relatives (BLiMP-NL, TurBLiMP, ZhoBLiMP) ask which of two sentences a model finds
#   likelier; their prompts are empty. `mlx_lm.evaluate` puts no more before them than the tokenizer does. With a
#   tokenizer that adds no BOS (those of GPT-2, Pythia, OLMo, SmolLM, Qwen), the prompt then has no token, and
#   each sentence scores minus infinity, as if it were too long. Of two equal scores the first counts,
#   which in these tasks is always the right one: accuracy 100 %, with no word but a RuntimeWarning of numpy.
#   lm-eval's own models take the end-of-text token as the prefix there.
# Guess before running (and before reading evaluate.py): about 50 % for random weights, as in lm-eval.
# Seen (mlx-lm 0.32.2, mlx 0.32.4, lm-eval 0.4.13; 2026-12-01), which this script checks on BLiMP's own
#   template, with 40 pairs in which the model finds the *wrong* sentence likelier: 0 % where the tokenizer
#   adds BOS, 100 % where it doesn't, also with a chat template that isn't applied (where it is, the prompt
#   isn't empty). Every score is minus infinity. CrowS-Pairs makes 0 % of stereotypes of such scores.
# Why it matters: base models and their quantizations all score 1.0 on 67 tasks, and so does noise.
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
import mlx.nn as nn
import yaml
from lm_eval.tasks import TaskManager
from lm_eval.tasks.crows_pairs.utils import process_results
from mlx_lm.evaluate import MLXLM
from mlx_lm.models import llama
from mlx_lm.utils import save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

mx.set_default_device(mx.cpu)
print(*(f"{name} {importlib.metadata.version(name)}" for name in ("mlx-lm", "mlx", "lm-eval")))
folder = pathlib.Path(sys.argv[1])
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 258,
    "tie_word_embeddings": False, "max_position_embeddings": 2048,
}
characters = sorted(pre_tokenizers.ByteLevel.alphabet())


def write(name, bos, template):
    bpe = Tokenizer(models.BPE({"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(characters)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", **({"bos_token": "<s>"} if bos else {}))
    tokenizer.chat_template = template
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs(**CONFIG))
    save_model(folder / name, model)
    save_config(dict(CONFIG), folder / name / "config.json")
    tokenizer.save_pretrained(folder / name)
    return MLXLM(str(folder / name), use_chat_template=False)  # as with --no-apply-chat-template


def likelihood(model, sentence, first):
    ids = mx.array([first, *(characters.index(c) + 2 for c in sentence.replace(" ", "Ġ"))])
    scores = nn.log_softmax(model(ids[None, :-1])[0])
    return mx.take_along_axis(scores, ids[1:, None], axis=1).sum().item()


bos = write("bos", True, None)
random.seed(0)
words = "the a cat dog child sees hears likes old red".split()
rows = []
while len(rows) < 40:
    pair = [" ".join(random.choices(words, k=5)) for _ in range(2)]
    # The label "good" goes to the sentence that the model finds less likely, after <s> as after </s>.
    by_bos, by_eos = (sorted(pair, key=lambda s: likelihood(bos._model, s, first)) for first in (0, 1))
    if by_bos == by_eos:
        rows.append({"sentence_good": by_bos[0], "sentence_bad": by_bos[1]})
(folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
# BLiMP's template as lm-eval has it, with these pairs in place of its own.
original = pathlib.Path(lm_eval.__file__).parent / "tasks/blimp/_template_yaml"
task = yaml.safe_load(original.read_text()) | {
    "task": "pairs", "dataset_path": "json", "dataset_kwargs": {"data_files": {"train": str(folder / "pairs.jsonl")}},
}
if task["doc_to_text"] != "" or task["doc_to_target"] != 0:
    sys.exit("changed: BLiMP's template has another prompt or target")
(folder / "pairs.yaml").write_text(yaml.safe_dump(task))

seen = []
for name, lm in (
    ("BOS", bos), ("no BOS", write("plain", False, None)), ("no BOS, template not applied", write("chat", False, TEMPLATE)),
):
    scores = []
    inner = lm.loglikelihood
    lm.loglikelihood = lambda requests, inner=inner, scores=scores: (scores.extend(inner(requests)), scores)[1]
    results = lm_eval.simple_evaluate(
        model=lm, tasks=["pairs"], task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=lm.use_chat_template, bootstrap_iters=0,
    )
    accuracy = results["results"]["pairs"]["acc,none"]
    finite = sum(score > -float("inf") for score, _ in scores)
    seen.append((name, accuracy, finite, len(scores)))
stereotypes = process_results({}, scores[:2])["pct_stereotype"]
for name, accuracy, finite, count in seen:
    print(f"{name}: accuracy {accuracy:.2f}, {finite} of {count} scores are finite")
print(f"CrowS-Pairs takes the last of them for {stereotypes:.0%} of stereotypes")
if stereotypes or seen != [("BOS", 0.0, 80, 80), ("no BOS", 1.0, 0, 80), ("no BOS, template not applied", 1.0, 0, 80)]:
    sys.exit("changed: not 0, 1 and 1 as before")
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder"
