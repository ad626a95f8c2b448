"""Speeds of plans: measured, limited, told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import Cli, Maker, order_for, qwen3_moe

from mint_mlx.allocation.pace import Goal, parse_goal
from mint_mlx.allocation.plan_file import plan_text, read_plan
from mint_mlx.allocation.search_space import list_candidates, search_space
from mint_mlx.allocation.sweep import sweep
from mint_mlx.base.errors import MintError, UsageError
from mint_mlx.base.quant_config import QuantConfig
from mint_mlx.jobs import speed_tables
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.dry_run import dry_lines, dry_run
from mint_mlx.jobs.model import prepare
from mint_mlx.jobs.request import Request, check_request
from mint_mlx.jobs.speed import speed
from mint_mlx.jobs.steps import allocate, write_profile
from mint_mlx.runtime.speed_table import (
    Rest,
    SpeedTable,
    Timing,
    covers,
    kind_of,
    model_key,
    predict,
)
from mint_mlx.runtime.speed_table_file import bundled_tables, load_table, save_table


@pytest.fixture
def model(make: Maker) -> Path:
    return make(qwen3_moe(2, 4))


@pytest.fixture
def table(model: Path, tmp_path: Path) -> Path:
    """A machine on which a weight takes a nanosecond, at 3 and 6 bits two."""
    job = prepare(str(model))
    options = list_candidates(search_space(job.inventory, job.recipe))
    kinds = {kind_of(layer): options[layer.path] for layer in job.inventory.layers}
    times = {
        kind: {
            config: {1: Timing(1e-9 * (1 + (config.bits in (3, 6))) * kind.active * kind.shape[1])}
            for config in (*configs, QuantConfig(4, 64), QuantConfig(8, 64))
        }
        for kind, configs in kinds.items()
        if kind is not None
    }
    rests = {model_key(job.inventory): Rest("model", {1: 1e-7})}
    path = tmp_path / "table.json"
    save_table(SpeedTable("a machine", {"mlx": "1"}, times, rests), path)
    return path


def test_a_table_is_measured_once_and_knows_the_checkpoint_too(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed_tables, "SECONDS", 0.5)
    measured = speed(str(model), context=64, save=tmp_path / "speed.json")
    assert set(measured.speeds) >= {"uniform 4bit-g64", "uniform 8bit-g64"}

    # Its checkpoint has the same layers, however they are stored.
    monkeypatch.setattr(speed_tables, "measure_table", lambda *_, **__: pytest.fail("again"))
    convert(str(model), uniform="4bit-g64", out=tmp_path / "out", smoke=False)
    again = speed(str(tmp_path / "out"), context=64)
    assert again.table == load_table(tmp_path / "speed.json")
    assert again.speeds["as stored"] == again.speeds["uniform 4bit-g64"]
    with pytest.raises(MintError, match="exists"):
        speed(str(model), save=tmp_path / "speed.json")


def test_a_conversion_measures_where_nothing_is_known(
    model: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = load_table(table)
    monkeypatch.setattr(speed_tables, "measure_table", lambda *_, **__: known)
    result = convert(str(model), "6.5bpw", tmp_path / "out", min_speed=1, smoke=False)
    assert result.plan.speed is not None and result.plan.speed_goal == "1 tokens/s"


def test_a_plan_keeps_a_least_speed(model: Path, table: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    write_profile(str(model), profile)
    free = allocate(profile, "6.5bpw", speed_table=str(table))
    assert free.plan.speed is not None and free.plan.speed_goal is None
    wanted = free.plan.speed.tokens_per_second * 1.15
    fast = allocate(profile, f"{free.bytes}B", speed_table=str(table), min_speed=wanted)
    assert fast.bytes <= free.bytes
    assert fast.plan.speed is not None and fast.plan.speed.tokens_per_second >= wanted
    assert fast.plan.loss is not None and free.plan.loss is not None
    assert fast.plan.loss >= free.plan.loss

    # The file says it, and is read as it was written.
    text = plan_text(fast.plan, fast.inventory)
    (tmp_path / "plan.yaml").write_text(text)
    read = read_plan(tmp_path / "plan.yaml")
    assert read.speed is not None
    assert read.speed.tokens_per_second == pytest.approx(wanted, rel=0.2)
    assert read.speed_goal == fast.plan.speed_goal
    assert plan_text(replace(fast.plan, speed=None), fast.inventory) == "".join(
        line for line in text.splitlines(keepends=True) if not line.startswith("speed:")
    )

    with pytest.raises(MintError, match=r"at most .* tokens/s are possible there"):
        allocate(profile, "6.5bpw", speed_table=str(table), min_speed=1e9)
    with pytest.raises(MintError, match="nothing is known of how fast"):
        allocate(profile, "6.5bpw", min_speed=10)


def test_a_sweep_has_a_second_curve_and_a_map(
    model: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in (("sweep", "POINTS"), ("speed_map", "SIZES"), ("speed_map", "SPEEDS")):
        monkeypatch.setattr(f"mint_mlx.allocation.{module}.{name}", 2 if name != "POINTS" else 4)
    profile = tmp_path / "profile.json"
    write_profile(str(model), profile)
    curve = sweep(profile, speed_table=str(table))
    assert all(point.speed is not None for point in curve.points)
    best = [point for point in curve.map if point.best]
    assert best
    for point in best:
        assert not any(
            other != point
            and other.bytes <= point.bytes
            and other.tokens_per_second >= point.tokens_per_second
            and other.loss <= point.loss
            for other in curve.map
        )
    assert sweep(profile).map == ()


def test_a_conversion_tells_its_speed(model: Path, table: Path, tmp_path: Path, cli: Cli) -> None:
    words = ["convert", str(model), "--effort", "fast", "--speed-table", str(table)]
    sizes = cli(*words)
    assert "tokens/s" in sizes.out
    out = tmp_path / "out"
    ran = cli(*words, "--budget", "6.5bpw", "--speed", "0.9x", "-o", str(out), "--json")
    said = json.loads(ran.out)["predicted_speed"]
    assert said["machine"] == "a machine"
    assert "- decodes: " in (out / "README.md").read_text()
    plan = read_plan(out / "mint-plan.yaml")
    assert plan.speed_goal == "0.9x of uniform 4bit-g64"

    # It holds what it says.
    loaded = load_table(table)
    inventory = prepare(str(model)).inventory
    assert covers(loaded, inventory)
    speed = predict(loaded, inventory, plan.choice, 8192)
    assert speed.tokens_per_second == pytest.approx(said["tokens_per_second"])


def test_a_dry_run_and_fit_tell_speeds(model: Path, cli: Cli) -> None:
    order = order_for(Request(str(model), "6.5bpw", speed_table="M4-Pro"))
    plan, run = dry_run(order)
    assert run.speed is not None and run.speed.estimated
    assert "estimated for Apple M4 Pro" in "\n".join(dry_lines(order.job, plan, run))
    ran = cli("convert", str(model), "--fit", "32GiB", "--dry-run")
    assert "Apple M4 " in ran.out and "Apple M5 Max" not in ran.out
    with pytest.raises(MintError, match="nothing is known of how fast"):
        dry_run(order_for(Request(str(model), "6.5bpw", min_speed=1)))


@pytest.mark.parametrize(
    ("name", "gibibytes", "chip"),
    [
        ("Apple M4", 24, "M4"),
        ("Apple M4 Max", 36, "M4 Max 32-core"),
        ("Apple M4 Max", 64, "M4 Max"),
        ("Apple M4 Max", 40, "M4 Max 32-core"),
        ("2 cores of AMD EPYC", 24, None),
    ],
)
def test_the_chip_of_this_mac(
    monkeypatch: pytest.MonkeyPatch, name: str, gibibytes: int, chip: str | None
) -> None:
    monkeypatch.setattr(speed_tables, "machine_name", lambda: name)
    monkeypatch.setattr(speed_tables, "machine_memory", lambda: gibibytes << 30)
    known = speed_tables.this_chip()
    assert (known.name if known else None) == chip


def test_the_tables_that_come_with_the_package_are_sound() -> None:
    tables = [load_table(path) for path in bundled_tables().values()]
    assert tables
    assert all(table.machine and table.rests and not table.estimated for table in tables)


def test_words_of_speed_are_checked() -> None:
    assert parse_goal(None, None) is None
    assert parse_goal(40, None) == Goal("40 tokens/s", tokens_per_second=40)
    assert parse_goal(None, "0.95x") == Goal("0.95x of uniform 4bit-g64", ratio=0.95)
    for least, ratio in (
        (40.0, "1x"),
        (0.0, None),
        (float("nan"), None),
        (None, "95"),
        (None, "0x"),
    ):
        with pytest.raises(UsageError):
            parse_goal(least, ratio)
    for request in (
        Request("m", "smallest", speed="1x"),
        Request("m", uniform="4bit-g64", min_speed=40),
        Request("m", "4bpw", speed_table="M9"),
    ):
        with pytest.raises(UsageError):
            check_request(request)
