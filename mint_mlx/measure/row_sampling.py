"""NMSE from a stratified random sample of rows, with its standard error.

Each expert's rows are cut into as many strata of equal length as rows are drawn, one at random from
each; where that is too few the strata are halved and the empty halves drawn from. A row holds whole
groups, so their errors are exact.

Errors are costly to measure and vary from row to row mostly because the range of the weights in a
group does, which is cheap. So two samples are taken (double sampling; Cochran, Sampling Techniques,
3rd ed., sections 6.3 and 12.8): the sum of squared ranges over the sum of squares on many rows, the
squared error over the sum of squared ranges on fewer. The product estimates the NMSE, and its
relative variance is the sum of both, each with the finite-population correction (the strata make
it somewhat smaller, which is ignored). Where the squared error over the sum of squares on the fewer
rows has a smaller standard error, that is the estimate. The sum of squares of the whole layer, a
factor of its cost where a sensitivity is known, is estimated as well as an NMSE.

What weights of columns change in an NMSE is measured as a factor, on the rows that errors are
measured on: it varies little from row to row, since the columns are the same in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..base.quant_config import QuantConfig
from .distortion import RowErrors, columns_of, row_errors, row_ranges
from .sample import AUTO

SEED = 0
TOLERANCE = 0.02  # largest relative standard error of a layer's NMSE
OF_EXPERT = 0.05  # the same of an expert's, where the layer has many of them
WHOLE = 1 << 20  # a layer of at most so many weights is measured whole
FIRST = 1 << 13  # weights of an expert that are drawn at first
FIRST_OF_LAYER = 1 << 18  # weights of a layer that are drawn at first, however few experts it has
FEWEST = 8  # rows: the spread of fewer says little
OF_ENERGY = 1.0  # the standard error of a layer's sum of squares, as a fraction of TOLERANCE
OF_RANGES = 0.7  # the fraction of the tolerance that the first of the two ratios may take

# Called with experts (n,) and rows (n, k); returns their weights (n, k, columns).
Read = Callable[[np.ndarray, np.ndarray], mx.array]


@dataclass(frozen=True)
class Measured:
    """The errors of a layer, measured on a sample of its rows.

    Attributes:
        nmse: float64 (configs, experts).
        energy: float64 (experts,), the sums of squares, estimated where not all rows were read.
        share: of the weights that were measured.
        error: the largest relative standard error of an NMSE.
        broken: rows with NaN or infinite weights; they count as zeros.
        weighted: float64 (configs, experts), the NMSE with weights of the columns; None without.
    """

    nmse: np.ndarray
    energy: np.ndarray
    share: float
    error: float
    broken: int = 0
    weighted: np.ndarray | None = None


def measure_sample(
    read: Read,
    shape: tuple[int, int, int],
    configs: Sequence[QuantConfig],
    sample: str,
    rng: np.random.Generator,
    columns: np.ndarray | None = None,
) -> Measured:
    """Measure a layer's configurations on rows that are drawn as they are needed.

    Args:
        read: reads rows of the layer.
        shape: experts, rows and columns of the layer.
        configs: what to measure.
        sample: from `parse_sample`; `auto` draws until every standard error is small enough.
        rng: draws.
        columns: weights of the columns, (experts, columns) or (1, columns), or None.
    """
    experts, rows, _ = shape
    first = _first(shape, sample)
    if first == rows:
        return _measure_all(read, experts, rows, configs, columns)
    drawn = _Drawn(read, rows, configs, _strata(rows, first, experts, rng), columns)
    most = tolerance(experts)

    # The ranges and sums of squares are cheap: draw rows until these are certain enough.
    while sample == AUTO:
        energy_uncertain = drawn.energy_error() > OF_ENERGY * TOLERANCE
        ranges_uncertain = drawn.ranges_error().max(axis=0) > OF_RANGES * most
        uncertain = (energy_uncertain | ranges_uncertain) & (drawn.count < rows)
        if not uncertain.any():
            break
        drawn.double(np.nonzero(uncertain)[0], rng)

    # The errors are costly: measure them on as few of these rows as will do.
    drawn.measure(np.arange(experts), range(len(configs)), first)
    while sample == AUTO:
        uncertain = drawn.nmse_error() > most
        if not uncertain.any():
            break
        drawn.measure_more(uncertain, rng)

    return Measured(
        nmse=drawn.nmse(),
        energy=drawn.total_energy(),
        share=float(drawn.count.mean() / rows),
        error=float(drawn.nmse_error().max(initial=0.0)),
        broken=drawn.broken,
        weighted=drawn.weighted_nmse(),
    )


def _measure_all(
    read: Read,
    experts: int,
    rows: int,
    configs: Sequence[QuantConfig],
    columns: np.ndarray | None,
) -> Measured:
    """Measure a layer's configurations on all rows."""
    all_rows = np.broadcast_to(np.arange(rows), (experts, rows))
    sums = row_errors(read(np.arange(experts), all_rows), configs, columns)
    broken = _zero_broken(sums)
    total = sums.energy.sum(axis=-1)
    nmse = _over(sums.errors.sum(axis=-1), total)
    weighted = None
    if sums.weighted_errors is not None and sums.weighted_energy is not None:
        weighted = _over(sums.weighted_errors.sum(axis=-1), sums.weighted_energy.sum(axis=-1))
    return Measured(nmse, total, 1.0, 0.0, broken, weighted)


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
        columns: weights of the columns, (experts, columns) or (1, columns), or None.
        sums: float64 (4, configs, experts), of the rows measured: squared errors and squares, then
            both with weights of the columns.
    """

    def __init__(
        self,
        read: Read,
        rows: int,
        configs: Sequence[QuantConfig],
        first: np.ndarray,
        columns: np.ndarray | None,
    ) -> None:
        """Draw the first rows (experts, k) of every expert; `rows` is the number of all."""
        experts = len(first)
        self.read = read
        self.rows = rows
        self.configs = configs
        self.sizes = sorted({c.group_size for c in configs})
        self.group = np.array([self.sizes.index(c.group_size) for c in configs])

        self.broken = 0
        self.order = np.zeros((experts, 0), dtype=int)
        self.count = np.zeros(experts, dtype=int)
        self.ranges = np.zeros((len(self.sizes), experts, 0))
        self.energy = np.zeros((experts, 0))
        self.errors = np.zeros((len(configs), experts, 0))
        self.measured = np.zeros((len(configs), experts), dtype=int)
        self.columns = columns
        self.sums = np.zeros((4, len(configs), experts))
        self._add(np.arange(experts), first)

    def _add(self, experts: np.ndarray, rows: np.ndarray) -> None:
        """Draw rows (n, k) of experts (n,), all of which have as many drawn already."""
        start = int(self.count[experts[0]])
        end = start + rows.shape[1]
        missing = end - self.order.shape[1]
        if missing > 0:
            pad = [(0, 0), (0, 0), (0, missing)]
            self.order = np.pad(self.order, pad[1:])
            self.energy = np.pad(self.energy, pad[1:])
            self.ranges = np.pad(self.ranges, pad)
            self.errors = np.pad(self.errors, pad)

        ranges, energy = row_ranges(self.read(experts, rows), self.sizes)
        self.broken += _zero_broken(RowErrors(ranges, energy))
        self.order[experts, start:end] = rows
        self.ranges[:, experts, start:end] = ranges
        self.energy[experts, start:end] = energy
        self.count[experts] = end

    def double(self, experts: np.ndarray, rng: np.random.Generator) -> None:
        """Draw as many rows again, or all that remain where more than half would be drawn then."""
        counts = self.count[experts]
        for count in np.unique(counts):
            group = experts[counts == count]
            before = np.sort(self.order[group, :count], axis=1)
            if 4 * count > self.rows:
                undrawn = np.ones((len(group), self.rows), dtype=bool)
                np.put_along_axis(undrawn, before, False, axis=1)
                remaining = np.nonzero(undrawn)[1].reshape(len(group), -1)
                rows = rng.permuted(remaining, axis=1)
            else:
                rows = _other_halves(before, self.rows, rng)
            self._add(group, rows)

    def measure(self, experts: np.ndarray, configs: Sequence[int], end: int) -> None:
        """Measure configurations on the first `end` rows of experts, all measured equally far."""
        start = int(self.measured[configs[0], experts[0]])
        weights = self.read(experts, self.order[experts, start:end])
        columns = columns_of(self.columns, experts)
        sums = row_errors(weights, [self.configs[c] for c in configs], columns)
        _zero_broken(sums)
        for index, config in enumerate(configs):
            self.errors[config, experts, start:end] = sums.errors[index]
            self.measured[config, experts] = end
            if sums.weighted_errors is not None and sums.weighted_energy is not None:
                rows = (sums.errors[index], sums.energy, sums.weighted_errors[index])
                for total, values in zip(self.sums, (*rows, sums.weighted_energy), strict=True):
                    total[config, experts] += values.sum(axis=-1)

    def measure_more(self, uncertain: np.ndarray, rng: np.random.Generator) -> None:
        """Measure on twice the rows, drawing more where all drawn rows are measured.

        Args:
            uncertain: bool (configs, experts), what to measure further.
            rng: draws.
        """
        exhausted = uncertain & (self.measured == self.count)
        if exhausted.any():
            self.double(np.nonzero(exhausted.any(axis=0))[0], rng)
        for config in np.nonzero(uncertain.any(axis=1))[0].tolist():
            before = self.measured[config].copy()
            for done in np.unique(before[uncertain[config]]):
                experts = np.nonzero(uncertain[config] & (before == done))[0]
                ends = np.minimum(2 * done, self.count[experts])
                for end in np.unique(ends):
                    self.measure(experts[ends == end], [config], int(end))

    def energy_error(self) -> float:
        """Relative standard error of the whole layer's sum of squares."""
        is_drawn = np.arange(self.order.shape[1]) < self.count[:, None]
        mean = self.energy.sum(axis=-1) / self.count
        squares = ((self.energy - mean[:, None]) ** 2 * is_drawn).sum(axis=-1)
        row_variance = squares / np.maximum(self.count - 1, 1)
        variance = self.rows**2 * (1 - self.count / self.rows) * row_variance / self.count
        total = float(self.total_energy().sum())
        return float(np.sqrt(variance.sum())) / total if total > 0 else 0.0

    def ranges_error(self) -> np.ndarray:
        """Relative standard error of squared ranges over squares, (group sizes, experts)."""
        return _ratio(self.ranges, self.energy, self.count, self.rows)[1]

    def _estimates(self) -> tuple[np.ndarray, np.ndarray]:
        """The NMSE and its relative standard error, both (configs, experts)."""
        is_measured = np.arange(self.order.shape[1]) < self.measured[..., None]
        ranges, ranges_error = _ratio(self.ranges, self.energy, self.count, self.rows)
        measured_ranges = self.ranges[self.group] * is_measured
        errors, errors_error = _ratio(self.errors, measured_ranges, self.measured, self.rows)
        double = errors * ranges[self.group]
        double_error = np.hypot(ranges_error[self.group], errors_error)

        # The plain ratio on the fewer rows is the better one where ranges explain little.
        measured_energy = self.energy * is_measured
        single, single_error = _ratio(self.errors, measured_energy, self.measured, self.rows)
        better = double_error < single_error
        return np.where(better, double, single), np.where(better, double_error, single_error)

    def nmse(self) -> np.ndarray:
        """Estimates (configs, experts)."""
        return self._estimates()[0]

    def weighted_nmse(self) -> np.ndarray | None:
        """Estimates (configs, experts) with weights of the columns; None where there are none."""
        if self.columns is None:
            return None
        errors, energy, weighted_errors, weighted_energy = self.sums
        plain = _over(errors, energy)
        factor = _over(weighted_errors, weighted_energy) / np.where(plain > 0, plain, 1)
        return self.nmse() * factor

    def nmse_error(self) -> np.ndarray:
        """Relative standard errors of the estimates (configs, experts)."""
        return self._estimates()[1]

    def total_energy(self) -> np.ndarray:
        """Sum of squares of each expert, float64 (experts,)."""
        return np.asarray(self.energy.sum(axis=-1) * self.rows / self.count)


