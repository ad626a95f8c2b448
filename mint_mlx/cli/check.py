"""`mint-mlx check`."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import JsonOpt, start


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
    from ..eval.check import check, check_table, difference_table

    result = check(model, source, output)
    output.close()
    output.table(*check_table(result))
    columns, lines = difference_table(result)
    if lines:
        output.table(columns, lines, "Replies that differ")
    else:
        output.line("all replies are the same")
    output.result(result)
