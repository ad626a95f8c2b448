"""How far distilling is, noted at each evaluation: an interrupted run resumes from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from ...base import schema
from ...base.array_files import read_arrays, write_arrays
from ...base.checksum import Damaged
from .student import Params


def write_note(
    resume_file: Path,
    optimizer: optim.Adam,
    figures: tuple[float, ...],
    params: Params,
    best: Params,
) -> None:
    """Write how far distilling is.

    Args:
        resume_file: to write.
        optimizer: whose moments are written too.
        figures: steps done, divergence before, lowest so far.
        params: of this moment.
        best: those of the lowest divergence.
    """
    arrays = {"figures": np.array(figures)}
    for path, offsets in params.items():
        for name, array in offsets.items():
            state = optimizer.state[path][name]
            for what, value in {"at": array, **state, "best": best[path][name]}.items():
                arrays[f"{what}.{path}.{name}"] = np.array(value)
    write_arrays(resume_file, arrays)


def read_note(resume_file: Path, params: Params, steps: int) -> dict[str, np.ndarray]:
    """What `write_note` wrote for these parameters.

    Raises:
        Damaged: it is something else.
    """
    arrays, _ = read_arrays(resume_file)
    try:
        figures = schema.check_array(arrays["figures"], schema.FLOAT, (3,), -1)
        if not (0 <= figures[0] <= steps and figures[0] == int(figures[0])):
            raise ValueError("no number of steps")
        for path, offsets in params.items():
            for name, array in offsets.items():
                for what in ("at", "m", "v", "best"):
                    schema.check_array(arrays[f"{what}.{path}.{name}"], schema.FLOAT, array.shape)
    except (KeyError, ValueError):
        raise Damaged(f"{resume_file} is damaged") from None
    return arrays


def resume(
    arrays: Mapping[str, np.ndarray], optimizer: optim.Adam, params: Params
) -> tuple[int, float, float, Params, Params]:
    """Steps done, divergence before, lowest, parameters and the best of them (see `write_note`)."""
    done, before, lowest = arrays["figures"].tolist()
    optimizer.init(params)
    optimizer.state["step"] = mx.array(int(done), dtype=optimizer.state["step"].dtype)

    def read(what: str) -> Params:
        return {
            path: {name: mx.array(arrays[f"{what}.{path}.{name}"]) for name in offsets}
            for path, offsets in params.items()
        }

    for moment in ("m", "v"):
        for path, offsets in read(moment).items():
            for name, array in offsets.items():
                optimizer.state[path][name][moment] = array
    return int(done), before, lowest, read("at"), read("best")
