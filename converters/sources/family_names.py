"""Names of tensors that single families have in transformers, as mlx-lm's classes call them."""

from __future__ import annotations

import re
from collections.abc import Collection

# By the type of a model: patterns and what replaces each, one after the other.
_RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    # As in memory (`save_original_format=False`).
    "bailing_hybrid": (
        (r"^model\.embed_tokens\.", "model.word_embeddings."),
        (r"\.self_attn\.(forget_gate\.)?", ".attention."),
        (r"\.mlp\.gate\.e_score_correction_bias$", ".mlp.gate.expert_bias"),
    ),
    "exaone": (
        (r"^model\.embed_tokens\.", "transformer.wte."),
        (r"^model\.norm\.", "transformer.ln_f."),
        (r"^model\.layers\.", "transformer.h."),
        (r"\.input_layernorm\.", ".ln_1."),
        (r"\.post_attention_layernorm\.", ".ln_2."),
        (r"\.self_attn\.([qkv])_proj\.", r".attn.attention.\1_proj."),
        (r"\.self_attn\.o_proj\.", ".attn.attention.out_proj."),
        (r"\.mlp\.gate_proj\.", ".mlp.c_fc_0."),
        (r"\.mlp\.up_proj\.", ".mlp.c_fc_1."),
        (r"\.mlp\.down_proj\.", ".mlp.c_proj."),
    ),
    "gemma3": (
        (r"^model\.(?=(language_model|vision_tower|multi_modal_projector)\.)", ""),
        (r"^language_model\.(?!(model|lm_head)\.)", "language_model.model."),
    ),
    # Saved through the class of its text model.
    "gemma3n": (
        (r"^model\.(?!language_model\.)", "model.language_model."),
        (r"\.per_layer_model\.language_model_projection\.", ".per_layer_model_projection."),
    ),
    "gemma4": ((r"^lm_head\.", "language_model.lm_head."),),
    "gpt2": ((r"^transformer\.", ""),),
    "gpt_neox": ((r"^lm_head\.", "embed_out."),),
    "kimi_linear": ((r"\.self_attn\.forget_gate\.", ".self_attn."),),
    # transformers 5 writes the text model's layers under the name of the tower's.
    "kimi_k25": (
        (r"^language_model\.model\.blocks\.", "language_model.model.layers."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
    ),
    "laguna": ((r"\.mlp\.shared_experts\.", ".mlp.shared_expert."),),
    "lfm2": ((r"^(model\.language_model|language_model\.model)\.", "model."),),
    "mimo_v2_flash": ((r"\.self_attn\.sinks$", ".self_attn.attention_sink_bias"),),
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
    "nemotron_h": (
        (r"^model\.", "backbone."),
        (r"\.mixer\.experts\.up_proj$", ".mixer.switch_mlp.fc1.weight"),
        (r"\.mixer\.experts\.down_proj$", ".mixer.switch_mlp.fc2.weight"),
    ),
    "step3p5": (
        (r"^model\.language_model\.", "model."),
        (r"\.mlp\.gate\.weight$", ".moe.gate.weight"),
        (r"\.mlp\.gate\.e_score_correction_bias$", ".moe.router_bias"),
        (r"\.mlp\.shared_experts\.", ".share_expert."),
    ),
    # transformers writes these names for the norms of every layer.
    "olmo_hybrid": (
        (r"\.attention_layer_norm\.", ".input_layernorm."),
        (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
    ),
}
# By the type of a model: names of one thing, which differ between kinds of layers.
_SWAPPED: dict[str, tuple[str, str]] = {
    "bailing_hybrid": (".attention.o_proj.", ".attention.dense."),
}


def family_name(
    model_type: str, name: str, known: Collection[str], parameters: Collection[str]
) -> str:
    """A tensor's name as the class of its family knows it.

    Args:
        model_type: of the config.
        name: of the tensor.
        known: names that stay, and that no other tensor gets: those of the model's parameters that
            the checkpoint has.
        parameters: the names of all the model's parameters.
    """
    if name in known:
        return name
    renamed = name
    for pattern, new in _RENAMES.get(model_type, ()):
        renamed = re.sub(pattern, new, renamed)
    if model_type in _SWAPPED and renamed not in parameters:
        one, other = _SWAPPED[model_type]
        swapped = renamed.replace(one, other) if one in renamed else renamed.replace(other, one)
        renamed = swapped if swapped in parameters else renamed
    return name if renamed in known else renamed
