"""What each layer does in the model: its role, from its module path and its surroundings.

Families name their modules differently (`mlp.gate`, `feed_forward.router`, `router.layer`,
`classifier`); the roles are the same, and guards, recipes and priors speak of roles only.
"""

from __future__ import annotations

import re

from .block_path import block_of

ROLES = (
    "embedding",
    "head",
    "attention",
    "mla",
    "linear_attention",
    "mlp",
    "expert_gate",
    "expert_up",
    "expert_down",
    "shared_expert",
    "shared_expert_gate",
    "router",
    "other",
)
EXPERTS = ("expert_gate", "expert_up", "expert_down")
GATES = ("router", "shared_expert_gate")
DOWN = ("down_proj", "fc2", "w2")  # the last projection of an MLP or of an expert
# Projections back into the hidden state: their inputs are made by their neighbours in the block.
WRITES = (*DOWN, "o_proj", "out_proj", "wo", "dense", "c_proj")
TOWER = re.compile(  # of images or sounds
    r"(^|\.)(\w*vision\w*|visual|\w*image\w*|\w*audio\w*|\w*speech\w*|multi_?modal_projector"
    r"|(pre_)?mm_projector\w*|patch_merger|patch_merge_mlp|aligner|vit_\w+)(\.|$)"
)

_SHARED_GATE = re.compile(r"(^|\.)shared_?experts?_gate(\.|$)")
_SHARED = re.compile(r"(^|\.)(shared_?experts?|share_expert|shared_mlp)(\.|$)")
_ROUTER = re.compile(r"(^|\.)(router|gate|classifier|coefficient)(\.|$)")
_LATENT = re.compile(r"(^|\.)(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|embed_q|unembed_out)$")
_LINEAR_ATTENTION = re.compile(
    r"(^|\.)(linear_attn|mamba|ssm|conv|recurrent|delta_net|lightning_attn)(\.|$)"
)
_ATTENTION = re.compile(r"(^|\.)(\w*attn\w*|\w*attention\w*|[wW]qkv|qkv_proj|[qkvo]_proj)(\.|$)")
_MLP = re.compile(
    r"(^|\.)(\w*mlps?\w*|feed_forward|ffn|ff|block_sparse_moe|\w*moe|mixer"
    r"|gate_proj|up_proj|down_proj|fc1|fc2)(\.|$)"
)
_HEAD = re.compile(r"(^|\.)(lm_head(\.linear)?|embed_out|output|head|score)$")
_LINEAR_OWNER = re.compile(
    r"mamba|ssm|delta|kda|linear_?attention|lightning|recurrent|rwkv", re.IGNORECASE
)


def role_of(path: str, kind: str, block_has_experts: bool, owner: str = "") -> str:
    """The role of a layer.

    Args:
        path: module path in the mlx-lm model.
        kind: `linear`, `embedding`, `experts` or `multi-linear` (see layers.py).
        block_has_experts: whether the layer's block holds routed experts; only there a `gate` is a
            router.
        owner: the class name of the module that holds the layer, which distinguishes the mixer of
            a mamba from an attention's.
    """
    leaf = path.rsplit(".", 1)[-1]
    if kind == "experts" and _ATTENTION.search(path):  # an output projection in groups
        return "attention"
    if kind == "experts":
        if leaf in DOWN:
            return "expert_down"
        return "expert_gate" if leaf in ("gate_proj", "w1") else "expert_up"
    if kind == "embedding":
        return "embedding"
    if block_of(path) is None and _HEAD.search(path):
        return "head"
    if _SHARED_GATE.search(path):
        return "shared_expert_gate"
    if _SHARED.search(path):
        return "shared_expert"
    if _LATENT.search(path):
        return "mla"
    if _LINEAR_ATTENTION.search(path) or _LINEAR_OWNER.search(owner):
        return "linear_attention"
    if _ATTENTION.search(path) or re.search("attention", owner, re.IGNORECASE):
        return "attention"
    if block_has_experts and _ROUTER.search(path):
        return "router"
    return "mlp" if _MLP.search(path) else "other"
