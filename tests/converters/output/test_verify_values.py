"""The last check compares values with the source's, so that a wrong checkpoint gets no name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from families import write_family
from helpers import TOKENS, Maker, Weights, edit_weights, kl, llama, qwen3_moe

from mint_mlx.base.errors import MintError
from mint_mlx.base.safetensors_header import read_header
from mint_mlx.checkpoint import mlxlm, row_reader
from mint_mlx.checkpoint.layout import Placed, TensorSpec
from mint_mlx.checkpoint.row_reader import Straight
from mint_mlx.checkpoint.source import load_source
from mint_mlx.checkpoint.straight import straight_parameters
from mint_mlx.converters.output import row_file, verify_values
from mint_mlx.converters.output.journal import hash_of
from mint_mlx.converters.output.read_back import read_back
from mint_mlx.converters.output.verify import VerificationError
from mint_mlx.converters.output.verify import verify_values as verify
from mint_mlx.jobs.convert import Result, convert

UP = "model.layers.0.mlp.up_proj"
MULTIPLIED = "model.layers.0.feed_forward.gate_proj.weight"


@pytest.fixture
def falcon(tmp_path: Path) -> Path:
    """A Falcon-H1 as released: its convolutions make `sanitize` multiply weights in place."""
    folder = write_family(tmp_path / "falcon", "falcon_h1")

    def released(weights: Weights) -> Weights:
        return {n: a.swapaxes(1, 2) if "conv1d.weight" in n else a for n, a in weights.items()}

    edit_weights(folder, released)
    return folder


def test_what_sanitize_multiplies_in_place_is_not_straight(falcon: Path) -> None:
    straight = straight_parameters(falcon)
    assert MULTIPLIED not in straight
    assert MULTIPLIED.replace("gate", "up") in straight
    stored = mx.load(str(falcon / "model.safetensors"))
    model = mlxlm.build_model(falcon)
    for name, ((_, tensor, _),) in straight.items():
        array = model
        for part in name.split("."):
            array = array[int(part)] if part.isdigit() else array[part]
        assert mx.array_equal(array, stored[tensor]), name


def test_the_multipliers_of_falcon_h1_are_in_the_result(falcon: Path, tmp_path: Path) -> None:
    result = convert(str(falcon), uniform="8bit-g32", out=tmp_path / "out", smoke=False)
    assert kl(falcon, result.path, TOKENS) < 1e-3


def test_a_reader_that_misses_a_factor_is_noticed(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Straight.load

    def twice(self: Straight, source: Any, layer: Any, rows: slice) -> Any:
        read = load(self, source, layer, rows)
        return read * 2 if layer.path == UP else read

    monkeypatch.setattr(row_reader.Straight, "load", twice)
    with pytest.raises(VerificationError, match=f"{UP} was written with an NMSE of 1"):
        convert(str(make(llama(1))), uniform="4bit-g64", out=tmp_path / "out", smoke=False)
    with pytest.raises(VerificationError, match=f"{UP} was written with other values"):
        convert(str(make(llama(1))), uniform="keep", out=tmp_path / "kept", smoke=False)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "kept").exists()


def check(source: Path, result: Result, allow_nonfinite: bool = False) -> None:
    """The last check of a result as it is now on the disk, in whatever order its tensors are."""
    name = "model.safetensors"
    header, start = read_header(result.path / name)
    places = {
        tensor: Placed(TensorSpec(tensor, info.dtype, info.shape), 0, start + info.start)
        for tensor, info in header.items()
    }
    with (result.path / name).open("rb") as file:
        hashes = {n: hash_of(file.fileno(), p.offset, p.spec.nbytes) for n, p in places.items()}
    layout = replace(result.plan.layout(result.inventory), names=(name,), tensors=places)
    choice = result.plan.choice
    read_back(result.path, layout, hashes, choice, result.inventory, allow_nonfinite)
    verify(load_source(str(source)), result.path, result.plan, result.inventory)


def test_experts_that_changed_places_are_noticed(make: Maker, tmp_path: Path) -> None:
    source = make(qwen3_moe(1))
    result = convert(str(source), uniform="4bit-g64", out=tmp_path / "out", smoke=False)
    check(source, result)

    def swapped(weights: Weights) -> Weights:
        prefix = "model.layers.0.mlp.switch_mlp.up_proj"
        names = [name for name in weights if name.startswith(prefix)]
        return weights | {name: weights[name][::-1] for name in names}

    edit_weights(result.path, swapped)
    with pytest.raises(VerificationError, match=r"up_proj was written .*, expert 0"):
        check(source, result)


def test_rows_stored_before_the_shards_were_dropped_are_compared(
    make: Maker, tmp_path: Path
) -> None:
    source = load_source(str(make(llama(1))))
    result = convert(str(source.path), uniform="4bit-g64", out=tmp_path / "out", smoke=False)
    inventory, work = result.inventory, tmp_path / "work"
    work.mkdir()
    order = inventory.order
    for rank, wave in enumerate((order[:3], order[3:5])):
        row_file.store_rows(work, rank, verify_values.source_rows(source, inventory, wave))
    row_file.store_rows(work, 0, verify_values.source_rows(source, inventory, order[5:]))
    assert {path for path, _ in row_file.stored_rows(work)} == {
        layer.path for layer in inventory.layers
    }

    def compare() -> None:
        gone = replace(source, has_weights=False, path=tmp_path / "gone")
        rows = row_file.stored_rows(work)
        verify(gone, result.path, result.plan, inventory, rows=rows)

    compare()
    edit_weights(result.path, lambda w: w | {f"{UP}.scales": w[f"{UP}.scales"] * 3})
    with pytest.raises(VerificationError, match=f"{UP} was written with an NMSE"):
        compare()


def test_of_a_large_source_one_layer_of_each_name_is_compared(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = load_source(str(make(llama(3))))
    job = convert(str(source.path), uniform="4bit-g64", smoke=False, out=source.path.parent / "o")
    assert len(list(verify_values._chosen(source, job.inventory))) == len(job.inventory.layers)
    monkeypatch.setattr(verify_values, "WHOLE", 0)
    chosen = [layer.path for layer in verify_values._chosen(source, job.inventory)]
    assert UP in chosen
    assert UP.replace("0", "1") not in chosen


def test_infinite_numbers_are_noticed(make: Maker, tmp_path: Path) -> None:
    source = make(llama(1))
    result = convert(str(source), uniform="4bit-g64", out=tmp_path / "out", smoke=False)

    def spoiled(weights: Weights) -> Weights:
        weights[f"{UP}.scales"][1, 0] = float("inf")
        return weights

    edit_weights(result.path, spoiled)
    with pytest.raises(MintError, match=f"{UP}.scales would hold NaN or infinite"):
        check(source, result)
    check(source, result, allow_nonfinite=True)


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [("mxfp4", "scales", 255), ("nvfp4", "scales", 0x7F), ("4bit-g64", "scales", 3e38)],
)
def test_codes_that_stand_for_infinite_weights_are_noticed(
    make: Maker, tmp_path: Path, config: str, name: str, value: float
) -> None:
    source = make(llama(1))
    result = convert(str(source), uniform=config, out=tmp_path / "out", smoke=False)

    def spoiled(weights: Weights) -> Weights:
        weights[f"{UP}.{name}"][1, 0] = value
        return weights

    edit_weights(result.path, spoiled)
    with pytest.raises(MintError, match=f"{UP} would hold NaN or infinite"):
        check(source, result)


@pytest.mark.parametrize(
    ("config", "value"), [("mxfp4", 1e-38), ("mxfp4", 2e-39), ("mxfp8", 1e-36), ("mxfp8", 3e-38)]
)
def test_groups_whose_scales_mlx_wraps_around_are_refused(
    config: str, value: float, make: Maker, tmp_path: Path
) -> None:
    source = make(llama(1))

    def small(weights: Weights) -> Weights:
        weights[f"{UP}.weight"][0, :32] = value
        return weights

    edit_weights(source, small)
    for quantizer in ("rtn", "search-gptq"):
        with pytest.raises(MintError, match=f"{UP} has weights too small .* scales of {config}"):
            convert(
                str(source),
                uniform=config,
                quantizer=quantizer,
                out=tmp_path / quantizer,
                smoke=False,
            )


def test_huge_weights_that_a_scale_cannot_hold_are_refused(make: Maker, tmp_path: Path) -> None:
    source = make(llama(1))

    def huge(weights: Weights) -> Weights:
        weights[f"{UP}.weight"][0, :2] = mx.array([3e38, -3e38])
        return weights

    edit_weights(source, huge)
    with pytest.raises(MintError, match=f"{UP} has weights .* give --override '{UP}=keep'"):
        convert(str(source), uniform="4bit-g64", out=tmp_path / "out", smoke=False)


def test_rows_of_zeros_agree(make: Maker, tmp_path: Path) -> None:
    source = make(qwen3_moe(1))

    def zeroed(weights: Weights) -> Weights:
        zeros = {n: mx.zeros_like(a) for n, a in weights.items() if "experts.1." in n}
        return weights | zeros

    edit_weights(source, zeroed)
    result = convert(str(source), uniform="4bit-g64", out=tmp_path / "out", smoke=False)
    other = replace(result.plan, choice=dict(result.plan.choice))
    verify(load_source(str(source)), result.path, other, result.inventory)
    assert np.isfinite(kl(source, result.path, TOKENS))
