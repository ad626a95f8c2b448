"""mint-mlx: fit a large language model into a byte budget, without calibration data, for MLX.

    from mint_mlx import convert, read_plan

    convert("Qwen/Qwen3-30B-A3B", budget="19GB")
    mlx_lm.convert(..., quant_predicate=read_plan("plan.yaml").quant_predicate())

Names are imported on first use, so that `import mint_mlx` and `mint-mlx --help` are instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .allocation.plan_file import read_plan
    from .jobs.convert import convert
    from .measure.profile_file import load_profile

__version__ = "0.1.0"
__all__ = ["__version__", "convert", "load_profile", "read_plan"]

_HOME = {
    "convert": "jobs.convert",
    "load_profile": "measure.profile_file",
    "read_plan": "allocation.plan_file",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
