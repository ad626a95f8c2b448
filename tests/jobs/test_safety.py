"""Nothing is lost and nothing half-made looks whole: bad sources, precious folders, ends that were
cut short.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers import Maker, Notes, llama, qwen3_moe

from mint_mlx.base.errors import MintError, UsageError, explain
from mint_mlx.base.files import atomic_write, write_arrays
from mint_mlx.checkpoint.source import load_source
from mint_mlx.converters.output import shard_writer, write
from mint_mlx.jobs.convert import convert

Weights = dict[str, mx.array]


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    weights = change(dict(mx.load(str(folder / "model.safetensors"))))
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def spoil_weight(folder: Path, name: str, value: float) -> None:
    def spoil(weights: Weights) -> Weights:
        weights[name][3, 4] = value
        return weights

    edit_weights(folder, spoil)


def spoil_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def cut_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:500])


def spoil_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for %}")


def spoil_text_config(folder: Path) -> None:
    edit_config(folder, text_config="x")


def say_gptq(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq"})


def spoil_link(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("blobs/gone")


def int8(folder: Path) -> None:
    edit_weights(folder, lambda w: w | {"lm_head.weight": w["lm_head.weight"].astype(mx.int8)})


def extra_tensor(folder: Path) -> None:
    edit_weights(folder, lambda w: w | {"model.surprise": mx.zeros((2,))})


def spoil_weights(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)


def spoil_type(folder: Path) -> None:
    edit_config(folder, model_type="no_such_model")


def spoil_shape(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=7)


def spoil_depth(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=10**6)


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def spoil_fields(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def bring_code(folder: Path) -> None:
    edit_config(folder, model_file="evil.py")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (spoil_tokenizer, "no tokenizer"),
        (cut_tokenizer, "tokenizer of model cannot be read"),
        (spoil_template, "chat template"),
        (spoil_text_config, "text_config"),
        (say_gptq, "quantized with GPTQ"),
        (spoil_link, "not a regular file"),
        (int8, "lm_head has weights of type I8"),
        (extra_tensor, "model.surprise"),
        (spoil_weights, "truncated"),
        (spoil_type, "no model of type 'no_such_model'"),
        (spoil_depth, "num_hidden_layers is 1000000"),
        (spoil_shape, "cannot build"),
        (spoil_config, "not valid JSON"),
        (spoil_fields, "cannot build"),
        (bring_code, "code of its own"),
    ],
)
def test_bad_sources_are_refused_and_leave_nothing(
    make: Maker, tmp_path: Path, spoil: Any, problem: str
) -> None:
    folder = make(llama(2))
    spoil(folder)
    with pytest.raises(MintError, match=problem):
        convert(str(folder), "5bpw", tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def test_force_deletes_nothing_but_our_own_checkpoints(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(llama(1), "proj/src")
    (tmp_path / "proj" / "thesis").write_text("")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "notes")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    before = sorted(p for p in tmp_path.rglob("*") if "cache" not in p.parts)
    for target in (
        "proj/src",
        "proj",
        "notes",
        "link",
        "gone",
        "file",
        ".",
        "..",
        "a[1]",
        "x" * 250,
        "no/parent",
        "",
    ):
        with pytest.raises(MintError):
            convert(str(source), "5bpw", target, smoke=False, force=True)
    assert sorted(p for p in tmp_path.rglob("*") if "cache" not in p.parts) == before


def test_a_work_folder_with_other_files_is_left_alone(make: Maker, tmp_path: Path) -> None:
    source = str(make(llama(1)))
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "gold").write_text("")
    (tmp_path / "other.partial").write_text("")
    for name in ("out", "other"):
        with pytest.raises(MintError, match="rename it"):
            convert(source, "5bpw", tmp_path / name, smoke=False)
    assert (tmp_path / "out.partial" / "gold").exists() and (tmp_path / "other.partial").is_file()


def test_a_neighbour_with_a_like_name_is_left_alone(make: Maker, tmp_path: Path) -> None:
    source = str(make(llama(1)))
    for name in ("out.replaced-notes", "out.replaced-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "diary").write_text("")
    convert(source, "5bpw", tmp_path / "old", smoke=False)
    (tmp_path / "old").rename(tmp_path / "out.replaced-3")  # as a killed run leaves it
    convert(source, "5bpw", tmp_path / "out", smoke=False)
    assert {p.name for p in tmp_path.glob("out*")} == {
        "out",
        "out.replaced-notes",
        "out.replaced-2",
    }


def test_a_file_system_without_locks_stops_nothing(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    convert(str(make(llama(1))), "5bpw", tmp_path / "out", smoke=False)
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_path_that_mlx_lm_cannot_handle_is_refused_from_inside_too(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(llama(1), "a[1]/model")
    monkeypatch.chdir(tmp_path / "a[1]")
    with pytest.raises(MintError, match="rename it"):
        convert("model", "5bpw", tmp_path / "out", smoke=False)


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
        more = more | {"plan": convert(source, "5bpw", tmp_path / "made", smoke=False).plan}
    with pytest.raises(UsageError, match="leave"):
        convert(source, out=tmp_path / "out", smoke=False, **more)


def test_a_folder_that_appears_meanwhile_is_left_alone(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def appear(*args: Any) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("")

    monkeypatch.setattr(write, "verify", appear)
    with pytest.raises(MintError, match="exists already"):
        convert(str(make(llama(1))), "5bpw", tmp_path / "out", smoke=False)
    assert (tmp_path / "out" / "precious").exists()


def test_an_end_that_was_cut_short_is_resumed(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    folder = str(make(llama(1)))
    with monkeypatch.context() as patch:
        patch.setattr(write, "verify", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, "5bpw", tmp_path / "out", smoke=False)
    assert (tmp_path / "out.partial" / "model.safetensors").is_file()
    monkeypatch.setattr(
        shard_writer.Writer, "put", lambda *_: pytest.fail("nothing is left to write")
    )
    convert(folder, "5bpw", tmp_path / "out", smoke=False)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_result_that_cannot_generate_gets_no_name(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlx_lm

    def fail(*args: Any, **kwargs: Any) -> str:
        raise TypeError("unsupported operand")

    monkeypatch.setattr(mlx_lm, "generate", fail)
    with pytest.raises(MintError, match="cannot generate"):
        convert(str(make(qwen3_moe(1))), "5bpw", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_code_that_a_checkpoint_brings_is_never_run_and_never_asked_about(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ran = make(qwen3_moe(1)), tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    edit_config(
        folder,
        auto_map={
            "AutoConfig": "own.Own",
            "AutoModelForCausalLM": "own.Own",
            "AutoTokenizer": "own.Own",
        },
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    for effort in ("fast", "balanced"):
        convert(str(folder), "5bpw", tmp_path / effort, effort=effort)
    assert not ran.exists()


@pytest.mark.parametrize("how", [{"budget": "5bpw"}, {"uniform": "4bit-g64"}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(
    make: Maker, tmp_path: Path, how: dict[str, str], value: float
) -> None:
    folder = make(llama(1))
    name = "model.layers.0.self_attn.q_proj.weight"
    spoil_weight(folder, name, value)
    with pytest.raises(MintError, match=name):
        convert(str(folder), out=tmp_path / "out", smoke=False, **how)


def test_a_plan_from_another_model_names_the_model_that_was_converted(
    make: Maker, tmp_path: Path
) -> None:
    folder = make(llama(1))
    convert(str(folder), "5bpw", tmp_path / "a", smoke=False)
    plan = (
        (tmp_path / "a" / "mint-plan.yaml").read_text().replace("name: model", "name: Qwen/Other")
    )
    (tmp_path / "plan.yaml").write_text(plan)
    convert(str(folder), plan=str(tmp_path / "plan.yaml"), out=tmp_path / "b", smoke=False)
    assert "Qwen/Other" not in (tmp_path / "b" / "README.md").read_text()
    assert "Qwen/Other" not in (tmp_path / "b" / "mint-plan.yaml").read_text()


def test_a_wrong_name_costs_no_profile(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mint_mlx.jobs.convert.get_profile", lambda *_: pytest.fail("profiled before checking")
    )
    folder = str(make(llama(1)))
    for wrong in (
        {"objective": "nosuch"},
        {"quantizer": "nosuch"},
        {"overrides": ["nosuch=4bit-g64"]},
    ):
        with pytest.raises(MintError, match="nosuch"):
            convert(folder, "5bpw", tmp_path / "out", **wrong)


def test_a_cache_that_cannot_be_written_stops_nothing(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINT_MLX_CACHE", str(tmp_path / "file"))
    convert(str(make(llama(1))), "5bpw", tmp_path / "out", smoke=False)
    assert (tmp_path / "out" / "config.json").is_file()


def test_what_the_floor_forbids_costs_no_sensitivity(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mint_mlx.jobs.convert.get_sensitivity", lambda *_: pytest.fail("measured before checking")
    )
    folder = make(llama(1))
    with pytest.raises(MintError, match="safety floor of 9 dB"):
        convert(str(folder), "2.9bpw", tmp_path / "out", effort="balanced")
    spoil_weight(folder, "model.layers.0.mlp.down_proj.weight", float("nan"))
    with pytest.raises(
        MintError, match=r"down_proj\.weight holds NaN"
    ):  # by name, not as an overflow after it
        convert(str(folder), "5bpw", tmp_path / "out", effort="balanced")


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('a system message comes first') }}", "{{ '' }}"]
)
def test_a_template_that_wants_more_than_a_message_stops_nothing(
    make: Maker, tmp_path: Path, template: str
) -> None:
    folder, notes = make(llama(1)), Notes()
    (folder / "chat_template.jinja").write_text(template)
    result = convert(str(folder), "5bpw", tmp_path / "out", report=notes)
    assert result.sentence is None and any(
        "no sentence is generated" in note for note in notes.said
    )


def test_a_snapshot_is_called_by_its_repository(make: Maker) -> None:
    made = make(llama(1), "models--org--some--name")
    folder = made / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    for file in [f for f in made.iterdir() if f.is_file()]:
        file.rename(folder / file.name)
    assert load_source(str(folder)).name == "org/some--name"


def test_a_disk_that_is_full_says_so_whoever_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def full(*args: Any, **more: Any) -> None:
        raise SafetensorError("I/O (os error 28)")

    by_mlx = RuntimeError("[write] Unable to write 4096 bytes to file.")
    by_numpy = OSError("524288 requested and 261088 written")
    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space left") as by_safetensors:
        write_arrays(tmp_path / "x.safetensors", {})
    errors = (OSError(28, "x"), by_numpy, by_safetensors.value, by_mlx)
    assert all(str(explain(error)).startswith("the disk is full") for error in errors)


def test_what_is_written_whole_leaves_nothing_when_it_fails(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_text("old")
    with pytest.raises(OSError, match="full"), atomic_write(tmp_path / "x.npz") as partial:
        partial.write_text("half")
        raise OSError(28, "full")
    assert [f.name for f in tmp_path.iterdir()] == ["x.npz"] and (
        tmp_path / "x.npz"
    ).read_text() == "old"
