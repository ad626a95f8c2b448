"""The last check of a conversion: files, parameters and configurations are those of the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import Maker, edit_config, llama

from mint_mlx.base.errors import MintError
from mint_mlx.base.quant_config import QuantConfig
from mint_mlx.converters.output.journal import hash_of
from mint_mlx.converters.output.read_back import read_back
from mint_mlx.converters.output.verify import VerificationError, verify
from mint_mlx.jobs.convert import Result, convert

PATH = "model.layers.0.mlp.up_proj"


@pytest.fixture
def result(make: Maker, tmp_path: Path) -> Result:
    """A conversion that was verified."""
    return convert(str(make(llama(1))), uniform="4bit-g64", out=tmp_path / "out", smoke=False)


def check(result: Result) -> None:
    verify(result.path, result.plan, result.inventory, result.plan.layout(result.inventory))


def cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)


def other_type(folder: Path) -> None:
    """Let the header state another type of a norm, in as many bytes."""
    file = folder / "model.safetensors"
    before, name, after = file.read_bytes().partition(b'"model.norm.weight"')
    assert b'"BF16"' in after[:100]
    file.write_bytes(before + name + after.replace(b'"BF16"', b'"F16" ', 1))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (cut, "has 20000 bytes instead of"),
        (other_type, "norm.weight was loaded as .*core.float16.* plan says .*bfloat16"),
    ],
)
def test_bytes_and_types_that_differ_are_noticed(
    result: Result, spoil: Callable[[Path], None], problem: str
) -> None:
    check(result)
    spoil(result.path)
    with pytest.raises(VerificationError, match=problem):
        check(result)


def test_a_plan_that_says_something_else_is_noticed(result: Result) -> None:
    plan = replace(result.plan, choice=result.plan.choice | {PATH: QuantConfig(8, 64)})
    with pytest.raises(VerificationError, match=r"bytes instead of|the plan says"):
        check(replace(result, plan=plan))


def test_a_config_that_mlx_lm_cannot_load_is_noticed(result: Result) -> None:
    edit_config(result.path, quantization=None, quantization_config=None)
    with pytest.raises((MintError, VerificationError)):
        check(result)


def test_a_byte_that_is_read_back_differently_is_noticed(result: Result) -> None:
    layout = result.plan.layout(result.inventory)
    shard = result.path / layout.names[0]

    def read(hashes: dict[str, str]) -> None:
        read_back(result.path, layout, hashes, result.plan.choice, result.inventory)

    with shard.open("r+b") as file:
        places = layout.tensors.items()
        hashes = {n: hash_of(file.fileno(), p.offset, p.spec.nbytes) for n, p in places}
        read(hashes)
        with pytest.raises(VerificationError, match=r"lm_head.weight was not written"):
            read(dict.fromkeys(hashes.keys() - {"lm_head.weight"}, ""))

        file.seek(layout.tensors["lm_head.weight"].offset)
        file.write(b"\0\1")
        file.flush()
        with pytest.raises(MintError, match=r"lm_head.weight .* is not what was written"):
            read(hashes)
