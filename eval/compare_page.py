"""`mint-mlx compare --report`: the page of a comparison."""

from __future__ import annotations

from ..base.units import human
from .compare import Comparison
from .methods import NAMES
from .page import Page, Section, Table
from .pictures.methods import methods_picture
from .report import columns, head_text, reasons, tables

QUANTILES = ("kl_median", "kl_p90", "kl_p99", "kl_p999", "kl_max")


def compare_page(comparison: Comparison, command: str) -> Page:
    """The page of a finished comparison.

    Args:
        comparison: what to show.
        command: the command line that was run.
    """
    measured = [row for row in comparison.rows if "kl" in row]
    sections = [_methods(comparison)]
    if measured:
        sections.append(_spread(comparison))
    if not_run := reasons(comparison):
        sections.append(Section("not-run", "Not run", not_run))
    sections.append(Section("how", "How it was measured", (head_text(comparison), f"`{command}`")))
    lead = f"Ways to quantize {comparison.source} at the same bytes, on {comparison.text}."
    facts = [
        ("methods", str(len({row["method"] for row in measured}))),
        ("sizes", str(len({row["group"] for row in measured}))),
        ("lowest KL", _best(comparison)),
    ]
    return Page(f"{comparison.source}: a comparison", lead, facts, sections)


def _best(comparison: Comparison) -> str:
    """The method that is first at most sizes."""
    first = [NAMES.get(r["method"], r["method"]) for r in comparison.rows if r.get("rank") == 1]
    if not first:
        return "-"
    best = max(dict.fromkeys(first), key=first.count)
    return f"{best} ({first.count(best)} of {len(first)} sizes)"


def _methods(comparison: Comparison) -> Section:
    head = columns(comparison)
    shown = [Table(title, head, lines) for title, lines in tables(comparison)]
    return Section(
        "methods",
        "Methods at the same bytes",
        (
            "Lines are mint-mlx's levels of effort, points are other methods; bars are 95 % "
            "intervals.",
        ),
        (methods_picture(comparison),),
        shown,
    )


def _spread(comparison: Comparison) -> Section:
    """Quantiles of each checkpoint's KL over tokens."""
    lines = [
        [
            NAMES.get(row["method"], row["method"]),
            row["about"],
            human(row["bytes"]),
            *(f"{row[key]:.3g}" for key in QUANTILES),
        ]
        for row in comparison.rows
        if "kl" in row
    ]
    head = ("method", "as", "size", "median", "90 %", "99 %", "99.9 %", "largest")
    table = Table("KL by token, in nats", head, lines)
    text = "Two models of equal mean may differ in their tails, which is where text goes wrong."
    return Section("tokens", "Divergence by token", (text,), (), (table,))
