#!/bin/sh
# What: `mlx_lm.evaluate` encodes without special tokens wherever the tokenizer has a chat template, as
#   a rendered template brings its own. But the harness renders none for perplexity tasks such as
#   wikitext: an instruct model is scored on bare text without its BOS, and the first token of each
#   document, which nothing precedes, is left out. lm-eval's own models put BOS (or else EOS) before
#   every document and score all of its tokens. A tokenizer without BOS loses the first token in
#   any case.
# Guess before running: `loglikelihood_rolling` of mlx-lm's class equals the harness's definition to
#   rounding, with a chat template as without.
# Seen (mlx-lm 0.32.2, mlx 0.32.4, lm-eval 0.4.13; 2026-12-01), which this script checks, through
#   `simple_evaluate` on a task of two documents: the same model with the same text has a word
#   perplexity of its own for each: with a template or without one, and the one without is what
#   lm-eval's windows give. The model is shown BOS in one case, the first word's token in the other.
# Why it matters: Gemma and Llama are far worse without BOS, so an instruct model seems worse than its
#   base; the class's default decides that, and no option of the harness shows it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 lm-eval==0.4.13 transformers==5.24.0 tokenizers==0.23.3
cat > "$folder/look.py" <<'PY'
import importlib.metadata
import json
import math
import pathlib
import sys

import lm_eval
import mlx.core as mx
import mlx.nn as nn
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from mlx_lm.evaluate import MLXLM
from mlx_lm.models import llama
from mlx_lm.utils import save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

mx.set_default_device(mx.cpu)
print(*(f"{name} {importlib.metadata.version(name)}" for name in ("mlx-lm", "mlx", "lm-eval")))
folder = pathlib.Path(sys.argv[1])
TEXTS = ["hello world, this is a text", "and here is one more of them"]
characters = sorted(pre_tokenizers.ByteLevel.alphabet())
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 258,
    "tie_word_embeddings": False, "max_position_embeddings": 2048,
}
(folder / "texts.jsonl").write_text("".join(json.dumps({"page": text}) + "\n" for text in TEXTS))
(folder / "texts.yaml").write_text(f"""
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list: [{{metric: word_perplexity}}]
""")


def write(name, template):
    bpe = Tokenizer(models.BPE({"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(characters)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs(**CONFIG))
    model.apply_to_modules(lambda _, m: m.update({"weight": m.weight * 2}) if isinstance(m, nn.Linear) else None)
    save_model(folder / name, model)
    save_config(dict(CONFIG), folder / name / "config.json")
    tokenizer.save_pretrained(folder / name)
    return str(folder / name)


def defined(model, tokenizer):
    """The word perplexity by lm-eval's own windows, with BOS as their prefix."""
    total = 0.0
    for text in TEXTS:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        windows = get_rolling_token_windows(tokens, tokenizer.bos_token_id, 2048, 1)
        for context, targets in map(make_disjoint_window, windows):
            ids = [*context, *targets]
            scores = nn.log_softmax(model(mx.array(ids[:-1])[None])[0].astype(mx.float32))
            total += sum(scores[len(context) - 1 + i, t].item() for i, t in enumerate(targets))
    return math.exp(-total / sum(len(text.split()) for text in TEXTS))


seen = {}
for name, template in (("without", None), ("with", "{% for m in messages %}<s>{{ m.content }}{% endfor %}")):
    lm = MLXLM(write(name, template))
    shown = []
    inner = lm._score_fn
    lm._score_fn = lambda inputs, *a, inner=inner, shown=shown, **k: (shown.extend(inputs), inner(inputs, *a, **k))[1]
    results = lm_eval.simple_evaluate(
        model=lm, tasks=["texts"], task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=lm.use_chat_template, bootstrap_iters=0,
    )
    found = next(v for k, v in results["results"]["texts"].items() if k.startswith("word_perplexity"))
    first = lm.tokenizer.convert_ids_to_tokens([ids[0] for ids in shown])
    seen[name] = (found, defined(lm._model, lm.tokenizer), first)
for name, (found, wanted, first) in seen.items():
    print(f"{name} a template: word perplexity {found:.0f}, by lm-eval's windows {wanted:.0f}; documents begin with {first}")
found, wanted, first = seen["without"]
if abs(found / wanted - 1) > 1e-3 or first != ["<s>"] * 2:
    sys.exit("changed: without a template, too, the perplexity isn't that of lm-eval's windows")
found, wanted, first = seen["with"]
if abs(found / wanted - 1) < 0.05 or first != ["h", "a"]:
    sys.exit("changed: with a chat template documents are scored after BOS")
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder"
