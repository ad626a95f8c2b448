"""The levels of effort: what each looks at and how it rounds, and conversions that were
interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import DEFAULT, TOKENS, Cli, Maker, Notes, llama, qwen3_moe

from mint_mlx.base.errors import MintError, UsageError
from mint_mlx.cli import tables
from mint_mlx.converters.output import replace_tensors
from mint_mlx.converters.quantizers import distil
from mint_mlx.converters.quantizers.inputs import Moments
from mint_mlx.jobs import convert, dry_run, measurements, steps
from mint_mlx.jobs.model import prepare
from mint_mlx.jobs.request import Request, place_order
from mint_mlx.measure import sensitivity
from mint_mlx.measure.sensitivity import Sensitivity, measure
from mint_mlx.measure.sensitivity_file import load_sensitivity
from mint_mlx.rules import efforts
from mint_mlx.runtime import runner


def test_balanced_is_what_people_get(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efforts, "DEFAULT", DEFAULT)
    plan = convert.convert(str(make(llama(1))), "5bpw", tmp_path / "out", smoke=False).plan
    assert (plan.effort, plan.objective, plan.quantizer) == ("balanced", "fisher-gptq", "gptq")


def test_balanced_beats_fast_on_a_trained_model(
    demo_model: Path, demo_text: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efforts, "TOKENS", 4096)
    text = mx.array(demo_text)
    source = runner.load_runner(demo_model).model(text)
    source = source - mx.logsumexp(source, axis=-1, keepdims=True)
    divergence = {}
    for effort in ("fast", "balanced"):
        convert.convert(str(demo_model), "4bpw", tmp_path / effort, effort=effort, smoke=False)
        logits = runner.load_runner(tmp_path / effort).model(text)
        logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        divergence[effort] = float(
            mx.mean(mx.sum(mx.exp(source) * (source - logp), axis=-1)).item()
        )
    assert divergence["balanced"] < 0.75 * divergence["fast"]


def test_what_is_said_before_a_sensitivity_is_what_comes_after_it(
    demo_model: Path, tmp_path: Path
) -> None:
    """Experts' lower floor holds for a dry run too, though what errors cost isn't known yet."""
    profile = measurements.get_profile(prepare(str(demo_model)))
    traces = {layer.path: np.ones(layer.as_experts[0]) for layer in profile.inventory.layers}
    weights = Sensitivity(profile.origin, np.zeros((1, 1), np.int32), "", traces)
    for budget in ("smallest", "0.88MB"):
        order = place_order(
            Request(str(demo_model), budget, out=tmp_path / "out", effort="balanced")
        )
        plan, said = dry_run.dry_run(order)
        made = convert.choose_plan(order, lambda: profile, lambda: weights)
        assert said.profiled and not said.settled and plan.objective == "prior"
        assert said.bytes <= 880_000 and (
            budget != "smallest" or said.bytes == made.layout(profile.inventory).total
        )
        text = "\n".join(dry_run.dry_lines(order.job, plan, said))
        assert "by errors alone" in text and ("(exact)" in text) == (budget == "smallest")
        fixed = place_order(Request(str(demo_model), plan=made, out=tmp_path / "out"))
        assert dry_run.dry_run(fixed)[1].settled and "Gaussian" not in str(
            dry_run.dry_lines(fixed.job, made, said)
        )
    sizes = tables.size_table(Request(str(demo_model), effort="balanced"))[1]
    assert sizes[0].bytes < 880_000


def test_a_sensitivity_goes_along_with_its_plan(cli: Cli, make: Maker, tmp_path: Path) -> None:
    """By the command that `allocate CHECKPOINT` prints, and by `--plan CHECKPOINT`."""
    source, result = str(make(qwen3_moe(2, 4))), tmp_path / "result"
    convert.convert(source, "5bpw", result, effort="balanced", tokens=1024, smoke=False)
    allocated = cli("allocate", result, "--budget", "6bpw", "-o", tmp_path / "p.yaml")
    assert allocated.code == 0
    assert f"--plan {tmp_path / 'p.yaml'} --sensitivity {result}" in allocated.out
    tokens, measured = load_sensitivity(result / "mint-sensitivity.npz")
    passed_on = place_order(Request(source, plan=str(result), out=tmp_path / "a")).own
    assert passed_on is not None
    assert passed_on[0].size == tokens.size == 1024
    assert passed_on[1].content == measured.content

    # Neither with the plan's file alone nor to another model.
    plan = str(result / "mint-plan.yaml")
    assert place_order(Request(source, plan=plan, out=tmp_path / "b")).own is None
    other = str(make(qwen3_moe(2, 4), "other", seed=1))
    assert place_order(Request(other, plan=str(result), out=tmp_path / "c")).own is None


def test_a_dry_run_says_what_is_spilled(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, needed = str(make(qwen3_moe(2, 4))), []
    monkeypatch.setattr(
        sensitivity, "check_space", lambda folder, size, instead: needed.append(size)
    )
    request = Request(
        source, "5bpw", out=tmp_path / "out", effort="balanced", tokens=1024, force=True
    )
    before = dry_run.dry_run(place_order(request))[1].spilled
    convert.carry_out(place_order(request), smoke=False)
    assert needed == [before] and before > 0
    assert dry_run.dry_run(place_order(request))[1].spilled == 0


@pytest.mark.parametrize("tokens", [-5, 256, 1023])
def test_too_little_text_is_refused(make: Maker, tmp_path: Path, tokens: int) -> None:
    folder = str(make(llama(1)))
    with pytest.raises(UsageError, match="too few"):
        convert.convert(folder, "5bpw", tmp_path / "out", effort="balanced", tokens=tokens)
    with pytest.raises(UsageError, match="too few"):
        steps.write_sensitivity(folder, tmp_path / "s.npz", tokens=tokens)


def test_a_sensitivity_is_measured_once(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(qwen3_moe(1)))
    first = convert.convert(folder, "5bpw", tmp_path / "a", effort="balanced", smoke=False)
    monkeypatch.setattr("mint_mlx.measure.sensitivity.measure", None)
    again = convert.convert(folder, "5bpw", tmp_path / "b", effort="balanced", smoke=False)
    assert first.plan.choice == again.plan.choice
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_the_steps_do_what_the_whole_job_does(make: Maker, tmp_path: Path) -> None:
    folder = str(make(qwen3_moe(1)))
    whole = convert.convert(folder, "5bpw", tmp_path / "whole", effort="balanced", smoke=False)
    profile, _ = steps.write_profile(folder, tmp_path / "p.json")
    sensitivity, _ = steps.write_sensitivity(folder, tmp_path / "s.npz")
    plan, _ = steps.plan_profile(profile, "5bpw", sensitivity=sensitivity)
    assert plan.objective == "fisher-gptq" and plan.choice == whole.plan.choice
    assert (plan.effort, plan.quantizer) == ("balanced", "gptq")
    again = convert.convert(folder, plan=plan, out=tmp_path / "again", smoke=False)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "again")]
    assert again.bytes == whole.bytes and files[0] == files[1]


def test_what_feedback_does_not_know_is_said(make: Maker, tmp_path: Path) -> None:
    folder, notes = str(make(llama(1))), Notes()
    more: dict[str, Any] = {"effort": "balanced", "overrides": ["up_proj=mxfp4"], "smoke": False}
    convert.convert(folder, "6bpw", tmp_path / "out", report=notes, **more)
    assert any("mxfp4" in note and note.endswith("rounded to nearest: 1") for note in notes.said)


def test_fewer_tokens_are_what_is_looked_at(make: Maker, tmp_path: Path) -> None:
    folder = str(make(qwen3_moe(1)))
    made = convert.convert(
        folder, "5bpw", tmp_path / "out", effort="balanced", tokens=1024, smoke=False
    )
    sensitivity = load_sensitivity(made.path / "mint-sensitivity.npz")
    assert sensitivity.tokens.size == 1024
    alone, _ = steps.write_sensitivity(folder, tmp_path / "s.npz", tokens=1024)
    np.testing.assert_array_equal(load_sensitivity(alone).tokens, sensitivity.tokens)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"budget": "5bpw", "effort": "fast", "tokens": 2048}, "--tokens is of no use"),
        (
            {"budget": "5bpw", "effort": "balanced", "tokens": 2048, "sensitivity": "s.npz"},
            "either --sensitivity or --tokens",
        ),
        ({"budget": "5bpw", "effort": "heroic"}, "--effort heroic is unknown"),
        ({"budget": "5bpw", "quantizer": "awq"}, "no quantizer is called 'awq'"),
    ],
)
def test_levels_that_cannot_be(make: Maker, more: dict[str, Any], message: str) -> None:
    with pytest.raises(MintError, match=message):
        convert.convert(str(make(llama(1))), **more)


# in the second block, and where the head alone is left
@pytest.mark.parametrize(("effort", "units"), [("balanced", 14), ("best", 14), ("best", 99)])
def test_an_interrupted_conversion_goes_on_to_the_same_bytes(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, effort: str, units: int
) -> None:
    from mint_mlx.converters.output.shard_writer import Writer

    folder = str(make(qwen3_moe(2)))
    convert.convert(folder, "5bpw", tmp_path / "whole", effort=effort, smoke=False)
    put, left = Writer.put, [units]
    if units == 99:
        left = [len(prepare(folder).inventory.order) - 1]

    def stop(self: Writer, unit: str, tensors: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        put(self, unit, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "put", stop)
        with pytest.raises(KeyboardInterrupt):
            convert.convert(folder, "5bpw", tmp_path / "out", effort=effort, smoke=False)
    assert (tmp_path / "out.partial").is_dir()
    convert.convert(folder, "5bpw", tmp_path / "out", effort=effort, smoke=False)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]
    assert not list((tmp_path / "out").glob("scratch-*"))


@pytest.mark.parametrize("when", ["refining", "distilling", "rewriting", "verifying", "crashed"])
def test_an_interruption_at_the_end_of_best_loses_nothing(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    folder, whole = str(make(qwen3_moe(2))), distil.refine

    def gained(*args: Any, **more: Any) -> distil.Refined:
        found = whole(*args, **more)
        return distil.Refined({name: a * 1.0625 for name, a in found.tensors.items()}, 1.0, 0.5)

    monkeypatch.setattr("mint_mlx.converters.quantizers.distil.refine", gained)
    convert.convert(folder, "5bpw", tmp_path / "whole", effort="best", smoke=False)

    looks: list[int] = []

    def stop(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    places = {
        "refining": "mint_mlx.converters.quantizers.distil.predict",
        "rewriting": "mint_mlx.converters.output.write.replace_tensors",
    }
    with monkeypatch.context() as patch:
        if when == "distilling":
            note = distil._note
            patch.setattr(
                "mint_mlx.converters.quantizers.distil._note", lambda *args: (note(*args), stop())
            )
        elif when in ("verifying", "crashed"):
            put = replace_tensors.replace_tensors
            patch.setattr(
                "mint_mlx.converters.output.write.replace_tensors",
                lambda *args: (put(*args), stop()),
            )
        else:
            patch.setattr(places[when], stop)
        with pytest.raises(KeyboardInterrupt):
            convert.convert(folder, "5bpw", tmp_path / "out", effort="best", smoke=False)
    if when == "crashed":  # the machine: a shard's data had not reached the disk
        shard = next((tmp_path / "out.partial").glob("model*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:1000])
    else:
        for place in ("learn_model", "learn_turns"):  # nothing is learned again
            monkeypatch.setattr(f"mint_mlx.converters.quantizers.{place}.learn", stop)
    if when == "distilling":  # nor does the source predict again, nor is the first step done again
        monkeypatch.setattr("mint_mlx.converters.quantizers.distil.predict", stop)
        monkeypatch.setattr(
            "mint_mlx.converters.quantizers.distil._note",
            lambda place, optimizer, figures, *rest: looks.append(figures[0]),
        )
    convert.convert(folder, "5bpw", tmp_path / "out", effort="best", smoke=False)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1] and looks == [2] * (when == "distilling")
    assert not list((tmp_path / "out").glob("scratch-*"))


def test_layers_that_no_block_follows_don_t_end_the_walk(make: Maker) -> None:
    job = prepare(str(make(qwen3_moe(2))))
    made = measure(job.source, job.inventory, TOKENS, "random", batch=2)
    moments = Moments(job.source, job.inventory, made)
    assert moments.of("model.embed_tokens") is not None
    assert moments.of("model.layers.0.mlp.switch_mlp.down_proj") is not None
    assert moments.of("model.layers.1.mlp.gate") is not None
    assert moments.of("lm_head") is not None


def test_sizes_after_a_sensitivity_without_a_profile(demo_model: Path) -> None:
    from mint_mlx.cli import tables
    from mint_mlx.jobs.request import Request

    measurements.get_sensitivity(prepare(str(demo_model)))
    _, rows = tables.size_table(Request(str(demo_model), effort="balanced"))
    assert len(rows) > 3 and rows[0].loss is None


def test_a_card_says_what_was_seen(make: Maker, tmp_path: Path) -> None:
    folder = str(make(llama(1)))
    for number, (more, text) in enumerate(
        [
            ({"uniform": "4bit-g64", "quantizer": "gptq"}, "text that the model wrote itself"),
            ({"uniform": "4bit-g64"}, "weights only"),
            (
                {"budget": "5bpw", "effort": "balanced", "objective": "nmse", "quantizer": "rtn"},
                "weights only",
            ),
            (
                {"budget": "5bpw", "effort": "fast", "objective": "fisher"},
                "text that the model wrote itself",
            ),
        ]
    ):
        convert.convert(folder, out=tmp_path / str(number), smoke=False, **more)
        assert text in (tmp_path / str(number) / "README.md").read_text()


def test_a_sensitivity_replaces_nothing_else(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "mine.npz").write_text("precious")
    (tmp_path / "dir.npz").mkdir()
    np.savez(tmp_path / "other.npz", head=np.array("{}"))
    folder = str(make(llama(1)))
    for name in ("mine.npz", "other.npz", "dir.npz", "nowhere/s.npz"):
        with pytest.raises(MintError):
            steps.write_sensitivity(folder, tmp_path / name)
    assert (tmp_path / "mine.npz").read_text() == "precious"
    np.savez(tmp_path / "old.npz", head=np.array('{"mint_mlx_sensitivity": 1}'))
    path, _ = steps.write_sensitivity(folder, tmp_path / "old.npz")  # of another version, but ours
    assert load_sensitivity(path).tokens.size == efforts.TOKENS


def test_what_cannot_be_kept_is_measured_once(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mint_mlx.measure.sensitivity as module

    measured: list[int] = []
    true = module.measure
    monkeypatch.setattr(module, "measure", lambda *a, **k: measured.append(1) or true(*a, **k))
    monkeypatch.setattr("mint_mlx.jobs.measurements.save_sensitivity", _full)
    convert.convert(str(make(llama(1))), "5bpw", tmp_path / "out", effort="balanced", smoke=False)
    assert measured == [1]


def _full(*_: Any) -> None:
    raise OSError(28, "No space left on device")
