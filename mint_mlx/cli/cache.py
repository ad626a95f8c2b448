"""`mint-mlx cache`: what is kept between runs, and dropping it."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import JsonOpt, WorkDirOpt, start

cache_app = typer.Typer(
    help="List what is kept between runs, with sizes; `cache clear` drops it.",
    invoke_without_command=True,
)


@cache_app.callback()
def show(context: typer.Context, work_dir: WorkDirOpt = None, as_json: JsonOpt = False) -> None:
    """List what is kept between runs, with sizes; `cache clear` drops it."""
    if context.invoked_subcommand is not None:
        return
    output = start(as_json, work_dir)
    from datetime import date

    from ..base.units import both, human
    from ..measure import cache

    found = cache.entries()
    rows = [
        [e.path.name, e.kind, human(e.bytes), date.fromtimestamp(e.modified).isoformat()]
        for e in found
    ]
    total = sum(entry.bytes for entry in found)
    if rows:
        output.table(["name", "kind", "bytes", "written"], rows)
    output.line(
        f"{cache.cache_dir()}: {both(total)}, {len(rows)} entries; `mint-mlx cache clear` drops "
        "them"
    )
    kept = [{"name": e.path.name, "kind": e.kind, "bytes": e.bytes} for e in found]
    output.result({"folder": str(cache.cache_dir()), "bytes": total, "entries": kept})


@cache_app.command()
def clear(
    kinds: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KIND ...]", help="Only these, such as `compare`; all otherwise."),
    ] = None,
    work_dir: WorkDirOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Drop what is kept. What a checkpoint keeps of its making, and downloads of the Hub, stay."""
    output = start(as_json, work_dir)
    from ..base.units import both
    from ..measure import cache

    freed = cache.clear(kinds or ())
    output.line(f"{both(freed)} freed in {cache.cache_dir()}")
    output.result({"freed": freed})
