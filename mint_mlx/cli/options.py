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


def named(entries: Iterable[Objective | Entry]) -> str:
    """The names of a registry's entries for `--help`, each with what it is."""
    return ", ".join(f"{entry.name} ({entry.help})" for entry in entries)


app = typer.Typer(
    name="mint-mlx",
    help=(
        "Quantize a large language model for MLX to the size that you want: mixed precision "
        "without calibration data; stock mlx-lm loads the result."
    ),
    epilog="Start with: mint-mlx convert org/name. Guides: docs/guides/, models: docs/models.md.",
    no_args_is_help=True,
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
    typer.Option(
        metavar="NAME|FILE", help="Rules for its family; found by the model's type otherwise."
    ),
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
        metavar="text|mtp|mtp-8bit|all",
        help=(
            "`mtp` keeps blocks for multi-token prediction, `mtp-8bit` keeps them in 8 bits, `all` "
            "keeps a vision or audio tower too."
        ),
    ),
]
GuardsOpt = Annotated[
    bool,
    typer.Option(
        "--ignore-guards", help="Allow what is known to break models, such as 4-bit routers."
    ),
]
SampleOpt = Annotated[
    str | None,
    typer.Option(
        metavar="auto|SHARE",
        help=(
            "Measure errors on a random sample of rows: auto (2 % of each layer's; the default on "
            "a CPU), or a share; 1.0 is exact, the default on Metal."
        ),
    ),
]
TokensOpt = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=MIN_TOKENS,
        help=(
            "How much text the model writes to be measured on: 16,384 tokens (best: 65,536); "
            "fewer are faster."
        ),
    ),
]
TwinOpt = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|ORG/NAME",
        help="Let this MLX checkpoint of the same model write the text in its place.",
    ),
]
KeepTwinOpt = Annotated[
    Path | None,
    typer.Option(
        "--keep-twin",
        metavar="FOLDER",
        help="Let a quantized twin write the text, and leave it in this folder.",
    ),
]
NoTwinOpt = Annotated[
    bool,
    typer.Option(
        "--no-twin",
        help="Write no twin for the text of a model that doesn't fit in memory.",
    ),
]
WorkDirOpt = Annotated[
    Path | None,
    typer.Option(
        "--work-dir",
        metavar="FOLDER",
        help="Folder for large temporary files; the system's otherwise.",
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
MinSpeedOpt = Annotated[
    float | None,
    typer.Option(
        "--min-speed",
        metavar="TOKENS/S",
        help="Decode at least so fast, as predicted at --context (docs/guides/speed.md).",
    ),
]
SpeedOpt = Annotated[
    str | None,
    typer.Option(
        "--speed", metavar="0.95x", help="The same as a multiple of uniform 4bit-g64's speed."
    ),
]
SpeedTableOpt = Annotated[
    str | None,
    typer.Option(
        "--speed-table",
        metavar="FILE|CHIP",
        help=(
            "Predict speeds of another machine: what `mint-mlx speed --save` wrote there, or an "
            "Apple chip such as M4-Pro for an estimate."
        ),
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
        UsageError: the work folder can't be written to, or several processes were started for a
            command that can't share its work.
    """
    import os
    import sys
    import tempfile

    from ..base.allocator import reuse_freed_memory
    from ..base.blas import use_fast_blas
    from ..base.printable import guard_streams
    from .output import Output

    guard_streams()

    # Large temporary files may need another disk.
    if work_dir is not None:
        if not (work_dir.is_dir() and os.access(work_dir, os.W_OK)):
            raise UsageError(
                f"--work-dir must be a folder that can be written to (got {work_dir}): make it "
                "first"
            )
        tempfile.tempdir = str(work_dir.absolute())

    # A Mac shouldn't fall asleep over long work, and should stay usable.
    if long and sys.platform == "darwin":
        import subprocess

        subprocess.Popen(["caffeinate", "-i", "-w", str(os.getpid())])
        os.nice(5)

    # Only before MLX is imported, which asking for ranks may do.
    reuse_freed_memory()
    use_fast_blas()
    from ..base.distributed import launched_rank, ranks

    if not shared and ranks().size > 1:
        raise UsageError(
            "only profile, convert and eval can be shared by several machines: leave mlx.launch "
            "out (docs/guides/several-macs.md)"
        )
    return Output(as_json, silent=launched_rank() > 0)
