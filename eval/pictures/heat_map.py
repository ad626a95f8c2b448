"""A plan as a heat map: blocks down, projections across; colour is bits, hatching the group size.

Every bar's area is its bytes, except in columns that would be too narrow to see (marked `*`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...base.errors import MintError
from ...base.quant_config import QuantConfig
from ...base.units import human
from ...checkpoint.block_path import block_of
from ...jobs.inspect import LayerInfo
from .style import INK, LINE, MUTED, NARROW, PAPER, WIDE, Picture, new_figure, plain

BITS = {  # viridis, which is ordered for colour-blind readers and in grey
    2: "#440154",
    3: "#414487",
    4: "#2a788e",
    5: "#22a884",
    6: "#7ad151",
    8: "#fde725",
    16: "#e2e4e8",
}
WHITE, BLACK = "#fffffe", "#101214"  # texts on bars, in dark and in light pages
ON_DARK = (2, 3, 4)  # bits whose colour takes white text
HATCHES = {16: "||||", 32: "////", 64: "", 128: "\\\\", 0: ""}
MODES = {"mxfp4": "mx4", "nvfp4": "nv4", "mxfp8": "mx8"}
LEGEND = 20  # pixels of a line of it
MOST_BLOCKS, MOST_COLUMNS = 400, 120
MOST_ROWS = 12  # that an embedding or a head may take


@dataclass
class Column:
    """The same projection of every block.

    Attributes:
        label: its name, as short as it can be.
        cells: by block, the layers there (a family may hold experts apart).
    """

    label: str
    cells: dict[int, list[LayerInfo]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all its cells."""
        return sum(layer.bytes for cell in self.cells.values() for layer in cell)

    @property
    def largest(self) -> int:
        """Bytes of its largest cell."""
        return max(sum(layer.bytes for layer in cell) for cell in self.cells.values())


@dataclass(frozen=True)
class Grid:
    """A plan's layers in rows and columns.

    Attributes:
        columns: in the model's order.
        ends: layers outside of the blocks: embedding, head.
        blocks: how many rows.
    """

    columns: list[Column]
    ends: list[LayerInfo]
    blocks: int


def make_grid(layers: Sequence[LayerInfo]) -> Grid:
    """Layers in rows (blocks) and columns (projections)."""
    columns: dict[str, Column] = {}
    ends = []
    for layer in layers:
        block = block_of(layer.path)
        if block is None:
            ends.append(layer)
            continue
        # Numbers below the block are those of experts, which count together.
        path = ".".join("*" if part.isdigit() else part for part in layer.path.split("."))
        columns.setdefault(path, Column(path)).cells.setdefault(block, []).append(layer)
    for path, label in _short_names(list(columns)).items():
        columns[path].label = label
    blocks = 1 + max((max(column.cells) for column in columns.values()), default=-1)
    return Grid(list(columns.values()), ends, blocks)


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """The fewest last parts of each path that no other path ends in."""
    names = {}
    for path in paths:
        parts = [part for part in path.split(".") if part != "*"]
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[-count:])
            others = (p.replace(".*", "") for p in paths if p != path)
            if not any(other == name or other.endswith(f".{name}") for other in others):
                break
        names[path] = name
    return names


def heat_map(layers: Sequence[LayerInfo], title: str) -> Picture:
    """The picture of a plan's layers.

    Raises:
        MintError: there are more than a picture can show.
    """
    grid = make_grid(layers)
    if grid.blocks > MOST_BLOCKS or len(grid.columns) > MOST_COLUMNS:
        raise MintError(
            f"{grid.blocks} blocks of {len(grid.columns)} projections are more than a picture can "
            f"show ({MOST_BLOCKS} of {MOST_COLUMNS})"
        )
    used = Counter(str(layer.config) for layer in layers)
    listed = ", ".join(f"{config} in {number}" for config, number in used.most_common())
    alt = f"Heat map of {title}: {grid.blocks} blocks down, projections across. Layers: {listed}."
    return Picture("report-plan", alt, lambda narrow: _draw(grid, title, narrow))


