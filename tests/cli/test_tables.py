"""Tables for people: hints that stand below them."""

from __future__ import annotations

from dataclasses import replace

from helpers import Maker, llama, order_for

from mint_mlx.cli import tables
from mint_mlx.jobs.model import prepare
from mint_mlx.jobs.request import Request
from mint_mlx.runtime.memory import (
    GIB,
    Fit,
    needs,
)


def test_the_wired_limit_is_mentioned_where_it_helps(make: Maker) -> None:
    model = str(make(llama(2)))
    request = Request(model, fit="64GiB")
    assert tables.raise_hint(order_for(request)) is None  # all of it fits anyway
    job = prepare(model)
    beside = needs(job.source.config, job.inventory)
    order = order_for(Request(model, budget="100MB"))
    tight = Fit(64 * GIB, beside.total + 50_000, True, beside)
    hint = tables.raise_hint(replace(order, fit=tight))
    assert hint
    assert "iogpu.wired_limit_mb=57344" in hint
    assert "restart" in hint
