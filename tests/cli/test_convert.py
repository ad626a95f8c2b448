"""`convert`: sizes, the command to go on with, and the same as the steps one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import Cli, Maker, llama, qwen3_moe

from mint_mlx.rules.efforts import band_text


def test_the_table_of_sizes(cli: Cli, make: Maker) -> None:
    folder = str(make(qwen3_moe(2)))
    sizes = cli("convert", folder)
    assert sizes.code == 2
    for word in ("4.5bpw", "unquantized", "Mac", "No weight has been read"):
        assert word in sizes.out
    assert sizes.out.rstrip().endswith("--budget 4.5bpw")
    large = cli("convert", folder, "--override", "_proj=8bit-g32")  # then 4.5 bits are too few
    assert large.code == 2
    assert large.out.rstrip().endswith("--budget smallest")


def test_a_quantized_cache_is_asked_for_in_the_command_that_is_printed(
    cli: Cli, demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ("--kv-bits", "8", "-o", "out", "--no-smoke", "--effort", "fast")
    ran = cli("convert", demo_model, "--budget", "5bpw", *more)
    assert ran.code == 0
    last = ran.out.splitlines()[-1]
    command = "mlx_lm.generate --model out --kv-bits 8 --quantized-kv-start 0 --prompt"
    assert last == f"{command} 'The history of the city'"


def test_an_expected_kl_is_a_band_in_words_and_in_json(
    cli: Cli, make: Maker, tmp_path: Path
) -> None:
    words = ("convert", make(qwen3_moe(1)), "--budget", "5bpw", "--effort", "balanced")
    told = cli(*words, "-o", tmp_path / "a", "--no-smoke")
    ran = cli(*words, "-o", tmp_path / "b", "--no-smoke", "--json")
    low, high = ran.json["expected_kl_band"]
    assert low < ran.json["expected_kl"] < high
    assert f"expected KL from the source {band_text(ran.json['expected_kl'])} nats" in told.out


def test_the_steps_give_what_convert_gives(
    cli: Cli, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(qwen3_moe(2)))
    monkeypatch.chdir(tmp_path)

    # As one job, and what it and the table of sizes say to do next.
    whole = cli("convert", folder, "--budget", "5bpw", "-o", "whole", "--no-smoke")
    assert whole.code == 0
    last = whole.out.splitlines()[-1]
    assert last == "mlx_lm.generate --model whole --prompt 'The history of the city'"
    sizes = cli("convert", folder, "--effort", "fast")
    assert sizes.code == 2
    assert f"Then: mint-mlx convert {folder} --effort fast --budget 4.5bpw" in sizes.out

    # Step by step: the same weights.
    assert cli("profile", folder, "-o", "p.json").code == 0
    assert cli("allocate", "p.json", "--budget", "5bpw", "-o", "plan.yaml").code == 0
    assert cli("convert", folder, "--plan", "plan.yaml", "-o", "steps", "--no-smoke").code == 0
    weights = [Path(name, "model.safetensors").read_bytes() for name in ("whole", "steps")]
    assert weights[0] == weights[1]

    # The plan in mlx-lm's own form is what config.json says.
    emitted = cli("allocate", "p.json", "--budget", "5bpw", "--emit", "mlx")
    assert emitted.code == 0
    assert emitted.json == json.loads(Path("whole/config.json").read_text())["quantization"]


def test_a_stale_profile_and_a_plan_of_other_weights_are_pointed_out(
    cli: Cli, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(llama(1)))
    monkeypatch.chdir(tmp_path)
    assert cli("profile", folder, "-o", "p.json").code == 0
    assert cli("allocate", "p.json", "--budget", "5bpw", "-o", "plan.yaml").code == 0
    make(llama(1), seed=3)
    converted = cli("convert", folder, "--plan", "plan.yaml", "--no-smoke")
    assert converted.code == 0
    assert "other weights" in converted.err
    profiled = cli("profile", folder, "-o", "p.json")
    assert profiled.code == 0
    assert "stale" in profiled.err
