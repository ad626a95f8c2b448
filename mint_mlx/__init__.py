"""mint-mlx: fit a large language model into a byte budget, without calibration data, for MLX.

    from mint_mlx import convert, read_plan

    convert("Qwen/Qwen3-30B-A3B", budget="19GB")
    mlx_lm.convert(..., quant_predicate=read_plan("plan.yaml").quant_predicate())

Names are imported on first use, so that `import mint_mlx` and `mint-mlx --help` are instant. All
but `read_plan` open a fast BLAS first, as the commands do: import them before MLX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .allocation.plan_file import read_plan
    from .allocation.sweep import sweep
    from .eval.api import evaluate, report
    from .eval.check import check
    from .jobs.convert import convert
    from .jobs.doctor import doctor
    from .jobs.inspect import inspect
    from .jobs.refine import refine
    from .jobs.speed import speed
    from .jobs.steps import allocate
    from .jobs.upload import upload
    from .measure.profile_file import load_profile

__version__ = "0.1.0"
__all__ = [
    "__version__",
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
]

_MODULES = {
    "allocate": "jobs.steps",
    "check": "eval.check",
    "convert": "jobs.convert",
    "doctor": "jobs.doctor",
    "evaluate": "eval.api",
    "inspect": "jobs.inspect",
    "load_profile": "measure.profile_file",
    "read_plan": "allocation.plan_file",
    "refine": "jobs.refine",
    "report": "eval.api",
    "speed": "jobs.speed",
    "sweep": "allocation.sweep",
    "upload": "jobs.upload",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    # Before MLX is imported, which the other modules do.
    if name != "read_plan":
        from .base.blas import use_fast_blas

        use_fast_blas()
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
