#!/bin/sh
# What: `from_pretrained(..., gguf_file=...)` of transformers reads of a GGUF file's rotary embedding no more
#   than the base, and of StarCoder2's not even that. Dropped in silence (a line at level "info"): the factors of
#   Llama 3.1 and later (the tensor rope_freqs.weight), linear scaling (all Gemma 3 but the smallest, old
#   long-context models), YaRN (Qwen with long contexts), and the part of a head that turns (Phi-4-mini).
#   All weights are right, so that the text begins well.
# Guess before running: the same logits as of the model that the file was made from, or a message.
# Seen (transformers 5.24.0, gguf 0.19.0, torch 2.13.0; 2026-12-01), which this script checks with tiny models,
#   whose files are written as llama.cpp's converter does: after 200 tokens the log-probabilities that
#   llama.cpp (xllamacpp 2026.10.11549) takes from the file are those of the original to .02, and those of
#   transformers differ by .9 to 8.7 in all of these; in a Llama and a Gemma 2 without scaling by .02 too.
# Why it matters: people compare a quantization with its original this way, or go on from it
#   (fine-tuning, conversion to other formats), and get another model the longer the text is.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0 gguf==0.19.0 xllamacpp==2026.10.11549
cat > "$folder/look.py" <<'PY'
import importlib.metadata
import json
import math
import pathlib
import sys
import urllib.request

import gguf
import numpy as np
import torch
import transformers
import xllamacpp

print("SEEN", *(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "gguf", "xllamacpp")))
folder = pathlib.Path(sys.argv[1])
HEADS, GROUPS, LAYERS, WIDTH, TRAINED = 4, 2, 6, 64, 128
SPECIAL = ["<s>", "</s>", "<pad>", "<other>"]
WORDS = [a + b for a in "abcdefghijklmnop" for b in "abcdefghijklmnop"]
WORDS[10] = "Ċ"
VOCABULARY = len(WORDS) + len(SPECIAL)
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "max_position_embeddings": 1024,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": TRAINED,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 256}
GEMMA = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
# name: (architecture in GGUF, class, width of a head, rotary embedding, rest of the config)
MODELS = {
    "Llama": ("llama", "Llama", 16, PLAIN, {}),
    "Gemma 2": ("gemma2", "Gemma2", 256, PLAIN, {"query_pre_attn_scalar": 256, "sliding_window": 64}),
    "Llama 3.1": ("llama", "Llama", 16, LLAMA3, {}),
    "Llama, linear": ("llama", "Llama", 16, LINEAR, {}),
    "Qwen3, YaRN": ("qwen3", "Qwen3", 128, YARN, {}),
    "Gemma 3": ("gemma3", "Gemma3", 256, GEMMA, {"query_pre_attn_scalar": 256, "sliding_window": 64}),
    "StarCoder2": ("starcoder2", "Starcoder2", 16, PLAIN | {"rope_theta": 1e6}, {"sliding_window": None}),
    "Phi-4-mini": ("phi3", "Phi3", 16, PLAIN | {"partial_rotary_factor": 0.75}, {"sliding_window": None}),
}


def permute(weight, heads):
    """The order of rows that llama.cpp wants of a Llama's queries and keys."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def llama3_factors(rope, width):
    """What llama.cpp's converter stores as rope_freqs.weight."""
    factors = []
    for i in range(0, width, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (i / width)
        share = (TRAINED / length - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        share = min(max(share, 0.0), 1.0)
        factors.append(1 / ((1 - share) / rope["factor"] + share))
    return np.array(factors, np.float32)


def write(name):
    architecture, family, head, rope, more = MODELS[name]
    kind = getattr(transformers, ("Gemma3Text" if family == "Gemma3" else family) + "Config")
    cls = getattr(transformers, f"{family}ForCausalLM")
    torch.manual_seed(0)
    width = {} if family in ("Starcoder2", "Phi3") else {"head_dim": head}
    model = cls(kind(**SIZES, **width, rope_parameters=json.loads(json.dumps(rope)), **more)).float().eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.5 if "embed" in key else weight.shape[-1] ** -0.5)
            else:
                weight.add_(torch.randn_like(weight) * 0.05)
    path = folder / f"{name}.gguf".replace(" ", "").replace(",", "")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_context_length(1024)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(128)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_vocab_size(VOCABULARY)
    if architecture == "starcoder2":
        writer.add_layer_norm_eps(model.config.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
        writer.add_key_length(head)
        writer.add_value_length(head)
    if "sliding_window" in more and more["sliding_window"]:
        writer.add_sliding_window(more["sliding_window"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(model.config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(model.config.final_logit_softcapping)
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture in ("llama", "phi3"):
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(WORDS + SPECIAL)
    writer.add_token_types([1] * len(WORDS) + [3] * len(SPECIAL))
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(258)
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture], LAYERS)
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight":
            continue
        base, end = key.rsplit(".", 1)
        weight = weight.numpy()
        if architecture == "llama" and ("q_proj" in key or "k_proj" in key):
            weight = permute(weight, HEADS if "q_proj" in key else GROUPS)
        if architecture.startswith("gemma") and "norm" in key:
            weight = weight + 1
        writer.add_tensor(f"{names.get_name(base)}.{end}", np.ascontiguousarray(weight, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, path


def ask_llama_cpp(path, tokens):
    """Log-probabilities of the next token, by number."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.port = str(path), 512, False, 0
    server = xllamacpp.Server(params)
    body = {"prompt": tokens, "n_predict": 1, "n_probs": VOCABULARY, "temperature": 1.0, "samplers": []}
    request = urllib.request.Request(
        f"{server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        listed = json.load(answer)["completion_probabilities"][0]["top_logprobs"]
    return {entry["id"]: entry["logprob"] for entry in listed}


tokens = torch.randint(0, 256, (1, 200), generator=torch.Generator().manual_seed(1))
wrong = []
for name in MODELS:
    model, path = write(name)
    loaded = type(model).from_pretrained(folder, gguf_file=path.name, dtype=torch.float32).eval()
    for (key, a), b in zip(model.state_dict().items(), loaded.state_dict().values()):
        if (a - b).abs().max() > 1e-6:
            sys.exit(f"changed: {name}: {key} is read wrong")
    listed = ask_llama_cpp(path, tokens[0].tolist())
    truth = torch.tensor(list(listed.values()))
    with torch.no_grad():
        found = [m(tokens).logits[0, -1].log_softmax(-1)[list(listed)] for m in (model, loaded)]
    original, read = ((logs - truth).abs().max().item() for logs in found)
    if len(listed) < VOCABULARY or original > 0.02:
        sys.exit(f"{name}: llama.cpp doesn't take the file for the model it was made from ({original})")
    print(f"SEEN {name}: from llama.cpp's log-probabilities the original is {original:.3f} away, "
          f"as transformers reads the file {read:.3f}")
    if read > 0.5:
        wrong.append(name)
if wrong != list(MODELS)[2:]:
    sys.exit(f"changed: now these are read as other models: {wrong}")
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" > "$folder/log" 2>&1 || { tail -n 5 "$folder/log"; exit 1; }
grep "^SEEN" "$folder/log" | cut -c 6-
