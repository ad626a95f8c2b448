"""Comparisons at equal bytes: the peer sets the size, and a damaged model comes last."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from families import write_family
from helpers import Maker, Notes, llama, qwen3_moe
from scoring import by_method

from mint_mlx.base.errors import MintError, UsageError
from mint_mlx.converters.quantizers import memory_estimate
from mint_mlx.eval import compare as comparing
from mint_mlx.eval import report
from mint_mlx.eval.compare import baseline, compare
from mint_mlx.eval.methods import names_of_given
from mint_mlx.eval.report import cells
from mint_mlx.eval.settings import Settings
from mint_mlx.jobs import convert
from mint_mlx.measure import cache

IN_EACH_ROW = {
    "method",
    "bytes",
    "bits_per_weight",
    "seconds",
    "perplexity",
    "kl",
    "kl_se",
    "ln_ppl_difference_ci95",
}


def test_ours_meets_each_peer_at_its_bytes(
    make: Maker, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(qwen3_moe(2)))
    score = comparing._score

    def scored(bench: comparing.Bench, *more: Any) -> dict[str, Any]:
        with pytest.raises(MintError, match="another run uses `compare`"):
            cache.clear(["compare"])
        return score(bench, *more)

    monkeypatch.setattr(comparing, "_score", scored)
    methods = ["nmse", "uniform-g64", "mixed_4_6"]
    comparison = compare(folder, ["4.8bpw"], methods, settings=settings, speed=False)
    rows = comparison.rows
    assert {row["method"] for row in rows} == set(methods)
    for peer in (row for row in rows if row["kind"] == "peer"):
        same_size = [row for row in rows if row["group"] == peer["group"]]
        (ours,) = (row for row in same_size if row["kind"] == "ours")
        assert ours["bytes"] <= peer["bytes"] <= 1.01 * ours["bytes"]

    # Rows come by size, then by KL.
    sizes = {row["group"] for row in rows}
    for size in sizes:
        same_size = [row for row in rows if row["group"] == size]
        assert [row["rank"] for row in same_size] == list(range(1, len(same_size) + 1))
        assert [row["kl"] for row in same_size] == sorted(row["kl"] for row in same_size)

    paths = report.save(comparison, tmp_path / "out", "mint-mlx compare ...")
    assert [path.name for path in paths] == ["results.json", "table.md", "plot.png"]
    results, table, picture = paths
    assert all(row.keys() >= IN_EACH_ROW for row in json.loads(results.read_text())["rows"])
    assert table.read_text().count("\n| 1 |") == len(sizes)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_a_row_that_says_so(
    make: Maker, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that form no chain, and too little memory."""
    other = str(write_family(tmp_path / "gpt2", "gpt2"))
    methods = ["fast", "balanced"]
    rows = by_method(compare(other, ["6bpw"], methods, settings=settings, speed=False).rows)
    assert "same of it as fast" in rows["balanced"]["reason"]
    assert "kl" in rows["fast"]

    monkeypatch.setattr(memory_estimate, "machine_memory", lambda: 10_000_000)
    folder = str(make(llama(1)))
    (row,) = compare(folder, ["5bpw"], ["balanced"], settings=settings, speed=False).rows
    assert "of memory" in row["reason"]
    assert "--methods" in row["reason"]


def test_a_given_checkpoint_whose_config_changed_is_scored_anew(
    make: Maker, tmp_path: Path, settings: Settings
) -> None:
    folder = str(make(llama(1)))
    given = tmp_path / "given"
    convert.convert(folder, uniform="4bit-g64", out=given, smoke=False)
    config = json.loads((given / "config.json").read_text()) | {"rope_parameters": None}
    kl = []
    for theta in (10_000.0, 10.0):
        (given / "config.json").write_text(json.dumps(config | {"rope_theta": theta}))
        comparison = compare(folder, [], ["fast"], [str(given)], settings=settings, speed=False)
        kl.append(by_method(comparison.rows)["given"]["kl"])
    assert kl[0] < 0.9 * kl[1]


def test_part_of_the_scored_text_is_no_baseline(tmp_path: Path, settings: Settings) -> None:
    scored = (tmp_path / "scored.txt").read_text()
    text = tmp_path / "b.txt"
    for shared in ("x" + scored, scored[200:700], "y" * 100_000 + scored):
        text.write_text(shared)
        with pytest.raises(MintError, match="proves nothing"):
            baseline(str(text), settings)
    assert baseline(str(tmp_path / "baseline.txt"), settings)

    short_lines = tmp_path / "short.txt"
    short_lines.write_text("\n".join(scored[i : i + 50] for i in range(0, len(scored), 50)))
    with pytest.raises(MintError, match="proves nothing"):
        baseline(str(short_lines), replace(settings, text=str(short_lines)))


