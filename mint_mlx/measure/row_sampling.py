"""NMSE from a stratified random sample of rows, with its standard error.

Each expert's rows are cut into as many strata of equal length as rows are drawn, one at random from
each; where that is too few the strata are halved and the empty halves drawn from. A row holds whole
groups, so their errors are exact.

Errors are dear to measure and vary from row to row mostly because the range of the weights in a
group does, which is cheap. So two samples are taken (double sampling; Cochran, Sampling Techniques,
3rd ed., sections 6.3 and 12.8): the sum of squared ranges over the sum of squares on many rows, the
squared error over the sum of squared ranges on fewer. The product estimates the NMSE, and its
relative variance is the sum of both (each with the finite-population correction; that strata make
it somewhat less is not counted on). Where the squared error over the sum of squares on the fewer
rows is the surer one, that is the estimate. The sum of squares of the whole layer is held to half
the error of an NMSE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base.quant_config import QuantConfig
from .distortion import row_errors, row_ranges
from .sample import AUTO

SEED = 0
TOLERANCE = 0.02  # largest relative standard error of an NMSE
WHOLE = 1 << 20  # a layer of at most so many weights is measured whole
FIRST = 1 << 14  # weights of an expert that are drawn at first
FIRST_OF_LAYER = 1 << 18  # and of a layer, however few experts it has
FEWEST = 8  # rows: fewer tell little of their own spread
OF_ENERGY = 0.5  # the standard error of a layer's sum of squares, as a part of TOLERANCE
OF_RANGES = 0.7  # the part of TOLERANCE that the first of the two ratios may take

Read = Callable[[np.ndarray, np.ndarray], Any]


@dataclass(frozen=True)
class Measured:
    """What a sample says of a layer.

    Attributes:
        nmse: float64 (configs, experts).
        energy: float64 (experts,), the sums of squares, estimated where not all rows were read.
        share: of the weights that were measured.
        error: the largest relative standard error of an NMSE.
        broken: rows with NaN or infinite weights; they count as zeros.
    """

    nmse: np.ndarray
    energy: np.ndarray
    share: float
    error: float
    broken: int = 0


def measure_sample(
    read: Read,
    shape: tuple[int, int, int],
    configs: Sequence[QuantConfig],
    sample: str,
    rng: np.random.Generator,
) -> Measured:
    """Measure a layer's configurations on rows that are drawn as they are needed.

    Args:
        read: called with experts (n,) and rows (n, k); returns an mx.array (n, k, columns).
        shape: experts, rows and columns of the layer.
        configs: what to measure.
        sample: as of `parse_sample`; `auto` draws until every standard error is under TOLERANCE.
        rng: draws.
    """
    experts, rows, _ = shape
    first = _first(shape, sample)
    if first == rows:
        everything = np.broadcast_to(np.arange(rows), (experts, rows))
        errors, energy = row_errors(read(np.arange(experts), everything), configs)
        broken = _put_aside(errors, energy)
        total = energy.sum(axis=-1)
        # An expert of zeros is restored exactly: its error is zero, not undefined.
        return Measured(
            errors.sum(axis=-1) / np.where(total > 0, total, 1), total, 1.0, 0.0, broken
        )
    drawn = _Drawn(read, rows, configs, _strata(rows, first, experts, rng))
    while sample == AUTO:
        few = drawn.of_energy() > OF_ENERGY * TOLERANCE
        unsure = few | (drawn.of_ranges().max(axis=0) > OF_RANGES * TOLERANCE)
        wide = np.nonzero(unsure & (drawn.count < rows))[0]
        if not len(wide):
            break
        drawn.double(wide, rng)
    drawn.measure(np.arange(experts), range(len(configs)), first)
    while sample == AUTO:
        far = drawn.spread() > TOLERANCE
        if not far.any():
            break
        drawn.go_on(far, rng)
    share, error = float(drawn.count.mean() / rows), float(drawn.spread().max(initial=0.0))
    return Measured(drawn.nmse(), drawn.total_energy(), share, error, drawn.broken)


class _Drawn:
    """The rows drawn of one layer, in the order of drawing, and what was measured on them.

    Attributes:
        order: int (experts, k), the rows; an expert's first `count` are drawn.
        count: int (experts,).
        ranges: float64 (group sizes, experts, k), sums over each row's groups of (max - min)^2.
        energy: float64 (experts, k), sums of squares.
        errors: float64 (configs, experts, k), squared errors of an expert's first `measured` rows.
        measured: int (configs, experts).
        broken: rows with NaN or infinite weights; they count as zeros.
    """

    def __init__(
        self, read: Read, rows: int, configs: Sequence[QuantConfig], first: np.ndarray
    ) -> None:
        experts, self.broken = len(first), 0
        self.read, self.rows, self.configs = read, rows, configs
        self.sizes = sorted({c.group_size for c in configs})
        self.group = np.array([self.sizes.index(c.group_size) for c in configs])
        self.order, self.count = np.zeros((experts, 0), dtype=int), np.zeros(experts, dtype=int)
        self.ranges, self.energy = np.zeros((len(self.sizes), experts, 0)), np.zeros((experts, 0))
        self.errors, self.measured = (
            np.zeros((len(configs), experts, 0)),
            np.zeros((len(configs), experts), dtype=int),
        )
        self._add(np.arange(experts), first)

    def _add(self, experts: np.ndarray, fresh: np.ndarray) -> None:
        """Draw rows (n, k) of experts (n,) that all have as many."""
        start = int(self.count[experts[0]])
        missing = start + fresh.shape[1] - self.order.shape[1]
        if missing > 0:
            pad = [(0, 0), (0, 0), (0, missing)]
            self.order, self.energy = np.pad(self.order, pad[1:]), np.pad(self.energy, pad[1:])
            self.ranges, self.errors = np.pad(self.ranges, pad), np.pad(self.errors, pad)
        place = slice(start, start + fresh.shape[1])
        self.order[experts, place] = fresh
        ranges, energy = row_ranges(self.read(experts, fresh), self.sizes)
        self.broken += _put_aside(ranges, energy)
        self.ranges[:, experts, place], self.energy[experts, place] = ranges, energy
        self.count[experts] += fresh.shape[1]

    def double(self, experts: np.ndarray, rng: np.random.Generator) -> None:
        """Draw as many rows again, or all that are left where half of them would be drawn then."""
        counts = self.count[experts]
        for count in np.unique(counts):
            some = experts[counts == count]
            before = np.sort(self.order[some, :count], axis=1)
            if 4 * count > self.rows:
                left = np.ones((len(some), self.rows), dtype=bool)
                np.put_along_axis(left, before, False, axis=1)
                fresh = rng.permuted(np.nonzero(left)[1].reshape(len(some), -1), axis=1)
            else:
                fresh = _other_halves(before, self.rows, rng)
            self._add(some, fresh)

    def measure(self, experts: np.ndarray, configs: Sequence[int], upto: int) -> None:
        """Measure some configurations on the first rows of some experts, all of which have them
        measured as far.
        """
        start = int(self.measured[configs[0], experts[0]])
        which, place = self.order[experts, start:upto], slice(start, upto)
        found, energy = row_errors(self.read(experts, which), [self.configs[c] for c in configs])
        _put_aside(found, energy)
        for index, config in enumerate(configs):
            self.errors[config, experts, place] = found[index]
            self.measured[config, experts] = upto

    def go_on(self, far: np.ndarray, rng: np.random.Generator) -> None:
        """Measure what is too uncertain, bool (configs, experts), on twice the rows; draw more
        where there are none.
        """
        spent = far & (self.measured == self.count)
        if spent.any():
            self.double(np.nonzero(spent.any(axis=0))[0], rng)
        for config in np.nonzero(far.any(axis=1))[0].tolist():
            before = self.measured[config].copy()
            for done in np.unique(before[far[config]]):
                experts = np.nonzero(far[config] & (before == done))[0]
                upto = np.minimum(2 * done, self.count[experts])
                for end in np.unique(upto):
                    self.measure(experts[upto == end], [config], int(end))

    def of_energy(self) -> float:
        """Relative standard error of the whole layer's sum of squares."""
        among = np.arange(self.order.shape[1]) < self.count[:, None]
        mean = self.energy.sum(axis=-1) / self.count
        apart = ((self.energy - mean[:, None]) ** 2 * among).sum(axis=-1) / np.maximum(
            self.count - 1, 1
        )
        variance = self.rows**2 * (1 - self.count / self.rows) * apart / self.count
        total = float(self.total_energy().sum())
        return float(np.sqrt(variance.sum())) / total if total > 0 else 0.0

    def of_ranges(self) -> np.ndarray:
        """Relative standard error of squared ranges over squares, (group sizes, experts)."""
        return _ratio(self.ranges, self.energy, self.count, self.rows)[1]

    def _parts(self) -> tuple[np.ndarray, np.ndarray]:
        """The NMSE and its relative standard error, both (configs, experts)."""
        among = np.arange(self.order.shape[1]) < self.measured[..., None]
        ranges, range_error = _ratio(self.ranges, self.energy, self.count, self.rows)
        error, error_error = _ratio(
            self.errors, self.ranges[self.group] * among, self.measured, self.rows
        )
        double, double_error = (
            error * ranges[self.group],
            np.hypot(range_error[self.group], error_error),
        )
        single, single_error = _ratio(self.errors, self.energy * among, self.measured, self.rows)
        better = double_error < single_error
        return np.where(better, double, single), np.where(better, double_error, single_error)

    def nmse(self) -> np.ndarray:
        """Estimates (configs, experts)."""
        return self._parts()[0]

    def spread(self) -> np.ndarray:
        """Their relative standard errors (configs, experts)."""
        return self._parts()[1]

    def total_energy(self) -> np.ndarray:
        """Sum of squares of each expert, float64 (experts,)."""
        return np.asarray(self.energy.sum(axis=-1) * self.rows / self.count)


