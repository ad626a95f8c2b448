"""The command line's app and what its commands share: options, the version, the output."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.errors import UsageError
from ..rules.efforts import MIN_TOKENS
from ..rules.objectives import OBJECTIVES

if TYPE_CHECKING:
    from ..converters.quantizers.registry import Entry
    from ..rules.objectives import Objective
    from .output import Output

INTERRUPTED = 130  # exit code after Ctrl-C


def named(entries: Iterable[Objective | Entry]) -> str:
    """The names of a registry's entries for `--help`, each with what it is."""
    return ", ".join(f"{entry.name} ({entry.help})" for entry in entries)


app = typer.Typer(
    name="mint-mlx",
    help=(
        "Fit a large language model into a byte budget for MLX: data-free, mixed precision, loads "
        "in stock mlx-lm."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelArg = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder, or a Hugging Face model: org/name or org/name@revision."
    ),
]
RecipeOpt = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="Recipe; found by the model's type otherwise."),
]
ObjectiveOpt = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help=f"What the allocator minimises: {named(OBJECTIVES.values())}."
    ),
]
OverrideOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        metavar="REGEX=CONFIG",
        help="Give all layers that match one configuration; repeatable.",
    ),
]
PartsOpt = Annotated[
    str | None,
    typer.Option(
        metavar="text|all",
        help="`all` carries a vision or audio tower along as it is; `text` drops it.",
    ),
]
GuardsOpt = Annotated[
    bool,
    typer.Option("--ignore-guards", help="Allow what the guards forbid, such as 4-bit routers."),
]
SampleOpt = Annotated[
    str | None,
    typer.Option(
        metavar="auto|SHARE",
        help=(
            "Profile a random sample of rows: auto (to 2 % of each error; the default on a CPU), "
            "or a share; 1.0 is exact, the default on Metal."
        ),
    ),
]
TokensOpt = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=MIN_TOKENS,
        help=(
            "Text that the model writes for itself to be looked at: 16,384 tokens (best: 65,536); "
            "fewer are faster."
        ),
    ),
]
WorkDirOpt = Annotated[
    Path | None,
    typer.Option(
        "--work-dir",
        metavar="FOLDER",
        help="Where block inputs are spilled; the system's temporary folder otherwise.",
    ),
]
JsonOpt = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
]
BudgetOpt = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Size of all safetensors files: 19GB, 17.5GiB, 4.5bpw, smallest. None lists sizes.",
    ),
]
TextOpt = Annotated[
    str | None,
    typer.Option("--text", metavar="FILE", help="UTF-8 text; WikiText-2 test otherwise."),
]
ProtocolOpt = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="windows, or llama.cpp (see docs/guides/evaluate-and-compare.md)."
    ),
]
LengthOpt = Annotated[
    int | None,
    typer.Option(metavar="L", help="Tokens a window; 2048 (llama.cpp: 512), at most its context."),
]
WindowsOpt = Annotated[
    int | None,
    typer.Option(metavar="N", help="Score the first N windows only; with --seed N at random."),
]
SeedOpt = Annotated[
    int | None, typer.Option(metavar="S", help="Choose --windows at random with this seed.")
]
BatchOpt = Annotated[
    int | None, typer.Option(metavar="B", help="Windows at once; about 4,096 tokens otherwise.")
]


def _version(value: bool) -> None:
    if value:
        from .. import __version__

        print(f"mint-mlx {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    pass


def start(
    as_json: bool = False, work_dir: Path | None = None, long: bool = False, shared: bool = False
) -> Output:
    """The output of a command; opens a fast BLAS before MLX is imported.

    Args:
        as_json: print one JSON object and nothing else.
        work_dir: where temporary files go, in place of the system's folder for them.
        long: keep a Mac awake until this process ends, and usable by others.
        shared: whether several processes that `mlx.launch` started can do it together; only the
            first one prints.

    Raises:
        UsageError: the work folder isn't one that can be written to, or several processes were
            started in vain.
    """
    import os
    import sys
    import tempfile

    from ..base.blas import use_fast_blas
    from .output import Output

    if work_dir is not None:
        if not (work_dir.is_dir() and os.access(work_dir, os.W_OK)):
            raise UsageError(
                f"--work-dir {work_dir} is no folder that can be written to: make it first"
            )
        tempfile.tempdir = str(work_dir.absolute())
    if long and sys.platform == "darwin":
        import subprocess

        subprocess.Popen(["caffeinate", "-i", "-w", str(os.getpid())])
        os.nice(5)
    use_fast_blas()
    from ..base.distributed import launched_rank, ranks

    if not shared and ranks().size > 1:
        raise UsageError(
            "several machines can share profile, convert and eval only: leave mlx.launch out"
        )
    return Output(as_json, silent=launched_rank() > 0)