def test_ranks_and_differences_are_those_of_a_size() -> None:
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
    assert {row["best_peer"] for row in rows} == {"b"}
    assert rows[0]["kl_difference"] == pytest.approx(-0.65)


def test_a_shuffled_layer_is_ranked_last(make: Maker, tmp_path: Path, settings: Settings) -> None:
    folder = str(make(llama(2)))
    good = tmp_path / "good"
    shuffled = tmp_path / "shuffled"
    convert.convert(folder, "5bpw", good, smoke=False)
    convert.convert(folder, "5bpw", shuffled, smoke=False)
    file = str(shuffled / "model.safetensors")
    weights = dict(mx.load(file))
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name][mx.array(np.random.default_rng(0).permutation(128))]
    mx.eval(weights)
    mx.save_safetensors(file, weights, metadata={"format": "mlx"})

    given = [str(shuffled), str(good)]
    comparison = compare(folder, [], ["fast", "mint"], given, settings=settings, speed=False)
    rows = by_method(comparison.rows)
    assert max(comparison.rows, key=lambda row: row["kl"])["method"] == "shuffled"
    assert rows["good"]["kl"] == pytest.approx(rows["fast"]["kl"], rel=0.05)


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_built(
    make: Maker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other = str(make(qwen3_moe(1))), str(make(llama(1), "other"))
    monkeypatch.setattr(comparing, "build", lambda *_: pytest.fail("something is built"))
    with pytest.raises(MintError, match="their model_type is llama and qwen3_moe"):
        compare(source, ["5bpw"], ["nmse"], [other], settings=settings, speed=False)


def test_a_checkpoint_that_is_given_twice_is_ranked_once(
    make: Maker, tmp_path: Path, settings: Settings
) -> None:
    folder = str(make(llama(1)))
    convert.convert(folder, uniform="4bit-g64", out=tmp_path / "given", smoke=False)
    given = [str(tmp_path / "given"), f"{tmp_path}/../{tmp_path.name}/given"]
    comparison = compare(folder, [], ["fast"], given, settings=settings, speed=False)
    assert sorted(row["method"] for row in comparison.rows) == ["fast", "given"]


def test_generation_speed_stands_beside_uniform(
    make: Maker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mint_mlx.eval.speed.UNSTEADY", 10.0)  # this machine has other work
    comparison = compare(str(make(llama(1))), ["5bpw"], ["nmse"], settings=settings)
    row = by_method(comparison.rows)["nmse"]
    assert row["decode_tokens_per_second"] > 0
    assert row["prompt_tokens_per_second"] > 0
    assert row["decode_ratio_lowest"] <= row["decode_ratio"] <= row["decode_ratio_highest"]
    assert cells(row | {"rank": 1}, True)[-1].endswith(f"{row['decode_ratio_highest']:.2f})")


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


def test_what_is_given_has_a_name_of_its_own(tmp_path: Path) -> None:
    places = [tmp_path / "a" / "x.gguf", tmp_path / "b" / "x.gguf", tmp_path / "fast"]
    names = names_of_given([(place.name, place) for place in places])
    assert names == ["a/x.gguf", "b/x.gguf", f"{tmp_path.name}/fast"]
    same = [tmp_path / "a" / "c" / "x", tmp_path / "b" / "c" / "x"]
    assert names_of_given([("x", place) for place in same]) == [str(place) for place in same]


def test_another_tokenizer_builds_anew(make: Maker, settings: Settings) -> None:
    folder = make(llama(1))
    compare(str(folder), ["5bpw"], ["nmse"], settings=settings, speed=False)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab |= {"a": vocab["b"], "b": vocab["a"]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (row,) = compare(str(folder), ["5bpw"], ["nmse"], settings=settings, speed=False).rows
    assert row["kl"] > 0


def test_peers_that_have_no_size_are_told(make: Maker, settings: Settings, tmp_path: Path) -> None:
    folder = str(make(llama(1)))
    convert.convert(folder, uniform="8bit-g32", out=tmp_path / "q", smoke=False)
    notes = Notes()
    given = [str(tmp_path / "q")]
    more = {"given": given, "settings": settings, "speed": False, "report": notes}
    compare(folder, [], ["nmse", "uniform-g64"], **more)
    assert "uniform-g64: built near sizes of --budget only, and none is given" in notes.said
