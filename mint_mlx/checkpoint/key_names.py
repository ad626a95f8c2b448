"""Names that the same key of a config.json has."""

# Names of the same quantity in the configs of different families and releases.
ALIASES = (
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_top_k",
        "moe_k",
        "top_k_experts",
    ),
    ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
    ("n_group", "num_expert_group"),
    ("norm_topk_prob", "moe_renormalize", "norm_expert_weight", "route_norm"),
    ("routed_scaling_factor", "moe_router_scaling_factor"),
    (
        "scoring_func",
        "score_function",
        "score_func",
        "moe_router_activation_func",
        "moe_router_score_func",
    ),
    ("rms_norm_eps", "layernorm_epsilon", "layer_norm_epsilon", "layer_norm_eps", "norm_eps"),
    ("num_hidden_layers", "num_layers", "n_layers", "n_layer"),
)
