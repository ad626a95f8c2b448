"""What tests share: random checkpoints, made here, what spoils them, and the command line."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mint_mlx.jobs.order import Order, place_order
from mint_mlx.jobs.request import Request, check_request
from mint_mlx.rules import efforts
from mint_mlx.runtime import runner

# On Python 3.10: fewer families, and quantizers that fail on MoEs.
OLD_MLX_LM = version("mlx-lm") < "0.32"
DEMO = Path(__file__).parent.parent / "mint_mlx" / "demo" / "demo-moe"
HIDDEN = 128
VOCAB = 96
HEAD_DIM = 32
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (4, 24)).astype(np.int32)
DEFAULT = efforts.DEFAULT  # the level that people get; tests get `fast` unless they ask


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges, cut to VOCAB tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(alphabet[:VOCAB])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!"}'
    )


def _attention(prefix: str, heads: int = 4, kv: int = 2) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.self_attn.q_proj.weight": (heads * HEAD_DIM, HIDDEN),
        f"{prefix}.self_attn.k_proj.weight": (kv * HEAD_DIM, HIDDEN),
        f"{prefix}.self_attn.v_proj.weight": (kv * HEAD_DIM, HIDDEN),
        f"{prefix}.self_attn.o_proj.weight": (HIDDEN, heads * HEAD_DIM),
        f"{prefix}.input_layernorm.weight": (HIDDEN,),
        f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
    }


Model = tuple[dict[str, Any], dict[str, tuple[int, ...]]]  # config and tensor shapes


def llama(layers: int, tied: bool = False) -> Model:
    """A dense Llama: config and tensor shapes."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(layers):
        prefix = f"model.layers.{i}"
        shapes |= _attention(prefix)
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (192, HIDDEN) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, 192)
    config = _config("llama", layers, intermediate_size=192, tie_word_embeddings=tied)
    return config, shapes


def qwen3_moe(layers: int, experts: int = 4) -> Model:
    """A Qwen3-MoE with one file entry per expert, as released."""
    _, shapes = llama(layers)
    for i in range(layers):
        prefix = f"model.layers.{i}"
        for name in [n for n in shapes if n.startswith(f"{prefix}.mlp.")]:
            del shapes[name]
        shapes |= {f"{prefix}.self_attn.{n}_norm.weight": (HEAD_DIM,) for n in ("q", "k")}
        shapes[f"{prefix}.mlp.gate.weight"] = (experts, HIDDEN)
        for e in range(experts):
            expert = f"{prefix}.mlp.experts.{e}"
            shapes |= {f"{expert}.{name}_proj.weight": (64, HIDDEN) for name in ("gate", "up")}
            shapes[f"{expert}.down_proj.weight"] = (HIDDEN, 64)

    config = _config(
        "qwen3_moe",
        layers,
        intermediate_size=192,
        tie_word_embeddings=False,
        num_experts=experts,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
    )
    return config, shapes


def mixtral(layers: int, experts: int = 8) -> Model:
    """A Mixtral: its class has no predicate that protects the router."""
    _, shapes = llama(layers)
    for i in range(layers):
        prefix = f"model.layers.{i}"
        for name in [n for n in shapes if n.startswith(f"{prefix}.mlp.")]:
            del shapes[name]
        shapes[f"{prefix}.block_sparse_moe.gate.weight"] = (experts, HIDDEN)
        for e in range(experts):
            expert = f"{prefix}.block_sparse_moe.experts.{e}"
            shapes |= {f"{expert}.{name}.weight": (64, HIDDEN) for name in ("w1", "w3")}
            shapes[f"{expert}.w2.weight"] = (HIDDEN, 64)

    config = _config(
        "mixtral", layers, intermediate_size=64, num_local_experts=experts, num_experts_per_tok=2
    )
    return config, shapes


def _config(model_type: str, layers: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "torch_dtype": "bfloat16",
        "eos_token_id": 0,
        **more,
    }


def write_checkpoint(
    folder: Path,
    model: Model,
    shards: int = 1,
    dtype: mx.Dtype = mx.bfloat16,
    seed: int = 0,
) -> Path:
    """Write a random checkpoint with a tokenizer; several shards get an index."""
    config, shapes = model
    folder.mkdir(parents=True, exist_ok=True)
    key = mx.random.key(seed)
    tensors = {}
    for name, shape in shapes.items():
        key, draw = mx.random.split(key)
        scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
        tensors[name] = (mx.random.normal(shape, key=draw) * scale).astype(dtype)

    names = list(tensors)
    weight_map = {}
    for s in range(shards):
        file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        if shards == 1:
            file = "model.safetensors"
        shard = {name: tensors[name] for name in names[s::shards]}
        mx.save_safetensors(str(folder / file), shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)

    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


Maker = Callable[..., Path]


@dataclass(frozen=True)
class Ran:
    """A command line's exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its stdout, parsed; a ValueError where it holds anything but one JSON value."""
        return json.loads(self.out)


Cli = Callable[..., Ran]


def order_for(request: Request, report: Notes | None = None) -> Order:
    """A request held against its model's headers."""
    return place_order(check_request(request), report)


class Notes:
    """A report that keeps its remarks and how far long steps were."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.details: list[str] = []
        self.shares: list[float | None] = []
        self.expected: list[str] = []
        self.begun: list[str] = []
        self.steps: list[tuple[str, int, int]] = []

    def stages(self, names: Sequence[str]) -> None:
        self.expected = list(names)

    def stage(self, name: str) -> None:
        self.begun.append(name)

    def step(self, item: str, done: int, total: int) -> None:
        self.steps.append((item, done, total))

    def detail(self, text: str, share: float | None = None) -> None:
        self.details.append(text)
        self.shares.append(share)

    def note(self, text: str) -> None:
        self.said.append(text)


Weights = dict[str, mx.array]


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a checkpoint's config.json."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    """Rewrite the tensors of a checkpoint of one shard."""
    weights = change(dict(mx.load(str(folder / "model.safetensors"))))
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def spoil_weight(folder: Path, name: str, value: float) -> None:
    """Write `value` into one element of a tensor."""

    def spoil(weights: Weights) -> Weights:
        weights[name][3, 4] = value
        return weights

    edit_weights(folder, spoil)


def kl(source: Path, checkpoint: Path, tokens: np.ndarray) -> float:
    """Mean KL divergence of a checkpoint from its source, on tokens (windows, length)."""
    logp = []
    for folder in (source, checkpoint):
        logits = runner.load_runner(folder).model(mx.array(tokens)).astype(mx.float32)
        logp.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    return float(mx.mean(mx.sum(mx.exp(logp[0]) * (logp[0] - logp[1]), axis=-1)))


RawTensors = dict[str, tuple[str, list[int], bytes]]  # type, shape and bytes by name


def rewrite_shards(folder: Path, change: Callable[[RawTensors], Any]) -> Path:
    """Rewrite a checkpoint's shards as one, with what `change` does to its raw tensors."""
    tensors: RawTensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = (8 + length + n for n in entry["data_offsets"])
                tensors[name] = (entry["dtype"], entry["shape"], raw[start:end])
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)

    header = {}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def gradients(function: Callable[..., mx.array], *arrays: mx.array) -> list[np.ndarray]:
    """The gradients of a sum of the outputs, each with a random weight."""
    weights = mx.random.normal(function(*arrays).shape, key=mx.random.key(9))
    return [np.array(a) for a in mx.vjp(function, list(arrays), [weights])[1]]
