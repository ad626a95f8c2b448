"""Objectives: which layers they protect."""

from __future__ import annotations

import numpy as np
from helpers import Maker, llama

from mint_mlx.allocation.allocate import allocate
from mint_mlx.allocation.search_space import SearchSpace
from mint_mlx.base.units import parse_budget
from mint_mlx.jobs import measurements
from mint_mlx.jobs.model import Job, prepare
from mint_mlx.rules.objectives import Context, prior
from mint_mlx.rules.recipes import find_recipe


def test_mint_protects_what_its_priors_name(make: Maker) -> None:
    folder = make(llama(4))
    curves = measurements.get_profile(prepare(str(folder)))
    budget = parse_budget("4.5bpw")
    space = SearchSpace(curves.inventory, find_recipe("default", {}))
    plain = allocate(curves, budget, space, "nmse")
    mint = allocate(curves, budget, space, "mint")
    assert mint.choice["lm_head"].bits > plain.choice["lm_head"].bits


def test_the_prior_ranks_the_head_first_and_queries_last(job: Job) -> None:
    def cost(path: str) -> float:
        layer = next(layer for layer in job.inventory.layers if layer.path.endswith(path))
        return prior(layer, np.full((1, layer.experts), 0.5), Context(job.inventory.blocks)).item()

    down = "mlp.switch_mlp.down_proj"
    names = (
        "lm_head",
        f"0.{down}",
        "embed_tokens",
        f"1.{down}",
        "0.self_attn.v_proj",
        "0.self_attn.q_proj",
    )
    costs = [cost(name) for name in names]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == len(costs)
    assert cost("mlp.gate") == cost("embed_tokens")
