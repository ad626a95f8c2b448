"""Names of tensors that single families have in transformers, as mlx-lm's classes call them."""

from __future__ import annotations

import re
from collections.abc import Collection

# By the type of a model: patterns and what replaces each, one after the other.
_RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    # (Layers with delta attention; those with full attention call it dense.)
    "bailing_hybrid": ((r"\.attention\.dense\.", ".attention.o_proj."),),
    # Saved through the class of its text model.
    "gemma3n": (
        (r"^model\.(?!language_model\.)", "model.language_model."),
        (r"\.per_layer_model\.language_model_projection\.", ".per_layer_model_projection."),
    ),
    "gpt2": ((r"^transformer\.", ""),),
    "minimax_m3_vl": (
        (r"^(?=(lm_head|model)\.)", "language_model."),
        (r"^language_model\.model\.language_model\.", "language_model.model."),
        (r"\.self_attn\.indexer\.([qk])_(proj|norm)\.", r".self_attn.index_\1_\2."),
    ),
    "nanochat": (
        (r"^model\.embed_tokens\.", "transformer.wte."),
        (r"^model\.layers\.", "transformer.h."),
        (r"\.self_attn\.([qkv])_proj\.", r".attn.c_\1."),
        (r"\.self_attn\.o_proj\.", ".attn.c_proj."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."),
        (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    ),
    # transformers writes these names for the norms of every layer.
    "olmo_hybrid": (
        (r"\.attention_layer_norm\.", ".input_layernorm."),
        (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
    ),
}


def family_name(model_type: str, name: str, known: Collection[str]) -> str:
    """A tensor's name as the class of its family knows it.

    Args:
        model_type: of the config.
        name: of the tensor.
        known: names that stay, and that no other tensor gets: those of the model's parameters that
            the checkpoint has.
    """
    if name in known:
        return name
    renamed = name
    for pattern, new in _RENAMES.get(model_type, ()):
        renamed = re.sub(pattern, new, renamed)
    return name if renamed in known else renamed
