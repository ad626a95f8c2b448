"""Comparisons at equal bytes: the peer sets the size, what was made is kept, a damaged model comes
last.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from families import write_family
from helpers import OLD_MLX_LM, Maker, Notes, llama, qwen3_moe, run_cli

from mint_mlx.base.errors import MintError, UsageError
from mint_mlx.cli import compare as command
from mint_mlx.converters.output import write
from mint_mlx.converters.output.shard_writer import Writer
from mint_mlx.converters.quantizers import memory_estimate
from mint_mlx.eval import compare as comparing
from mint_mlx.eval import peer_methods, peers, report, stats
from mint_mlx.eval.compare import baseline, compare
from mint_mlx.eval.methods import OURS
from mint_mlx.eval.settings import Settings
from mint_mlx.eval.suite import read_suite
from mint_mlx.jobs import convert
from mint_mlx.jobs.model import prepare
from mint_mlx.measure import cache


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    letters = np.random.default_rng(0).choice(list("abcdefgh ijkl"), 1500)
    (tmp_path / "scored.txt").write_text("".join(letters))
    (tmp_path / "baseline.txt").write_text("".join(reversed(letters)))
    return Settings(length=64, windows=8, text=str(tmp_path / "scored.txt"))


def by_method(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in rows}


def test_ours_meets_each_peer_at_its_bytes(make: Maker, tmp_path: Path, settings: Settings) -> None:
    folder = str(make(qwen3_moe(2)))
    found = compare(
        folder, ["4.8bpw"], ["nmse", "uniform-g64", "mixed_4_6"], settings=settings, speed=False
    )
    for peer in (row for row in found.rows if row["kind"] == "peer"):
        ours = [
            row for row in found.rows if row["kind"] == "ours" and row["group"] == peer["group"]
        ]
        assert len(ours) == 1 and ours[0]["bytes"] <= peer["bytes"] <= 1.01 * ours[0]["bytes"]
    assert {row["method"] for row in found.rows} == {"nmse", "uniform-g64", "mixed_4_6"}
    for size in {row["group"] for row in found.rows}:
        scored = [row for row in found.rows if row["group"] == size]
        assert [row["rank"] for row in scored] == list(range(1, len(scored) + 1))
        assert [row["kl"] for row in scored] == sorted(row["kl"] for row in scored)
    paths = report.save(found, tmp_path / "out", "mint-mlx compare ...")
    assert [path.name for path in paths] == ["results.json", "table.md", "plot.png"]
    rows = json.loads(paths[0].read_text())["rows"]
    wanted = {
        "method",
        "bytes",
        "bits_per_weight",
        "seconds",
        "perplexity",
        "kl",
        "kl_se",
        "ln_ppl_difference_ci95",
    }
    assert all(wanted <= row.keys() for row in rows)
    assert paths[1].read_text().count("\n| 1 |") == len({row["group"] for row in rows})
    assert paths[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("where", [(), ("-o", "file/results")])
def test_a_file_in_the_place_of_the_results_is_refused_at_once(
    where: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "model-compare").touch()
    assert run_cli(monkeypatch, "compare", "nowhere/model", "--budget", "5bpw", *where) == 1
    assert "is a file: give a folder with -o" in capsys.readouterr().err


def test_recipes_are_built_near_the_budget_only(make: Maker, settings: Settings) -> None:
    folder, notes = str(make(qwen3_moe(2))), Notes()
    names = ["mixed_2_6", "mixed_4_6"]
    (row,) = compare(folder, ["4.8bpw"], names, settings=settings, speed=False, report=notes).rows
    job = prepare(folder)
    assert row["bytes"] == pytest.approx(
        peers.recipe_size(job.source, job.inventory, "mixed_4_6"), rel=0.03
    )
    assert any("mixed_2_6 has no size near" in said for said in notes.said)


def test_what_cannot_be_looked_at_is_a_row_that_says_so(
    make: Maker, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little memory, and blocks that form no chain."""
    other = str(write_family(tmp_path / "gpt2", "gpt2"))
    row = by_method(
        compare(other, ["6bpw"], ["fast", "balanced"], settings=settings, speed=False).rows
    )
    assert "same of it as fast" in row["balanced"]["reason"] and "kl" in row["fast"]
    monkeypatch.setattr(memory_estimate, "machine_memory", lambda: 10_000_000)
    (small,) = compare(
        str(make(llama(1))), ["5bpw"], ["balanced"], settings=settings, speed=False
    ).rows
    assert "of memory" in small["reason"] and "--methods" in small["reason"]