def _draw(grid: Grid, title: str, narrow: bool) -> Any:
    """A figure whose coordinates are pixels, downwards."""
    width = NARROW if narrow else WIDE
    left = 34 if narrow else 60
    room = width - left - 4
    row = 16 if grid.blocks <= 32 else 11
    widths, scale = _widths(grid, room, 13 if narrow else 19)

    # Heights of the parts follow from what they hold.
    labels = [_label(column, w, scale) for column, w in zip(grid.columns, widths, strict=True)]
    size = 8.5 if narrow else 10
    upright = [_text_width(t, size) > w - 4 for t, w in zip(labels, widths, strict=True)]
    longest = (_text_width(t, size) for t, up in zip(labels, upright, strict=True) if up)
    head = 26 + max(longest, default=14)
    end_rows = [_end_rows(layer, scale, room) for layer in grid.ends]
    body = row * (grid.blocks + sum(end_rows)) + 6 * len(grid.ends)
    legend = _legend_entries(grid)
    per_line = max(1, width // 106)
    lines = -(-len(legend) // per_line) + 1
    height = head + body + 10 + LEGEND * lines + 6

    figure = new_figure(narrow, height, free=True)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.axis("off")
    axis.text(4, 12, plain(title), va="center", fontsize=10 if narrow else 12, fontweight="bold")

    # Layers before the blocks, the blocks, layers after them.
    y = float(head)
    first = [i for i, layer in enumerate(grid.ends) if layer.role == "embedding"]
    after = [i for i in range(len(grid.ends)) if i not in first]
    for i in first:
        y = _draw_end(axis, grid.ends[i], (left, y, row * end_rows[i]), scale, room)
    _draw_rows(axis, grid.blocks, (left, y, row), room, narrow)
    x = float(left)
    for i, column in enumerate(grid.columns):
        middle = x + widths[i] / 2 - 1
        turn = 90 if upright[i] else 0
        axis.text(middle, head - 5, labels[i], rotation=turn, ha="center", va="bottom", size=size)
        _draw_column(axis, column, (x, y, row), widths[i] - 2)
        x += widths[i]
    y += row * grid.blocks + 6
    for i in after:
        y = _draw_end(axis, grid.ends[i], (left, y, row * end_rows[i]), scale, room)

    _draw_legend(axis, legend, (4, y + 14), per_line, narrow)
    return figure


def _widths(grid: Grid, room: float, least: float) -> tuple[list[float], float]:
    """Each column's pixels, and how many pixels a byte has where a column is wide enough.

    Columns below `least` pixels get so many, the others share what remains by their bytes.
    """
    sizes = [column.largest for column in grid.columns]
    least = min(least, room / max(1, len(sizes)))
    narrow: set[int] = set()
    while True:
        wide = sum(size for i, size in enumerate(sizes) if i not in narrow)
        scale = (room - least * len(narrow)) / wide if wide else 0.0
        below = {i for i, size in enumerate(sizes) if i not in narrow and size * scale < least}
        if not below:
            break
        narrow |= below
    if not scale:  # no block, or all are as narrow as can be
        scale = room / max([*(layer.bytes for layer in grid.ends), *sizes, 1])
    return [least if i in narrow else size * scale for i, size in enumerate(sizes)], scale


def _label(column: Column, width: float, scale: float) -> str:
    """A column's name, with a star where it is drawn wider than its bytes."""
    return plain(column.label) + (" *" if column.largest * scale < width * 0.99 else "")


def _text_width(text: str, size: float) -> int:
    """Pixels that a text takes at most."""
    return round(len(text) * size * 0.62)


def _end_rows(layer: LayerInfo, scale: float, room: float) -> int:
    """Rows that a layer outside of the blocks needs for its bytes."""
    return min(MOST_ROWS, max(1, -(-int(layer.bytes * scale) // int(room))))


def _draw_rows(
    axis: Any, blocks: int, place: tuple[float, float, int], room: float, narrow: bool
) -> None:
    """Block numbers, and thin lines at them."""
    left, y, row = place
    step = 1 if blocks <= 32 else 5
    for block in range(0, blocks, step):
        top = y + row * block
        axis.plot([left, left + room], [top, top], color=LINE, linewidth=0.5, zorder=0)
        name = str(block) if narrow else f"block {block}"
        axis.text(left - 4, top + row / 2, name, ha="right", va="center", fontsize=8.5)


def _draw_column(axis: Any, column: Column, place: tuple[float, float, int], width: float) -> None:
    """A column's cells; equal ones below each other are one bar."""
    x, y, row = place
    largest = column.largest
    runs: list[tuple[int, int, QuantConfig, int]] = []  # first block, blocks, configuration, bytes
    for block in sorted(column.cells):
        cell = column.cells[block]
        config = max(cell, key=lambda layer: layer.bytes).config
        size = sum(layer.bytes for layer in cell)
        if runs and _goes_on(runs[-1], block, config, size):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, config, runs[-1][3])
        else:
            runs.append((block, 1, config, size))
    for block, count, config, size in runs:
        box = (x, y + row * block, max(2.0, width * size / max(1, largest)), row * count)
        _draw_bar(axis, box, config)


def _goes_on(
    run: tuple[int, int, QuantConfig, int], block: int, config: QuantConfig, size: int
) -> bool:
    """Whether a block's cell is like those above it; longer names in a header cost some bytes."""
    first, count, same, bytes_ = run
    return first + count == block and same == config and abs(size - bytes_) <= 0.02 * bytes_


def _draw_bar(axis: Any, box: tuple[float, float, float, float], config: QuantConfig) -> None:
    """A bar of a configuration: colour, hatching, and the bits as a number where they fit."""
    from matplotlib.patches import Rectangle

    x, y, width, height = box
    colour = BITS.get(config.bits, BITS[16])
    on_dark = config.bits in ON_DARK
    place = ((x, y + 0.5), width, height - 1)
    axis.add_patch(
        Rectangle(*place, facecolor=colour, edgecolor=MUTED, linewidth=0.5, clip_on=False)
    )
    if hatch := HATCHES.get(config.group_size, ""):
        edge = WHITE if on_dark else "#30343a"
        axis.add_patch(
            Rectangle(*place, fill=False, edgecolor=edge, linewidth=0, hatch=hatch, alpha=0.55)
        )

    text = _bits(config)
    size = 8 if height >= 14 else 7
    if _text_width(text, size) <= width and height >= size + 1:
        axis.text(
            x + width / 2,
            y + height / 2,
            text,
            ha="center",
            va="center_baseline",
            fontsize=size,
            color=WHITE if on_dark else BLACK,
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.6} if hatch else None,
        )


def _bits(config: QuantConfig) -> str:
    """A configuration's bits in three characters."""
    return MODES.get(config.mode, str(config.bits))


def _draw_end(
    axis: Any, layer: LayerInfo, place: tuple[float, float, float], scale: float, room: float
) -> float:
    """A layer outside of the blocks as a bar; returns where the next one begins."""
    x, y, height = place
    rows = _end_rows(layer, scale, room)
    width = min(room, max(14.0, layer.bytes * scale / rows))
    _draw_bar(axis, (x, y, width, height), layer.config)
    name = plain(layer.path.rpartition(".")[2])
    place_of_name = (x + width + 5, "left", INK)
    if width + _text_width(name, 9) + 8 > room:
        place_of_name = (x + room - 5, "right", BLACK)
    at, side, colour = place_of_name
    inside = side == "right"
    background = BITS[16] if inside else PAPER
    axis.text(
        at,
        y + height / 2,
        name,
        ha=side,
        va="center",
        fontsize=9,
        color=colour,
        bbox={"facecolor": background, "edgecolor": "none", "pad": 1.0},
    )
    return y + height + 6


def _legend_entries(grid: Grid) -> list[tuple[str, str, str]]:
    """What colours and hatches mean, as (text, colour, hatch): those that are used."""
    layers = [layer for column in grid.columns for cell in column.cells.values() for layer in cell]
    configs = {layer.config for layer in (*layers, *grid.ends)}
    bits = sorted({config.bits for config in configs})
    groups = sorted({config.group_size for config in configs if config.quantized})
    entries = [(f"{b} bits" if b < 16 else "unquantized", BITS.get(b, BITS[16]), "") for b in bits]
    return entries + [(f"groups of {g}", PAPER, HATCHES.get(g, "")) for g in groups]


def _draw_legend(
    axis: Any,
    entries: Sequence[tuple[str, str, str]],
    place: tuple[float, float],
    per_line: int,
    narrow: bool,
) -> None:
    """Swatches with their texts, and a line on what areas mean."""
    from matplotlib.patches import Rectangle

    x, y = place
    for i, (text, colour, hatch) in enumerate(entries):
        at = (x + 106 * (i % per_line), y + LEGEND * (i // per_line))
        box = ((at[0], at[1] - 7), 18, 13)
        axis.add_patch(Rectangle(*box, facecolor=colour, edgecolor=MUTED, linewidth=0.6))
        if hatch:
            axis.add_patch(Rectangle(*box, fill=False, edgecolor=INK, linewidth=0, hatch=hatch))
        axis.text(at[0] + 24, at[1], text, va="center", fontsize=9 if narrow else 10)
    lines = -(-len(entries) // per_line)
    note = "area: bytes (* drawn wider)" if narrow else "A bar's area is its bytes (* drawn wider)"
    axis.text(x, y + LEGEND * lines, note, va="center", fontsize=9 if narrow else 10, color=MUTED)


def column_lines(layers: Sequence[LayerInfo]) -> list[list[str]]:
    """The same as a table's lines: projection, layers, configurations, bytes, share."""
    grid = make_grid(layers)
    total = max(1, sum(layer.bytes for layer in layers))
    groups = [
        (column.label, [layer for cell in column.cells.values() for layer in cell])
        for column in grid.columns
    ] + [(layer.path.rpartition(".")[2], [layer]) for layer in grid.ends]
    lines = []
    for label, group in groups:
        counts = Counter(layer.config for layer in group)
        size = sum(layer.bytes for layer in group)
        forms = ", ".join(f"{number} x {config}" for config, number in sorted(counts.items()))
        lines.append([label, str(len(group)), forms, human(size), f"{size / total:.1%}"])
    return lines
