"""Orders: a request held against its model, this machine and the folders that are there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers import Maker, Notes, llama, order_for

from mint_mlx.allocation.plan import Plan
from mint_mlx.base.errors import MintError
from mint_mlx.jobs import dry_run
from mint_mlx.jobs.convert import carry_out, convert
from mint_mlx.jobs.model import Job
from mint_mlx.jobs.request import Request
from mint_mlx.runtime import memory


def test_a_budget_beyond_this_machine_is_said(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Notes()
    request = Request(str(make(llama(1))), budget="100MB")
    order_for(request, notes)
    assert len(notes.said) == 1
    assert "more than the largest size of this model" in notes.said[0]
    monkeypatch.setattr(memory, "machine_memory", lambda: 1000)
    order_for(request, notes)
    assert any("more than this machine can run" in note for note in notes.said)


def test_an_edited_plan_above_its_budget_is_said(make: Maker, plan: Plan, job: Job) -> None:
    total = plan.layout(job.inventory).total
    for budget, count in ((total, 0), (total - 1, 1)):
        notes = Notes()
        edited = replace(plan, edited=True, first_budget=budget)
        order_for(Request(str(job.source.path), plan=edited), notes)
        assert sum("more than the budget of" in note for note in notes.said) == count


def test_a_budget_below_the_floor_is_said_before_the_profile(make: Maker) -> None:
    notes = Notes()
    order = order_for(Request(str(make(llama(2))), budget="2.55bpw"), notes)
    assert notes.said == []
    with pytest.raises(MintError, match="safety floor"):
        carry_out(order, report=notes)
    assert "probably refused once errors are measured" in notes.said[0]


def test_a_quantized_cache_that_leaves_less_is_told_of(demo_model: Path) -> None:
    """Its scores are written out, which the fused attention does without."""
    notes = Notes()
    for bits, count in ((None, 0), (8, 1)):
        request = Request(str(demo_model), fit="8GiB", context=32768, kv_bits=bits)
        assert order_for(request, notes).fit is not None
        assert sum("without --kv-bits" in note for note in notes.said) == count


def test_a_plan_on_file_is_found_wanting_no_folder_until_it_is_carried_out(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(make(llama(1)))
    result = convert(folder, "5bpw", smoke=False)
    order = order_for(Request(folder, plan=result.plan))
    assert dry_run.dry_run(order)[1].bytes == result.bytes
    with pytest.raises(MintError, match="exists already"):
        carry_out(order)