def test_a_given_checkpoint_whose_config_changed_is_scored_anew(
    make: Maker, tmp_path: Path, settings: Settings
) -> None:
    folder, given = str(make(llama(1))), tmp_path / "given"
    convert.convert(folder, uniform="4bit-g64", out=given, smoke=False)
    kl = []
    for theta in (10_000.0, 10.0):
        config = json.loads((given / "config.json").read_text()) | {
            "rope_theta": theta,
            "rope_parameters": None,
        }
        (given / "config.json").write_text(json.dumps(config))
        kl += [compare(folder, [], ["fast"], [str(given)], settings=settings, speed=False).rows]
    assert by_method(kl[0])["given"]["kl"] < 0.9 * by_method(kl[1])["given"]["kl"]


def test_part_of_the_scored_text_is_no_baseline(tmp_path: Path, settings: Settings) -> None:
    scored = (tmp_path / "scored.txt").read_text()
    short_lines = "\n".join(scored[i : i + 50] for i in range(0, len(scored), 50))
    (tmp_path / "short.txt").write_text(short_lines)
    for text in ("x" + scored, scored[200:700], "y" * 100_000 + scored):
        (tmp_path / "b.txt").write_text(text)
        with pytest.raises(MintError, match="proves nothing"):
            baseline(str(tmp_path / "b.txt"), settings)
    with pytest.raises(MintError, match="proves nothing"):
        baseline(str(tmp_path / "short.txt"), replace(settings, text=str(tmp_path / "short.txt")))
    assert baseline(str(tmp_path / "baseline.txt"), settings)


def test_a_second_run_does_only_what_is_new(
    make: Maker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(llama(2)))
    first = compare(folder, ["5bpw"], ["nmse", "uniform-g64"], settings=settings, speed=False)
    scored: list[str] = []
    score = comparing.score_model
    monkeypatch.setattr(
        comparing, "score_model", lambda source, *a: scored.append(source.name) or score(source, *a)
    )
    second = compare(
        folder, ["5bpw"], ["nmse", "uniform-g64", "mixed_4_6"], settings=settings, speed=False
    )
    assert sorted(scored) == ["mixed_4_6", "nmse"]  # the new peer, and ours at its size
    kl = by_method([r for r in first.rows if r["kind"] == "peer"])["uniform-g64"]["kl"]
    assert by_method([r for r in second.rows if r["kind"] == "peer"])["uniform-g64"]["kl"] == kl


