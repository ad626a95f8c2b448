"""Overrides: which layers they match, and what they may not; sizes that are possible."""

from __future__ import annotations

import pytest

from mint_mlx.allocation.search_space import (
    check_feasible,
    list_candidates,
    parse_override,
    search_space,
    size_range,
)
from mint_mlx.base.errors import MintError, UsageError
from mint_mlx.jobs.model import Job


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("no_such_layer=4bit-g64", "matches no layer"),
        ("down_proj=4bit-g128", "don't divide"),
        ("mlp.gate$=4bit-g64", "--ignore-guards"),
    ],
)
def test_overrides_that_cannot_hold_are_errors(job: Job, override: str, problem: str) -> None:
    with pytest.raises(MintError, match=problem):
        search_space(job.inventory, job.recipe, [parse_override(override)])


@pytest.mark.parametrize(
    "text", ["lm_head", "=4bit-g64", "(=4bit-g64", "x=4bit", "x=7bit-g64", "x=4bit-g48"]
)
def test_malformed_overrides_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError):
        parse_override(text)


@pytest.mark.parametrize("ignore_guards", [False, True])
def test_codes_that_only_a_source_holds_cannot_be_asked_for(job: Job, ignore_guards: bool) -> None:
    asked = parse_override("lm_head=nvfp4-global")
    with pytest.raises(MintError, match=r"lm_head cannot be nvfp4-global: .*makes none$"):
        search_space(job.inventory, job.recipe, [asked], ignore_guards)


def test_a_budget_below_the_only_size_names_it(job: Job) -> None:
    space = search_space(job.inventory, job.recipe, [parse_override(".*=keep")])
    options = list_candidates(space)
    (size,) = set(size_range(job.inventory, options))
    with pytest.raises(MintError, match=rf"no layer has a choice, and all take .*{size}B`"):
        check_feasible(size - 1, job.inventory, options)
    check_feasible(size, job.inventory, options)