def tolerance(experts: int) -> float:
    """The largest relative standard error of an expert's NMSE.

    That of the layer, a mean over all of them, is then at most TOLERANCE.
    """
    return min(OF_EXPERT, float(TOLERANCE * experts**0.5))


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


def _zero_broken(sums: RowErrors) -> int:
    """Zero, in place, the sums of rows with NaN or infinite weights; returns how many there are."""
    broken = ~np.isfinite(sums.energy)
    for array in sums:
        if array is not None:
            array[..., broken] = 0
    return int(broken.sum())


def _over(errors: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """Errors over sums of squares; zero for an expert of zeros, which is restored exactly."""
    return np.asarray(errors / np.where(energy > 0, energy, 1))


def _edges(rows: int, count: int) -> np.ndarray:
    """Where `count` strata of nearly equal length begin and end, int (count + 1,)."""
    return np.arange(count + 1) * rows // count


def _strata(rows: int, count: int, experts: int, rng: np.random.Generator) -> np.ndarray:
    """One row at random from each of `count` strata, for each expert: (experts, count)."""
    edges = _edges(rows, count)
    return np.asarray(edges[:-1] + (rng.random((experts, count)) * np.diff(edges)).astype(int))


def _other_halves(before: np.ndarray, rows: int, rng: np.random.Generator) -> np.ndarray:
    """One row at random from the half of each stratum that has none yet, (experts, count).

    Args:
        before: the rows drawn already, ascending, (experts, count).
        rows: the number of all.
        rng: draws.
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
        over, under: of the measured rows; all others must be zeros, which add nothing.
        n: number of measured rows.
        rows: number of all rows.
    """
    total = under.sum(axis=-1)
    total = np.where(total > 0, total, 1)
    ratio = over.sum(axis=-1) / total
    residual = ((over - ratio[..., None] * under) ** 2).sum(axis=-1)
    deviation = np.sqrt((1 - n / rows) * n / np.maximum(n - 1, 1) * residual) / total
    return ratio, deviation / np.where(ratio > 0, ratio, 1)
