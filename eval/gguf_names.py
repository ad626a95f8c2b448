"""What GGUF calls the tensors of a model, for families whose GGUF files `compare` reads and writes.

A family stands here if llama.cpp's converter stores its weights as they are, but for the order of
rows that llama.cpp's rotation wants of Llama's queries and keys.
"""

from __future__ import annotations

from ..checkpoint.block_path import block_of

# GGUF's architecture by mlx-lm's `model_type`.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
ROTATED = ("llama",)  # architectures whose queries and keys have their rows in another order

_GLOBAL = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.switch_mlp.gate_proj": "ffn_gate_exps",
    "mlp.switch_mlp.up_proj": "ffn_up_exps",
    "mlp.switch_mlp.down_proj": "ffn_down_exps",
}


def gguf_name(name: str) -> str | None:
    """GGUF's name of a parameter of mlx-lm's model, as `blk.3.ffn_up.weight`; None without one."""
    path, _, local = name.rpartition(".")
    block = block_of(path)
    if block is None:
        known = _GLOBAL.get(path)
        return None if known is None else f"{known}.{local}"
    known = _IN_BLOCK.get(path.removeprefix(f"model.layers.{block}."))
    return None if known is None else f"blk.{block}.{known}.{local}"


def rotated_heads(name: str, architecture: str, heads: int, key_heads: int) -> int | None:
    """How many heads a tensor has whose rows GGUF stores in another order; None for all others."""
    if architecture not in ROTATED:
        return None
    if ".attn_q." in name:
        return heads
    return key_heads if ".attn_k." in name else None