def first_share(shape: tuple[int, int, int], sample: str) -> float:
    """The share of a layer (experts, rows, columns) that is measured at first."""
    return _first(shape, sample) / shape[1]


def _first(shape: tuple[int, int, int], sample: str) -> int:
    """Rows of each expert that are drawn at first."""
    experts, rows, columns = shape
    if sample != AUTO:
        return min(rows, max(2, int(np.ceil(float(sample) * rows))))
    if experts * rows * columns <= WHOLE:
        return rows
    count = max(FEWEST, -(-FIRST // columns), -(-FIRST_OF_LAYER // (columns * experts)))
    return rows if 2 * count > rows else count


def _put_aside(sums: np.ndarray, energy: np.ndarray) -> int:
    """Set what was summed over rows with NaN or infinite weights to zero, and say how many there
    are.
    """
    bad = ~np.isfinite(energy)
    sums[:, bad], energy[bad] = 0, 0
    return int(bad.sum())


def _edges(rows: int, count: int) -> np.ndarray:
    """Where `count` strata of as equal a length as can be begin and end."""
    return np.arange(count + 1) * rows // count


def _strata(rows: int, count: int, experts: int, rng: np.random.Generator) -> np.ndarray:
    """One row at random from each of `count` strata, for each expert: (experts, count)."""
    edges = _edges(rows, count)
    return np.asarray(edges[:-1] + (rng.random((experts, count)) * np.diff(edges)).astype(int))


def _other_halves(before: np.ndarray, rows: int, rng: np.random.Generator) -> np.ndarray:
    """One row at random from the half of each stratum that has none yet; `before` is ascending,
    (experts, count).
    """
    edges = _edges(rows, 2 * before.shape[1])
    low, middle, high = edges[:-1:2], edges[1::2], edges[2::2]
    upper = before < middle
    low, high = np.where(upper, middle, low), np.where(upper, high, middle)
    return np.asarray(low + (rng.random(before.shape) * (high - low)).astype(int))


def _ratio(
    over: np.ndarray, under: np.ndarray, n: np.ndarray, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ratio of two sums over the last axis, and its relative standard error (Cochran, eq. 6.13).

    Args:
        over, under: of the rows measured; rows that aren't are zeros, which add nothing.
        n: how many are.
        rows: of all.
    """
    total = under.sum(axis=-1)
    total = np.where(total > 0, total, 1)
    ratio = over.sum(axis=-1) / total
    apart = ((over - ratio[..., None] * under) ** 2).sum(axis=-1)
    deviation = np.sqrt((1 - n / rows) * n / np.maximum(n - 1, 1) * apart) / total
    return ratio, deviation / np.where(ratio > 0, ratio, 1)
