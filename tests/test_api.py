"""The Python API: what `from mint_mlx import ...` gives, and what its results look like."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers import Maker, llama

import mint_mlx
from mint_mlx.eval.settings import Settings
from mint_mlx.jobs import dry_run
from mint_mlx.jobs.order import place_order
from mint_mlx.jobs.request import Request, check_request

FUNCTIONS = (
    "allocate",
    "check",
    "convert",
    "doctor",
    "evaluate",
    "inspect",
    "load_profile",
    "read_plan",
    "refine",
    "report",
    "speed",
    "sweep",
    "upload",
)


def run_python(code: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names_are_listed_before_anything_is_imported() -> None:
    code = (
        "import sys, mint_mlx\n"
        "print(*dir(mint_mlx))\n"
        "heavy = {'mlx', 'numpy', 'yaml', 'typer'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    assert set(FUNCTIONS) <= set(run_python(code).split())
    assert {*FUNCTIONS, "__version__"} == set(mint_mlx.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_option_is_spelled_out_with_its_type(name: str) -> None:
    function = getattr(mint_mlx, name)
    assert function.__name__ == name
    assert function.__doc__
    signature = inspect.signature(function)
    assert signature.return_annotation not in (inspect.Signature.empty, "Any")
    for parameter in signature.parameters.values():
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        assert parameter.annotation not in (parameter.empty, "Any")


def test_an_unknown_name_is_an_attribute_error() -> None:
    name = "quantize"
    with pytest.raises(AttributeError, match="no attribute 'quantize'"):
        getattr(mint_mlx, name)


def test_the_options_are_those_of_a_request_and_of_an_evaluation() -> None:
    convert = inspect.signature(mint_mlx.convert).parameters
    assert set(convert) == {field.name for field in fields(Request)} | {"smoke", "report"}
    defaults = {field.name: field.default for field in fields(Request) if field.name != "model"}
    assert defaults == {name: convert[name].default for name in defaults}
    evaluate = inspect.signature(mint_mlx.evaluate).parameters
    assert {field.name for field in fields(Settings)} <= set(evaluate)


def test_every_option_reaches_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[Request] = []
    monkeypatch.setattr("mint_mlx.jobs.convert.check_request", requests.append)
    monkeypatch.setattr("mint_mlx.jobs.convert.place_order", lambda *_: None)
    monkeypatch.setattr("mint_mlx.jobs.convert.carry_out", lambda *_: None)
    words: dict[str, Any] = {field.name: object() for field in fields(Request)}
    mint_mlx.convert(**words)
    assert requests == [Request(**words)]


def test_results_are_printed_in_one_line(make: Maker, tmp_path: Path) -> None:
    folder = str(make(llama(2)))
    result = mint_mlx.convert(folder, "5bpw", tmp_path / "out", smoke=False)
    plan_file = tmp_path / "plan.yaml"
    order = place_order(check_request(Request(folder, "5bpw", out=tmp_path / "other")))
    for value, words in (
        (result, ("bits per weight", "search", str(tmp_path / "out")[:20])),
        (result.plan, ("model", "layers", "budget='5bpw'", "objective='prior'")),
        (mint_mlx.read_plan(tmp_path / "out" / "mint-plan.yaml"), ("model", "layers")),
        (mint_mlx.allocate(tmp_path / "out", "6bpw", plan_file), ("bits per weight", "prior")),
        (mint_mlx.sweep(tmp_path / "out"), ("24 sizes", "knee")),
        (mint_mlx.inspect(folder), ("model", "layers")),
        (mint_mlx.inspect(plan_file), ("model", "search", "plan.yaml")),
        (mint_mlx.inspect(tmp_path / "out" / "mint-profile.json"), ("parameters",)),
        (mint_mlx.doctor(str(result.path)), ("out", "0 findings")),
        (mint_mlx.evaluate(folder, length=32, windows=2), ("perplexity", "2 windows")),
        (dry_run.dry_run(order)[1], ("bits per weight", "about")),
    ):
        text = repr(value)
        assert len(text) < 200
        assert "\n" not in text
        assert text.startswith(type(value).__name__)
        assert all(word in text for word in words), text


def test_an_inspection_is_data(make: Maker, tmp_path: Path) -> None:
    folder = str(make(llama(2)))
    model = mint_mlx.inspect(folder)
    assert [layer.path for layer in model.layers] == list(model.data()["layers"])
    head = next(layer for layer in model.layers if layer.path == "lm_head")
    assert (head.role, head.shape, str(head.config)) == ("head", (96, 128), "keep")
    assert model.bytes == (Path(folder) / "model.safetensors").stat().st_size
    plan = mint_mlx.allocate(
        mint_mlx.convert(folder, "5bpw", tmp_path / "out", smoke=False).path,
        "4.5bpw",
        tmp_path / "plan.yaml",
        overrides=["lm_head=8bit-g32"],
    )
    inspected = mint_mlx.inspect(tmp_path / "plan.yaml")
    assert inspected.data()["layers"]["lm_head"] == "8bit-g32"
    assert plan.bits_per_weight <= 4.5
    assert sum(layer.weights for layer in inspected.layers) == sum(
        layer.size for layer in plan.inventory.layers
    )


@pytest.mark.skipif(sys.platform != "linux", reason="a Mac has a fast BLAS of its own")
def test_a_fast_blas_is_opened_before_mlx_is_imported() -> None:
    code = (
        "import sys\n"
        "from mint_mlx.base import blas\n"
        "blas.CANDIDATES = ('libm.so.6',)\n"
        "from mint_mlx import convert\n"
        "assert 'mlx.core' in sys.modules\n"
        "print(blas.use_fast_blas())\n"
    )
    assert run_python(code).split() == ["libm"]


@pytest.mark.skipif(sys.platform != "linux", reason="a Mac has a fast BLAS of its own")
def test_where_mlx_is_imported_first_one_warning_says_so() -> None:
    code = (
        "import warnings, mlx.core\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    from mint_mlx import read_plan\n"
        "    assert not caught\n"
        "    from mint_mlx import convert\n"
        "    from mint_mlx import convert, evaluate\n"
        "for warning in caught:\n"
        "    print(warning.filename, warning.message)\n"
    )
    warned = run_python(code).splitlines()
    assert len(warned) == 1
    assert warned[0].startswith("<string>")
    assert "above `import mlx`" in warned[0]
