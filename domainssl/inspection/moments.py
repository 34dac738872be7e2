"""Count, mean, spread and distribution per band, in float64, of values that come in parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Classes", "Counts", "Grid", "Moments", "Relative"]

Array = np.ndarray[Any, Any]


_BITS = 14  # of a float32 that `Relative` drops: 9 of 23 digits of the fraction are left
_CHUNK = 1 << 19  # values that are counted or copied at a time


@dataclass(frozen=True)
class Grid:
    """Classes of a histogram: class i holds what is nearest to `low + i * step`.

    Attributes:
        low: Centre of the first class.
        high: Centre of the last one.
        step: Distance of the centres. Percentiles are exact to half of it, and exact for values
            that lie on the centres, as whole numbers do with step 1.
    """

    low: float
    high: float
    step: float

    @property
    def count(self) -> int:
        """Number of classes."""
        return round((self.high - self.low) / self.step) + 1

    @property
    def centres(self) -> Array:
        """Centres of the classes, (count,)."""
        return self.low + self.step * np.arange(self.count)

    def classes(self, x: Array) -> Array:
        """Return the class of each float64 value, -1 below and `count` above the grid."""
        found = np.rint((x - self.low) / self.step)
        return np.clip(found, -1, self.count, out=found).astype(np.int64)


@dataclass(frozen=True)
class Relative:
    """Classes for values of any size, as wide as 1/512 of the power of two below them.

    A class holds the float32 numbers with equal sign, exponent and first 9 digits of the fraction.
    """

    count: int = 1 << (32 - _BITS)
    step: str = "1/512 of the value"

    @property
    def centres(self) -> Array:
        """Middles of the classes, (count,); those of NaN and infinity are never used."""
        codes = (np.arange(self.count, dtype=np.uint32) << _BITS) | (1 << (_BITS - 1))
        bits = np.where(codes >> 31, codes ^ 0x80000000, ~codes).astype(np.uint32)
        with np.errstate(invalid="ignore"):
            return bits.view(np.float32).astype(np.float64)

    def classes(self, x: Array) -> Array:
        """Return the class of each finite value, ascending with the value."""
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        codes = np.where(bits >> 31, ~bits, bits | 0x80000000)
        return (codes >> _BITS).astype(np.int64)


Classes = Grid | Relative


class Moments:
    """What is known about the bands of one product so far.

    Two of them merge into that of both parts together (Chan, Golub and LeVeque 1979). The result
    depends on the order of merging in the last digits only, and not at all if it is the same. The
    `row` of every piece and the sum of the histograms are therefore kept, and merged at the end.

    Args:
        bands: Number of bands C.
        grid: Classes of the histogram.

    Attributes:
        count: Values per band, the same for all, because a pixel is valid in all bands or none.
        total: Pixels looked at, valid or not.
        mean: Mean, float64 (C,).
        squares: Sum of squared deviations from the mean, float64 (C,).
        low: Smallest value, (C,).
        high: Largest value, (C,).
        histogram: int64 (C, classes + 2); the first and last class hold what is outside.
        blank: Items that hold one value or nothing valid, kept apart from the rest.
    """

    def __init__(self, bands: int, grid: Classes) -> None:
        self.grid = grid
        self.count = 0
        self.total = 0
        self.mean = np.zeros(bands)
        self.squares = np.zeros(bands)
        self.low = np.full(bands, np.inf)
        self.high = np.full(bands, -np.inf)
        self.histogram = np.zeros((bands, grid.count + 2), np.int64)
        self.blank: list[str] = []

    @classmethod
    def measure(cls, values: Array, valid: Array, grid: Classes) -> Moments:
        """Measure one array; 8 and 16 bit numbers are counted, which is exact and faster.

        Args:
            values: Physical values of any real type, (C, ...).
            valid: True where a pixel counts, (...).
            grid: Classes of the histogram.
        """
        if values.dtype.itemsize <= 2 and values[0].size >= _CHUNK:
            counts = Counts(len(values), values.dtype)
            counts.add(values, valid)
            return counts.moments(grid)
        out = cls(len(values), grid)
        if valid.size > _CHUNK and len(valid) > 1:  # float64 copies of all at once would be large
            half = len(valid) // 2
            for part in (slice(half), slice(half, None)):
                out.merge(cls.measure(values[:, part], valid[part], grid))
            return out
        out.total = valid.size
        out.count = int(np.count_nonzero(valid))
        if not out.count:
            return out
        is_whole = out.count == out.total
        for band, plane in enumerate(values):
            x = (plane.reshape(-1) if is_whole else plane[valid]).astype(np.float64)
            out.mean[band] = mean = x.mean()
            out.low[band], out.high[band] = x.min(), x.max()
            out._count(band, grid.classes(x))
            x -= mean
            out.squares[band] = np.dot(x, x)
        return out

    def _count(self, band: int, classes: Array, times: Array | None = None) -> None:
        found = np.bincount(classes + 1, times, minlength=self.grid.count + 2)
        self.histogram[band] += found.astype(np.int64)

    def merge(self, other: Moments) -> None:
        """Take in another part."""
        self.total += other.total
        if not other.count:
            return
        count = self.count + other.count
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / count)
        self.squares = (
            self.squares + other.squares + delta * delta * (self.count * other.count / count)
        )
        self.count = count
        self.low = np.minimum(self.low, other.low)
        self.high = np.maximum(self.high, other.high)
        self.histogram += other.histogram

    @property
    def std(self) -> Array:
        """Standard deviation of the values themselves (divided by their count), (C,)."""
        return np.sqrt(self.squares / max(self.count, 1))

    def percentiles(self, percents: Sequence[float]) -> Array:
        """Return the smallest values that so many percent do not exceed, (len(percents), C).

        They are centres of classes; outside of the grid, the smallest and the largest value.
        """
        centres = self.grid.centres
        up_to = np.cumsum(self.histogram, axis=1)
        out = np.empty((len(percents), len(self.mean)))
        for row, percent in enumerate(percents):
            rank = max(1, int(np.ceil(self.count * percent / 100 - 1e-9)))
            for band, counts in enumerate(up_to):
                place = int(np.searchsorted(counts, rank))
                inside = 0 < place <= self.grid.count
                outside = self.low[band] if place == 0 else self.high[band]
                value = centres[place - 1] if inside else outside
                out[row, band] = min(max(value, self.low[band]), self.high[band])
        return out

    @property
    def row(self) -> Array:
        """Everything but the histogram: count, total, mean, squares, low, high; (2 + 4 C,)."""
        counts = np.array([self.count, self.total], np.float64)
        return np.concatenate([counts, self.mean, self.squares, self.low, self.high])

    @classmethod
    def of_rows(cls, rows: Array, histogram: Array, grid: Classes) -> Moments:
        """Merge pieces in the order of their rows (P, 2 + 4 C), whose histograms are summed up."""
        out, part = (cls(len(histogram), Grid(0, 0, 1)) for _ in range(2))
        for row in rows:
            part.count, part.total = int(row[0]), int(row[1])
            part.mean, part.squares, part.low, part.high = row[2:].reshape(4, -1)
            out.merge(part)
        out.grid, out.histogram = grid, histogram
        return out

    def __getstate__(self) -> dict[str, Any]:
        """Send a histogram as its used classes: of most bands they are few."""
        places = np.flatnonzero(self.histogram)
        sparse = (places, self.histogram.reshape(-1)[places], self.histogram.shape)
        return {**self.__dict__, "histogram": sparse}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the used classes."""
        places, times, shape = state["histogram"]
        histogram = np.zeros(shape, np.int64)
        histogram.reshape(-1)[places] = times
        self.__dict__.update(state, histogram=histogram)


