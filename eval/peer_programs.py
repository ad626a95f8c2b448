"""Quantizers that need an installation of their own, run by the interpreter that has them.

AutoRound, mlx-optiq and GPTQModel are looked for in the virtual environment that a variable names,
else beside this program. Each gets the source and, but for mlx-optiq, the baseline text's tokens,
and writes a checkpoint that becomes one of mlx-lm's with the same codes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..allocation.allocate import uniform
from ..base.errors import MintError
from ..base.quant_config import KEEP, QuantConfig
from ..base.remove import Kind
from ..base.scratch import scratch_folder
from ..checkpoint.source import Source
from ..converters.output.conversion import Conversion
from ..converters.output.write import write
from ..jobs.model import prepare
from . import peer_methods
from .stacked import copy_stacked


class Program(NamedTuple):
    """A quantizer of others.

    Attributes:
        name: for people.
        package: as pip calls it.
        variable: of the environment, naming the folder of the virtual environment that has it.
    """

    name: str
    package: str
    variable: str


AUTO_ROUND = Program("AutoRound", "auto-round", "AUTO_ROUND_VENV")
OPTIQ = Program("mlx-optiq", "mlx-optiq", "MLX_OPTIQ_VENV")
GPTQ_MODEL = Program("GPTQModel", "gptqmodel", "GPTQMODEL_VENV")
ITERATIONS = 200  # of AutoRound, a block: its own default
_EXPORT = Kind("a quantizer's output", ("*",), {"*": Kind("", ("*",), {"*": Kind("", ("*",))})})


def interpreter(program: Program) -> str:
    """The interpreter of the virtual environment that may have a program."""
    folder = os.environ.get(program.variable)
    return str(Path(folder).absolute() / "bin" / "python") if folder else sys.executable


def installed_version(program: Program) -> str | None:
    """The version of a program, or None where it isn't installed."""
    return _version(interpreter(program), program.package)


@cache
def _version(python: str, package: str) -> str | None:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def auto_round(
    source: Source,
    config: QuantConfig,
    average: float | None,
    rounded: Mapping[str, QuantConfig],
    text: str,
    out: Path,
) -> None:
    """AutoRound's `mlx` export: at uniform bits, or by AutoScheme at an average of bits.

    Args:
        source: the model.
        config: the bits, unless there is an average, and the group.
        average: bits a weight, which AutoScheme distributes.
        rounded: the layers that it leaves alone and that are rounded to nearest, by path.
        text: it calibrates on.
        out: the checkpoint's folder.

    Raises:
        MintError: it isn't installed, it fails, or the text is too short.
    """
    asked = _asked(config) | {"iterations": ITERATIONS, "average": average}
    with _exported(AUTO_ROUND, "run_auto_round.py", source, asked, text) as export:
        copy_stacked(source, export, out, rounded)


def gptq_model(source: Source, config: QuantConfig, text: str, out: Path) -> None:
    """GPTQModel's GPTQ on the CPU, its codes repacked as they are.

    Raises:
        MintError: it isn't installed, it fails, or the text is too short.
    """
    script = "run_gptqmodel.py"
    with _exported(GPTQ_MODEL, script, source, _asked(config), text) as export:
        job = prepare(str(export))
        plan = uniform(job.source, job.inventory, KEEP, {})
        write(Conversion(job.source, job.inventory, plan, out, force=True))


def optiq(source: Source, bits: Sequence[int], target: float, out: Path) -> None:
    """`optiq convert` at a number of bits a weight, calibrated on the text that it brings.

    Raises:
        MintError: it isn't installed, or it fails.
    """
    _required(OPTIQ)
    with scratch_folder(_EXPORT) as folder:
        given = source.path.absolute()
        if mx.default_device() == mx.cpu:  # where MLX multiplies experts in float32 only
            given = folder / "source"
            peer_methods.convert_plain(source, "float32", given)

        words = ["convert", str(given), "--target-bpw", f"{target:.4f}", "--skip-baselines"]
        words += ["--candidate-bits", ",".join(map(str, bits)), "-o", str(folder / "export")]
        _run(OPTIQ, ["-c", "from optiq.cli import cli; cli()", *words], folder)
        copy_stacked(source, _checkpoint(OPTIQ, folder / "export"), out, {})


def _asked(config: QuantConfig) -> dict[str, Any]:
    return {"bits": config.bits, "group_size": config.group_size}


@contextmanager
def _exported(
    program: Program, script: str, source: Source, asked: dict[str, Any], text: str
) -> Iterator[Path]:
    """The checkpoint that a script of ours beside this file lets a program write.

    Raises:
        MintError: it isn't installed, it fails, or the text is too short.
    """
    _required(program)
    tokens = peer_methods.calibration(source, text).astype(np.int64)
    with scratch_folder(_EXPORT) as folder:
        np.save(folder / "tokens.npy", tokens)
        places = {"source": source.path.absolute(), "tokens": folder / "tokens.npy"}
        places["out"] = folder / "export"
        whole = asked | {name: str(path) for name, path in places.items()}
        _run(program, [str(Path(__file__).with_name(script)), json.dumps(whole)], folder)
        yield _checkpoint(program, folder / "export")


def _required(program: Program) -> None:
    """Refuse a program that isn't installed.

    Raises:
        MintError: how to install it.
    """
    if installed_version(program) is None:
        raise MintError(
            f"{program.name} isn't installed: `pip install {program.package}` into a virtual "
            f"environment, and set {program.variable} to its folder"
        )


def _run(program: Program, words: Sequence[str], folder: Path) -> None:
    """Run a program's interpreter in a folder, for what it writes beside its output.

    Raises:
        MintError: it fails.
    """
    command = [interpreter(program), *words]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1].strip() if lines else f"code {done.returncode}"
        raise MintError(f"{program.name} cannot quantize this model: {why}")


def _checkpoint(program: Program, export: Path) -> Path:
    """The folder with a config.json in what a program wrote, which may lie one level deeper.

    Raises:
        MintError: there is none.
    """
    for file in (export / "config.json", *sorted(export.glob("*/config.json"))):
        if file.is_file():
            return file.parent
    raise MintError(f"{program.name} wrote no checkpoint")
