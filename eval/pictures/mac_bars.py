"""What running a checkpoint takes, beside what Macs leave to the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...base.units import UNITS, decimal_unit, human
from ...runtime.memory import GIB, MAC_SIZES, RESERVE, gpu_limit
from .style import BLUE, INK, LINE, MUTED, ORANGE, Picture, new_figure, plain

NAME = "report-macs"


@dataclass(frozen=True)
class Load:
    """A model that runs.

    Attributes:
        label: of its bar.
        weights: bytes.
        cache: bytes of cache and workspace.
    """

    label: str
    weights: int
    cache: int

    @property
    def total(self) -> int:
        """With the reserve."""
        return self.weights + self.cache + RESERVE


def mac_bars(loads: Sequence[Load]) -> Picture:
    """The picture of what some loads take."""
    listed = ", ".join(f"{load.label}: {human(load.total)}" for load in loads)
    return Picture(NAME, f"Memory that it takes. {listed}.", lambda narrow: _draw(loads, narrow))


def _shown_macs(loads: Sequence[Load]) -> list[tuple[int, int]]:
    """GiB and limit of Macs near the loads, at most eight."""
    limits = [(gib, gpu_limit(gib * GIB)) for gib in MAC_SIZES]
    highest = max(load.total for load in loads)
    lowest = min(load.total for load in loads)
    above = next((i for i, (_, limit) in enumerate(limits) if limit >= highest), len(limits) - 1)
    below = max((i for i, (_, limit) in enumerate(limits) if limit <= lowest), default=0)
    return limits[max(below, above - 7) : above + 1]


def _draw(loads: Sequence[Load], narrow: bool) -> Any:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = new_figure(narrow, 140 + (46 if narrow else 34) * len(loads) + (60 if narrow else 0))
    axis = figure.subplots()
    macs = _shown_macs(loads)
    largest = max([load.total for load in loads] + [limit for _, limit in macs])
    unit = decimal_unit(largest)
    places = range(len(loads))

    starts = [0] * len(loads)
    for label, colour, sizes in (
        ("weights", BLUE, [load.weights for load in loads]),
        ("cache and workspace", ORANGE, [load.cache for load in loads]),
        ("reserve", MUTED, [RESERVE] * len(loads)),
    ):
        axis.barh(list(places), sizes, 0.6, left=starts, color=colour, label=label)
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    axis.set_yticks(list(places), [plain(load.label) for load in loads])
    axis.set_ylim(len(loads) - 0.4, -0.6)
    axis.set_xlim(0, largest * 1.04)

    # What a Mac leaves to the GPU; names that would stand in each other are left out.
    last = -1.0
    for gib, limit in macs:
        axis.axvline(limit, color=INK, linewidth=1.2, linestyle="--")
        if limit / largest - last < (0.09 if narrow else 0.035):
            continue
        last = limit / largest
        axis.annotate(
            f"{gib} GiB Mac",
            (limit, 1.02),
            xycoords=("data", "axes fraction"),
            rotation=45 if not narrow else 60,
            fontsize=8.5,
            ha="left",
            va="bottom",
        )
    axis.set_xlabel(f"{unit} of memory")
    axis.xaxis.set_major_locator(MaxNLocator(5 if narrow else 9, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / UNITS[unit]:.4g}"))
    axis.grid(True, axis="x", color=LINE)
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower left", ncols=1 if narrow else 3
    )
    return figure
