"""`mint-mlx check`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import JsonOpt, start

if TYPE_CHECKING:
    from ..jobs.order import Order
    from ..jobs.result import Result
    from .output import Output


LISTED = 12  # replies that differ


def check(
    model: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A quantized model: a folder or org/name.")
    ],
    source: Annotated[str, typer.Option(metavar="REF", help="The model it was made from.")],
    as_json: JsonOpt = False,
) -> None:
    """Ask a model and its source short tasks, and tell where their answers differ.

    Arithmetic, code, calls of tools, a long context, languages, system prompts, several turns:
    through the chat template, or as texts to go on with where there is none.
    """
    output = start(as_json, long=True)
    from ..base.folders import is_checkpoint
    from ..checkpoint.source import load_source
    from ..eval.check import check, check_table, difference_table, keep_result

    result = check(model, source, output)
    output.close()
    output.table(*check_table(result))
    columns, lines = difference_table(result)
    if lines:
        output.table(columns, lines[:LISTED], "Replies that differ")
    else:
        output.line("all replies are the same")
    if len(lines) > LISTED:
        output.line(f"{len(lines) - LISTED} more differ: --json tells all")
    output.result(result)

    # Only into a folder of ours anything is written.
    folder = Path(model).expanduser()
    if is_checkpoint(folder):
        keep_result(folder, load_source(str(folder)).fingerprint, result)
        output.hint(f"kept for its report: {shlex.join(['mint-mlx', 'report', str(folder)])}")


def tell_check(order: Order, result: Result, output: Output) -> None:
    """The command that asks a result and its source the same, where both fit in memory."""
    from ..base.units import duration
    from ..runtime.device import on_cpu
    from ..runtime.memory import fits_here

    source = order.job.source
    as_float32 = 4 * result.inventory.parameters if on_cpu() else 0
    if source.has_weights and fits_here(max(source.weight_bytes, as_float32)):
        from ..eval.check_time import check_seconds

        words = ["mint-mlx", "check", str(result.path), "--source", order.request.model]
        output.hint(
            "to see where it answers otherwise than its source (roughly "
            f"{duration(check_seconds(result.inventory))}): {shlex.join(words)}"
        )
