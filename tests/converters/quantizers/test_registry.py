"""Quantizers' entries: facts, a new one end to end, and that no other file knows a name."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from helpers import Maker, Notes, llama, order_for, qwen3_moe

from mint_mlx.allocation.plan_file import read_plan
from mint_mlx.base.errors import UsageError
from mint_mlx.base.files import PLAN_FILE
from mint_mlx.base.quant_config import QuantConfig
from mint_mlx.checkpoint.layers import Layer
from mint_mlx.converters.quantizers import rtn
from mint_mlx.converters.quantizers.protocol import Quantizer, Work
from mint_mlx.converters.quantizers.registry import (
    QUANTIZERS,
    Entry,
    find_quantizer,
    needs_inputs,
)
from mint_mlx.jobs import convert, dry_run
from mint_mlx.jobs.model import prepare
from mint_mlx.jobs.request import Request
from mint_mlx.rules.objectives import OBJECTIVES

ROOT = Path(__file__).parents[3]


def test_every_entry_is_found_by_its_name() -> None:
    for name, entry in QUANTIZERS.items():
        assert find_quantizer(name) is entry
        assert entry.name == name
        assert entry.help
        assert needs_inputs(name) == entry.needs_inputs
        assert not (entry.row_wise and (entry.needs_inputs or entry.sequential))
    assert not needs_inputs("4bit-g64")
    with pytest.raises(UsageError, match="no quantizer is called 'other': there are rtn, search, "):
        find_quantizer("other")


def test_entries_tell_what_a_conversion_takes(make: Maker) -> None:
    """Error feedback takes more than rounding to nearest, learning more than both."""
    inventory = prepare(str(make(qwen3_moe(1)))).inventory
    names = ("rtn", "gptq", "search-gptaq", "learn")
    needed = [QUANTIZERS[name].memory(inventory, 4096, True) for name in names]
    assert needed == sorted(needed)
    assert needed[0] < needed[3]
    assert len({entry.memory(inventory, 4096, False) for entry in QUANTIZERS.values()}) == 1
    stages = {name: entry.seconds(inventory, 4096, 1e9) for name, entry in QUANTIZERS.items()}
    assert list(stages["rtn"]) == []
    assert list(stages["gptq"]) == ["error feedback"]
    assert list(stages["search"]) == ["range search"]
    assert list(stages["learn"]) == ["error feedback", "range search", "learning", "refining"]
    assert stages["search-gptaq"]["error feedback"] > stages["gptq"]["error feedback"]
    assert stages["learn"]["error feedback"] == stages["gptq"]["error feedback"] > 0
    half = QUANTIZERS["learn"].seconds(inventory, 4096, 2e9)
    del half["range search"], stages["learn"]["range search"]  # which is timed, whatever the rate
    assert half == {stage: pytest.approx(s / 2) for stage, s in stages["learn"].items()}


@pytest.mark.parametrize(
    "module",
    [
        "mint_mlx.converters.quantizers.registry",
        "mint_mlx.rules.objectives",
        "mint_mlx.rules.efforts",
    ],
)
def test_names_and_facts_are_known_without_mlx(module: str) -> None:
    """The command line lists them in its help, before anything heavy is loaded."""
    code = f"import sys, {module}; print({{'mlx', 'mlx_lm', 'numpy'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def _mirrored(work: Work) -> Quantizer:
    """A quantizer that rounds the negated weights: other codes than `rtn`'s, as good as those."""
    work.say("toy is made")

    def quantize(_: Layer, weight: mx.array, config: QuantConfig) -> dict[str, mx.array]:
        packed = rtn.quantize(-weight, config)
        return packed | {name: -packed[name] for name in ("scales", "biases")}

    return quantize


@pytest.mark.parametrize("row_wise", [False, True])
def test_a_new_quantizer_is_one_entry(
    make: Maker, monkeypatch: pytest.MonkeyPatch, row_wise: bool
) -> None:
    """It is forecast, converted with, and named in the plan and the card."""
    entry = Entry("toy", "codes of the negated weights", _mirrored, row_wise=row_wise)
    monkeypatch.setitem(QUANTIZERS, "toy", entry)
    model = make(llama(1))
    request = Request(str(model), budget="5bpw", quantizer="toy")
    plan, run = dry_run.dry_run(order_for(request))
    assert plan.quantizer == "toy"
    assert "error feedback" not in run.seconds

    notes = Notes()
    out = model.parent / "out"
    result = convert.convert(str(model), "5bpw", out, quantizer="toy", report=notes, smoke=False)
    assert result.plan.quantizer == read_plan(out / PLAN_FILE).quantizer == "toy"
    assert "quantizer `toy`" in (out / "README.md").read_text()
    assert notes.details == ["toy is made"]
    tensors = mx.load(str(out / "model.safetensors"))
    source = mx.load(str(model / "model.safetensors"))
    quantized = {path: c for path, c in result.plan.choice.items() if c.quantized}
    assert quantized
    for path, config in quantized.items():
        weight = -source[f"{path}.weight"]
        codes, scales, _ = mx.quantize(weight, config.group_size, config.bits, mode=config.mode)
        assert mx.array_equal(tensors[f"{path}.weight"], codes)
        assert mx.array_equal(tensors[f"{path}.scales"], -scales)


def _literals(node: ast.expr | ast.pattern) -> Iterator[object]:
    """The literals that an operand is, or that a tuple, list or set in its place holds."""
    for operand in ast.walk(node) if isinstance(node, ast.Tuple | ast.List | ast.Set) else (node,):
        if isinstance(operand, ast.Constant):
            yield operand.value


def _comparisons(path: Path) -> Iterator[tuple[int, object]]:
    """Line and literal of everything that a file compares with a literal."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        operands: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        for operand in operands:
            for literal in _literals(operand):
                yield operand.lineno, literal


def test_no_file_compares_a_name_with_a_literal() -> None:
    files = [path for top in ("mint_mlx", "converters", "eval") for path in (ROOT / top).rglob("*")]
    names = {*QUANTIZERS, *OBJECTIVES}
    bad = [
        f"{path.relative_to(ROOT)}:{line} compares with {literal!r}"
        for path in files
        if path.suffix == ".py"
        for line, literal in _comparisons(path)
        if literal in names
    ]
    assert len(files) > 150
    assert not bad


def test_the_search_for_comparisons_finds_them(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(
        'a = "rtn"\nif b != "gptq" or c in ("mint", "x"):\n    pass\n'
        'match d:\n    case "learn":\n        pass\n'
    )
    assert sorted(map(str, _comparisons(file))) == [
        "(2, 'gptq')",
        "(2, 'mint')",
        "(2, 'x')",
        "(5, 'learn')",
    ]