def test_what_was_interrupted_goes_on(
    make: Maker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, written = str(make(llama(2))), []
    put = Writer.put

    def counted(self: Writer, unit: str, tensors: Any) -> None:
        written.append(unit)
        if len(written) == 5:
            raise KeyboardInterrupt
        put(self, unit, tensors)

    monkeypatch.setattr(Writer, "put", counted)
    with pytest.raises(KeyboardInterrupt):
        compare(folder, ["5bpw"], ["balanced"], settings=settings, speed=False)
    compare(folder, ["5bpw"], ["balanced"], settings=settings, speed=False)
    assert sorted(written) == sorted(
        [*set(written), written[4]]
    )  # but for the one that was cut short, each once


def test_what_was_made_but_not_noted_is_taken(
    make: Maker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(llama(1)))
    first = compare(folder, ["5bpw"], ["nmse"], settings=settings, speed=False)
    for note in cache.cache_dir().rglob("made.json"):
        note.unlink()
    monkeypatch.setattr(Writer, "put", lambda *_: pytest.fail("it was made anew"))
    assert (
        compare(folder, ["5bpw"], ["nmse"], settings=settings, speed=False).rows[0]["kl"]
        == first.rows[0]["kl"]
    )


def test_a_full_disk_is_no_lasting_reason(
    make: Maker, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(llama(1)))

    def full(*_: Any) -> None:
        raise MintError("the disk has 1 B free")

    with monkeypatch.context() as patch:
        patch.setattr(write, "check_space", full)
        first = compare(folder, ["5bpw"], ["nmse"], settings=settings, speed=False)
    assert by_method(first.rows)["nmse"]["reason"] == "the disk has 1 B free"
    second = compare(folder, ["5bpw"], ["nmse"], settings=settings, speed=False)
    assert by_method(second.rows)["nmse"]["kl"] > 0


def test_differences_are_paired_by_window() -> None:
    """Two checkpoints that are alike in hard windows and in easy ones: their own spread doesn't
    count.
    """
    theirs = [1.0, 2.0, 3.0, 4.0]
    difference, interval = stats.paired([0.9, 1.8, 2.9, 3.8], theirs)
    half = 3.182 * np.std([0.1, 0.2, 0.1, 0.2], ddof=1) / 2  # Student's t of three degrees, 97.5 %
    assert difference == pytest.approx(-0.15)
    assert interval == pytest.approx([-0.15 - half, -0.15 + half])
    assert stats.paired([1.0], [2.0]) == (-1.0, None)
    rows = [
        {"method": name, "kind": kind, "group": 1, "kl": float(np.mean(kl)), "window_kl": kl}
        for name, kind, kl in (
            ("ours", "ours", [0.9, 1.8]),
            ("a", "peer", [3.0, 2.0]),
            ("b", "peer", [2.0, 2.0]),
        )
    ]
    comparing._rank(rows)
    assert [row["rank"] for row in rows] == [1, 3, 2]
    assert {row["best_peer"] for row in rows} == {"b"} and rows[0][
        "kl_difference"
    ] == pytest.approx(-0.65)


def test_a_shuffled_layer_is_ranked_last(make: Maker, tmp_path: Path, settings: Settings) -> None:
    folder = make(llama(2))
    convert.convert(str(folder), "5bpw", tmp_path / "good", smoke=False)
    convert.convert(str(folder), "5bpw", tmp_path / "shuffled", smoke=False)
    file = tmp_path / "shuffled" / "model.safetensors"
    weights = dict(mx.load(str(file)))
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name][mx.array(np.random.default_rng(0).permutation(128))]
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
    given = [str(tmp_path / "shuffled"), str(tmp_path / "good")]
    found = compare(str(folder), [], ["fast", "mint"], given, settings=settings, speed=False)
    assert max(found.rows, key=lambda row: row["kl"])["method"] == "shuffled"
    assert by_method(found.rows)["good"]["kl"] == pytest.approx(
        by_method(found.rows)["fast"]["kl"], rel=0.05
    )


@pytest.mark.skipif(OLD_MLX_LM, reason="mlx-lm 0.31's own gptq fails on MoEs")
def test_calibrated_peers_run_and_what_cannot_run_says_why(
    make: Maker, tmp_path: Path, settings: Settings
) -> None:
    folder = str(make(qwen3_moe(1, experts=8)))
    methods = ["balanced", "gptq", "gptq-guarded", "feedback", "awq", "dynamic_quant"]
    found = compare(
        folder, ["5bpw"], methods, (), str(tmp_path / "baseline.txt"), settings, speed=False
    )
    rows = by_method(found.rows)
    assert "qwen3_moe" in rows["awq"]["reason"] and "kl" not in rows["awq"]
    assert all(
        rows[m]["sees_text"] and rows[m]["kl"] > 0
        for m in ("gptq", "gptq-guarded", "feedback", "dynamic_quant")
    )
    assert rows["balanced"]["kl"] > 0 and not rows["balanced"]["sees_text"]
    checkpoints = {
        p.parent.name.rpartition("-")[0]: p for p in (tmp_path / "cache").rglob("checkpoint")
    }
    for method, router in (("gptq", 4), ("gptq-guarded", 8)):
        scales = {
            a.dtype
            for n, a in mx.load(str(checkpoints[method] / "model.safetensors")).items()
            if "scales" in n
        }
        assert scales == {mx.bfloat16}
        inventory = prepare(str(checkpoints[method])).inventory
        stored = {layer.role: layer.stored for layer in inventory.layers}
        assert stored["router"] is not None and stored["router"].bits == router
    table = report.markdown(found, "x")
    assert "awq" in table.split("Not run:")[1]
    assert "| balanced | own text |" in table and "| gptq | text |" in table


