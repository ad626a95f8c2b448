"""Uniform plans: guards hold, and what a group does not divide stays."""

from __future__ import annotations

from dataclasses import replace

from helpers import Maker, mixtral

from mint_mlx.allocation.allocate import dequantized, uniform
from mint_mlx.base.quant_config import KEEP, QuantConfig
from mint_mlx.jobs.model import Job, prepare


def test_guards_hold_in_uniform_plans_and_can_be_overruled(make: Maker) -> None:
    job = prepare(str(make(mixtral(1))))
    gate = "model.layers.0.block_sparse_moe.gate"
    plan = uniform(job.source, job.inventory, QuantConfig(3, 32), {})
    assert plan.choice[gate] == QuantConfig(8, 32)
    assert {c for path, c in plan.choice.items() if path != gate} == {QuantConfig(3, 32)}
    free = uniform(job.source, job.inventory, QuantConfig(3, 32), {}, ignore_guards=True)
    assert free.choice[gate] == QuantConfig(3, 32)


def test_a_uniform_plan_keeps_what_its_group_does_not_divide(job: Job) -> None:
    plan = uniform(job.source, job.inventory, QuantConfig(4, 128), {})
    assert plan.choice["model.layers.0.mlp.switch_mlp.down_proj"] == KEEP
    assert plan.choice["model.layers.0.mlp.switch_mlp.up_proj"] == QuantConfig(4, 128)


def test_keep_leaves_codes_as_they_are_and_dequantizing_writes_16_bits(job: Job) -> None:
    stored = QuantConfig(4, 64)
    first, *others = job.inventory.layers
    inventory = replace(job.inventory, layers=(replace(first, stored=stored), *others))
    kept = uniform(job.source, inventory, KEEP, {})
    assert kept.choice == {layer.path: layer.stored or KEEP for layer in inventory.layers}
    assert kept.choice[first.path] == stored
    assert set(dequantized(job.source, inventory, {}).choice.values()) == {KEEP}
