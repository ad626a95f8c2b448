"""Requests: words that cannot be carried out are refused, without any work."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import Maker, llama

from mint_mlx.base.distributed import Ranks
from mint_mlx.base.errors import MintError, UsageError
from mint_mlx.jobs import request
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.request import Request


@pytest.mark.parametrize(
    "more",
    [
        {"uniform": "4bit-g64", "effort": "best"},
        {"uniform": "4bit-g64", "objective": "mint"},
        {"uniform": "4bit-g64", "sample": "0.5"},
        {"plan": "PLAN", "recipe": "default"},
    ],
)
def test_what_would_say_nothing_is_refused(
    make: Maker, tmp_path: Path, more: dict[str, Any]
) -> None:
    source = str(make(llama(1)))
    if "plan" in more:
        more = more | {"plan": convert(source, "5bpw", tmp_path / "first", smoke=False).plan}
    with pytest.raises(UsageError, match="leave"):
        convert(source, out=tmp_path / "out", smoke=False, **more)


def test_a_wrong_name_costs_no_profile(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = partial(pytest.fail, "profiled before checking")
    monkeypatch.setattr("mint_mlx.jobs.convert.get_profile", lambda *_: refuse())
    folder = str(make(llama(1)))
    for wrong in (
        {"objective": "nosuch"},
        {"quantizer": "nosuch"},
        {"overrides": ["nosuch=4bit-g64"]},
    ):
        with pytest.raises(MintError, match="nosuch"):
            convert(folder, "5bpw", tmp_path / "out", **wrong)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"budget": "5bpw", "effort": "fast", "tokens": 2048}, "--tokens has no effect"),
        (
            {"budget": "5bpw", "effort": "balanced", "tokens": 2048, "sensitivity": "s.npz"},
            "either --sensitivity or --tokens",
        ),
        ({"budget": "5bpw", "effort": "heroic"}, r"\(got heroic\)"),
        ({"budget": "5bpw", "quantizer": "awq"}, "no quantizer is called 'awq'"),
    ],
)
def test_levels_that_cannot_be(make: Maker, more: dict[str, Any], message: str) -> None:
    with pytest.raises(MintError, match=message):
        convert(str(make(llama(1))), **more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"fit": "huge"}, r"--fit must be this-mac.*huge"),
        ({"fit": "4.5bpw"}, "--fit must be this-mac"),
        ({"fit": "1GiB"}, "nothing is left for the weights"),
        ({"fit": "32GiB", "context": 0}, "a context of 0 tokens"),
        ({"fit": "32GiB", "kv_bits": 7}, r"--kv-bits must be one of 2, 3, 4, 5, 6, 8 \(got 7\)"),
        ({"fit": "32GiB", "budget": "1GB"}, "exactly one of"),
    ],
)
def test_fits_that_cannot_be(make: Maker, more: dict[str, Any], message: str) -> None:
    with pytest.raises(MintError, match=message):
        convert(str(make(llama(1))), **more)


def test_several_machines_take_the_quantizer_that_they_can_share(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(llama(1)))
    order = partial(Request, folder, budget="5bpw")
    assert request.check_request(order(effort="balanced")).quantizer == "search-gptaq"
    monkeypatch.setattr(request, "ranks", lambda: Ranks(0, 2))
    assert request.check_request(order(effort="balanced")).quantizer == "search-gptq"
    for refused, instead in (
        (order(effort="balanced", quantizer="search-gptaq"), "--quantizer search-gptq"),
        (order(effort="best"), "--effort balanced"),
    ):
        with pytest.raises(UsageError, match=f"machines can't share: give {instead}"):
            request.check_request(refused)