class Counts:
    """How often each number of an 8 or 16 bit type occurs, per band.

    Mean, spread, extremes and classes follow from the counts, without another look at the values.

    Args:
        bands: Number of bands C.
        dtype: Integers, or float16.
    """

    def __init__(self, bands: int, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype.newbyteorder("=")
        self.codes = np.dtype(f"u{dtype.itemsize}")
        self.counts = np.zeros((bands, 1 << 8 * dtype.itemsize), np.int64)
        self.total = 0

    def add(self, values: Array, valid: Array) -> None:
        """Count the valid ones of `values` (C, ...), with `valid` (...)."""
        self.total += valid.size
        step = max(1, _CHUNK // max(1, valid[0].size))
        for start in range(0, len(valid), step):
            mask = valid[start : start + step]
            bad = ~mask
            few = int(np.count_nonzero(bad))
            for counts, plane in zip(self.counts, values, strict=True):
                part = plane[start : start + step].astype(self.dtype, copy=False).view(self.codes)
                if 2 * few > bad.size:
                    counts += self._count(part[mask])
                    continue
                counts += self._count(part.reshape(-1))
                if few:  # what does not count is taken back, because it is less
                    counts -= self._count(part[bad])

    def _count(self, codes: Array) -> Array:
        return np.bincount(codes, minlength=self.counts.shape[1])

    def moments(self, grid: Classes) -> Moments:
        """Return what the counts say."""
        out = Moments(len(self.counts), grid)
        out.total = self.total
        out.count = int(self.counts[0].sum())
        numbers = np.arange(self.counts.shape[1], dtype=self.codes).view(self.dtype)
        for band, counts in enumerate(self.counts if out.count else ()):
            (used,) = np.nonzero(counts)
            x, times = numbers[used].astype(np.float64), counts[used]
            out.mean[band] = mean = np.dot(x, times) / out.count
            out.low[band], out.high[band] = x.min(), x.max()
            out.squares[band] = np.dot((x - mean) ** 2, times)
            out._count(band, grid.classes(x), times)
        return out
