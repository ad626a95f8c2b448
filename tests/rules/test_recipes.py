"""Recipes: the bundled ones, the one that a family gets, and what a user's file may say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from released import FAMILIES, RELEASED, known, released

from mint_mlx.allocation.allocate import allocate
from mint_mlx.allocation.search_space import SearchSpace
from mint_mlx.base.errors import MintError
from mint_mlx.base.quant_config import KEEP
from mint_mlx.base.units import parse_budget
from mint_mlx.jobs import convert
from mint_mlx.measure.profile import Profile
from mint_mlx.rules.recipes import Recipe, bundled, find_recipe, read_recipe

RECIPES = {  # by family, where it has one of its own
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek",
    "kimi_k2": "deepseek",
    "ernie4_5_moe": "ernie4_5_moe",
    "gpt_oss": "gpt_oss",
    "gpt_oss_bf16": "gpt_oss",
    "minimax_m2": "minimax_m2",
    "mixtral": "mixtral",
    "qwen2_moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3_5_moe": "qwen3_next",
    "qwen3_moe": "qwen3_moe",
    "qwen3_moe_fp8": "qwen3_moe",
    "qwen3_next": "qwen3_next",
}


def test_bundled_recipes_say_something_and_serve_each_family_once() -> None:
    read = {name: read_recipe(path) for name, path in bundled().items()}
    assert all(recipe.name == name for name, recipe in read.items())
    for name, recipe in read.items():
        assert name == "default" or recipe.rules or recipe.modes or recipe.references, name
        assert name == "default" or recipe.serves
    served = Counter(family for recipe in read.values() for family in recipe.serves)
    assert not [family for family, times in served.items() if times > 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_finds_its_recipe(family: str) -> None:
    config = json.loads((RELEASED / family / "config.json").read_text())
    assert find_recipe(None, config).name == RECIPES.get(family, "default")


def test_rules_hold_in_plans(tmp_path: Path) -> None:
    if not known("deepseek_v3"):
        pytest.skip("this mlx-lm has no such family")
    model = released("deepseek_v3", tmp_path / "model")
    result = convert.convert(str(model), "5bpw", tmp_path / "out", smoke=False)
    roles = {layer.path: layer.role for layer in result.inventory.layers}
    latents = [config for path, config in result.plan.choice.items() if roles[path] == "mla"]
    assert result.plan.recipe == "deepseek"
    assert latents
    assert all(config.bits >= 6 for config in latents)

    # Without the family's rules they get fewer bits.
    free = convert.convert(str(model), "5bpw", tmp_path / "free", recipe="default", smoke=False)
    assert any(config.bits < 6 for path, config in free.plan.choice.items() if roles[path] == "mla")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nabout: b\nserve: [llama]\n", "line 3: serve: a recipe has no such key"),
        ("name: a\nabout: b\ncandidates: many\n", "line 3: candidates"),
        (
            "name: a\nabout: b\nrules:\n- {roles: [ruter], reason: x}\n",
            "line 4.*no role is called 'ruter'",
        ),
        (
            "name: a\nabout: b\nrules:\n- {roles: [head], floor: 8, ceiling: 4, reason: x}\n",
            "line 4.*above a ceiling",
        ),
        ("name: a\nabout: b\nrules:\n- {roles: [head], floor: 8}\n", "reason"),
        ("name: a\nabout: b\nname: c\n", "line 3: 'name' is given twice"),
        (
            "name: a\nabout: b\nrules:\n- {roles: [head], floor: 7, ceiling: 7, reason: x}\n",
            "no bits for the role head",
        ),
        (
            "name: a\nabout: b\nrules:\n- {roles: [head], keep: true, ceiling: 4, reason: x}\n",
            "a ceiling forbids",
        ),
        (
            "name: a\nabout: b\nrules:\n- {roles: [router], ceiling: 4, reason: x}\n",
            "breaks the guard",
        ),
        ("name: a\nabout: b\npriors: {roles: {rooter: 3}}\n", "no role is called 'rooter'"),
        ("name: a\nabout: b\nmodes: [fp3]\n", "no mode is called 'fp3'"),
        ("name: a\nabout: b\nobjective: best\n", "no objective is called 'best'"),
    ],
)
def test_a_recipe_that_cannot_be_names_file_and_line(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(MintError, match=message) as refusal:
        read_recipe(path)
    assert str(path) in str(refusal.value)


def test_a_recipe_bounds_roles(curves: Profile) -> None:
    rules = [
        {"roles": ["attention"], "floor": 6, "reason": "r"},
        {"roles": ["head"], "keep": True, "reason": "r"},
        {"roles": ["expert_up"], "ceiling": 4, "reason": "r"},
    ]
    recipe = Recipe.model_validate({"name": "x", "about": "y", "rules": rules, "candidates": "few"})
    plan = allocate(curves, parse_budget("7bpw"), SearchSpace(curves.inventory, recipe))
    assert plan.choice["lm_head"] == KEEP
    assert all(c.bits >= 6 for path, c in plan.choice.items() if "self_attn" in path)
    assert all(c.bits <= 4 for path, c in plan.choice.items() if path.endswith("up_proj"))
    assert all(c.bits in (2, 4, 8, 16) for c in plan.choice.values())


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("name: x\nabout: y\nbits: 4\n", 3, "no such key"),
        (
            "name: x\nabout: y\nrules:\n- roles: [chef]\n  reason: r\n",
            4,
            "no role is called 'chef'",
        ),
        ("name: x\nabout: y\nobjective: best\n", 3, "no objective"),
        ("name: x\nabout: y\nsqnr_floor: .nan\n", 3, "number"),
        (
            "name: x\nabout: y\nrules:\n- {roles: [head], reason: r, floor: 8, ceiling: 4}\n",
            4,
            "lies above",
        ),
        ("name: x\nabout: y\npriors: {first_block: -1}\n", 3, "greater than 0"),
        ("name: [\n", 2, "recipe"),
        ("a: &a [1]\nb: *a\n", 2, "aliases"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int, problem: str
) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(MintError, match=rf"line {line}.*{problem}"):
        find_recipe(str(tmp_path / "r.yaml"), {})