@pytest.mark.skipif(OLD_MLX_LM, reason="mlx-lm 0.31's own dwq fails here")
def test_dwq_runs(
    make: Maker, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_methods, "DWQ_RATES", (1e-4,))
    (tmp_path / "baseline.txt").write_text("jackdaws love my big sphinx of quartz " * 60)
    found = compare(
        str(make(qwen3_moe(1))),
        ["5bpw"],
        ["nmse", "dwq"],
        (),
        str(tmp_path / "baseline.txt"),
        settings,
        speed=False,
    )
    assert by_method(found.rows)["dwq"]["kl"] > 0


def test_a_checkpoint_of_another_model_is_a_row_with_a_reason(
    make: Maker, settings: Settings
) -> None:
    source = str(make(qwen3_moe(1)))
    other = str(make(llama(1), "other"))
    found = compare(source, ["5bpw"], ["nmse"], [other], settings=settings, speed=False)
    assert "not the same model" in by_method(found.rows)["other"]["reason"]
    assert "kl" in by_method(found.rows)["nmse"]


def test_a_float32_source_gives_no_peer_float32_scales(
    make: Maker, tmp_path: Path, settings: Settings
) -> None:
    folder = make(llama(1), dtype=mx.float32)
    config = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    compare(str(folder), ["5bpw"], ["uniform-g64", "mixed_4_6"], settings=settings, speed=False)
    for made in (tmp_path / "cache").rglob("checkpoint"):
        assert mx.float32 not in {
            a.dtype for a in mx.load(str(made / "model.safetensors")).values()
        }


def test_without_a_baseline_text_calibrated_peers_are_listed(
    make: Maker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "best",
        "balanced",
        "fast",
        "nmse",
        "mint",
    ):  # at every peer's size they would take minutes
        monkeypatch.delitem(OURS, name)
    found = compare(str(make(llama(1))), ["5bpw"], settings=settings, speed=False)
    assert {row["method"] for row in found.rows if "reason" in row} >= set(peers.CALIBRATED)
    assert all(row["group"] for row in found.rows)


def test_generation_speed_stands_beside_uniform(make: Maker, settings: Settings) -> None:
    found = compare(str(make(llama(1))), ["5bpw"], ["nmse"], settings=settings)
    row = by_method(found.rows)["nmse"]
    assert (
        row["decode_tokens_per_second"] > 0
        and row["prompt_tokens_per_second"] > 0
        and row["decode_ratio"] > 0
    )


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ({"budgets": ["5bpw"], "methods": ["magic"]}, "no method is called 'magic'"),
        ({"budgets": ["5bpw"], "methods": [""]}, "no method is called ''"),
        ({"budgets": []}, "--budget"),
        ({"budgets": ["5bpw"], "methods": ["gptq"]}, "--baseline-text"),
        ({"budgets": ["5bpw"], "baseline_text": "SCORED"}, "proves nothing"),
        ({"budgets": ["5bpw"], "given": ["nowhere"]}, "nowhere does not exist"),
        ({"budgets": ["5"]}, "no unit"),
    ],
)
def test_wrong_calls_are_refused(
    make: Maker, settings: Settings, call: dict[str, Any], problem: str
) -> None:
    if "baseline_text" in call:
        call = call | {"baseline_text": settings.text}
    with pytest.raises((MintError, UsageError), match=problem):
        compare(str(make(llama(1))), **call, settings=settings, speed=False)


def test_a_suite_gives_models_of_one_name_a_folder_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[str] = []
    monkeypatch.setattr(command, "_compare", lambda *args: folders.append(args[-1].name) or {})
    entries = "".join(
        f"- {{model: {model}, budgets: [5bpw]}}\n"
        for model in ("org/tiny", "mirror/tiny", "org/other")
    )
    (tmp_path / "s.yaml").write_text(entries)
    assert run_cli(monkeypatch, "compare", "--suite", str(tmp_path / "s.yaml")) == 0
    assert folders == ["tiny-1", "tiny-2", "other"]


def test_suites(tmp_path: Path) -> None:
    shipped = Path(comparing.__file__).parent / "paper.yaml"
    assert {e.model for e in read_suite(shipped)} >= {
        "Qwen/Qwen3-30B-A3B",
        "mistralai/Mixtral-8x7B-v0.1",
    }
    (tmp_path / "s.yaml").write_text("- model: a/b\n  budgets: [5bpw]\n  sizes: 3\n")
    with pytest.raises(MintError, match="line 3"):
        read_suite(tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_text("model: a/b\n")
    with pytest.raises(MintError, match="must be a list"):
        read_suite(tmp_path / "s.yaml")
