"""Where the expected loss sits: by block, and by projection beside its share of the bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...checkpoint.block_path import block_of
from ...jobs.inspect import LayerInfo
from .heat_map import make_grid
from .style import BLUE, LINE, ORANGE, Picture, new_figure, percent, plain

NAME = "report-loss"


@dataclass(frozen=True)
class Share:
    """A projection's, or an end's, part of the whole.

    Attributes:
        label: its name.
        loss, bytes: shares of all losses, and of all layers' bytes.
    """

    label: str
    loss: float
    bytes: float


def shares(layers: Sequence[LayerInfo], losses: Mapping[str, float]) -> list[Share]:
    """The shares of each projection over all blocks, and of layers outside, largest loss first."""
    grid = make_grid(layers)
    total = sum(losses.values()) or 1.0
    size = max(1, sum(layer.bytes for layer in layers))
    groups = [
        (column.label, [layer for cell in column.cells.values() for layer in cell])
        for column in grid.columns
    ]
    groups += [(layer.path.rpartition(".")[2], [layer]) for layer in grid.ends]
    listed = [
        Share(
            label,
            sum(losses.get(layer.path, 0.0) for layer in group) / total,
            sum(layer.bytes for layer in group) / size,
        )
        for label, group in groups
    ]
    return sorted(listed, key=lambda share: -share.loss)


def by_block(losses: Mapping[str, float]) -> list[float]:
    """Each block's share of all losses."""
    blocks = [(block_of(path), loss) for path, loss in losses.items()]
    count = 1 + max((block for block, _ in blocks if block is not None), default=-1)
    sums = [0.0] * count
    for block, loss in blocks:
        if block is not None:
            sums[block] += loss
    total = sum(losses.values()) or 1.0
    return [value / total for value in sums]


def loss_map(layers: Sequence[LayerInfo], losses: Mapping[str, float]) -> Picture:
    """The picture of layers' expected losses."""
    listed = shares(layers, losses)
    blocks = by_block(losses)
    first = ", ".join(f"{share.label} {share.loss:.0%}" for share in listed[:3])
    alt = f"Where the expected loss sits. Largest by projection: {first}."
    if blocks:
        top = max(range(len(blocks)), key=blocks.__getitem__)
        alt += f" Largest block: {top} with {blocks[top]:.0%}."
    return Picture(NAME, alt, lambda narrow: _draw(listed, blocks, narrow))


def _draw(listed: Sequence[Share], blocks: Sequence[float], narrow: bool) -> Any:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    lines = 22 * len(listed) + 90
    height = lines + 220 if narrow else max(320, lines)
    figure = new_figure(narrow, height)
    grid = {"height_ratios": [lines, 220]} if narrow else {"width_ratios": [1, 1.1]}
    rows, columns = (2, 1) if narrow else (1, 2)
    left, right = figure.subplots(rows, columns, gridspec_kw=grid)

    # Two bars for each projection: what it costs, and what it takes.
    places = range(len(listed))
    left.barh(
        [p - 0.2 for p in places],
        [s.loss for s in listed],
        0.36,
        color=BLUE,
        label="share of the expected loss",
    )
    left.barh(
        [p + 0.2 for p in places],
        [s.bytes for s in listed],
        0.36,
        color=ORANGE,
        label="share of the bytes",
    )
    left.set_yticks(list(places), [plain(share.label) for share in listed])
    left.invert_yaxis()
    left.xaxis.set_major_formatter(FuncFormatter(percent))
    left.set_title("by projection")
    left.grid(True, axis="x", color=LINE)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower left", ncols=1 if narrow else 2
    )

    right.bar(range(len(blocks)), blocks, 0.8, color=BLUE)
    right.set_xlabel("block")
    right.xaxis.set_major_locator(
        MaxNLocator(8 if narrow else 12, integer=True, steps=[1, 2, 5, 10])
    )
    right.yaxis.set_major_formatter(FuncFormatter(percent))
    right.set_title("by block, share of the expected loss")
    right.grid(True, axis="y", color=LINE)
    return figure
