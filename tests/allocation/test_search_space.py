"""Overrides: which layers they match, and what they may not."""

from __future__ import annotations

import pytest

from mint_mlx.allocation.search_space import (
    parse_override,
    search_space,
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
