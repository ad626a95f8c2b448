"""`mint-mlx cache`: what earlier runs measured, and how to delete it."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import JsonOpt, WorkDirOpt, start

cache_app = typer.Typer(
    help="List what earlier runs stored, with sizes; `cache clear` deletes it.",
    invoke_without_command=True,
)


@cache_app.callback()
def show(context: typer.Context, work_dir: WorkDirOpt = None, as_json: JsonOpt = False) -> None:
    """List what earlier runs stored, with sizes; `cache clear` deletes it."""
    if context.invoked_subcommand is not None:
        return
    output = start(as_json, work_dir)
    from datetime import date

    from ..base.units import both, human
    from ..measure import cache

    entries = cache.entries()
    lines = [
        [e.path.name, e.kind, human(e.bytes), date.fromtimestamp(e.modified).isoformat()]
        for e in entries
    ]
    total = sum(entry.bytes for entry in entries)
    if lines:
        output.table(["name", "kind", "bytes", "written"], lines)
    output.line(
        f"{cache.cache_dir()}: {both(total)}, {len(entries)} entries; `mint-mlx cache clear` "
        "deletes them"
    )
    data = [{"name": e.path.name, "kind": e.kind, "bytes": e.bytes} for e in entries]
    output.result({"folder": str(cache.cache_dir()), "bytes": total, "entries": data})


@cache_app.command()
def clear(
    kinds: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KIND ...]", help="Only these, such as `compare`; all otherwise."),
    ] = None,
    work_dir: WorkDirOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Delete what earlier runs stored; checkpoints and downloads from the Hub stay."""
    output = start(as_json, work_dir)
    from ..base.units import both
    from ..measure import cache

    freed = cache.clear(kinds or ())
    if strangers := cache.strangers(kinds or ()):
        names = ", ".join(map(str, strangers[:3])) + (", ..." if len(strangers) > 3 else "")
        output.note(f"mint-mlx did not write these, so they stay: {names}")
    output.line(f"{both(freed)} freed in {cache.cache_dir()}")
    output.result({"freed": freed})
