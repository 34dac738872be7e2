"""Count, mean, spread and distribution per band, in float64, of values that come in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Grid", "Moments"]

Array = np.ndarray[Any, Any]


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


class Moments:
    """What is known about the bands of one product so far.

    Two of them merge into that of both parts together (Chan, Golub and LeVeque 1979). The result
    depends on the order of merging in the last digits only, and not at all if it is the same.

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
    """

    def __init__(self, bands: int, grid: Grid) -> None:
        self.grid = grid
        self.count = 0
        self.total = 0
        self.mean = np.zeros(bands)
        self.squares = np.zeros(bands)
        self.low = np.full(bands, np.inf)
        self.high = np.full(bands, -np.inf)
        self.histogram = np.zeros((bands, grid.count + 2), np.int64)

    @classmethod
    def measure(cls, values: Array, valid: Array, grid: Grid) -> Moments:
        """Measure one part.

        Args:
            values: Physical values of any real type, (C, ...).
            valid: True where a pixel counts, (...).
            grid: Classes of the histogram.
        """
        out = cls(len(values), grid)
        out.total = valid.size
        out.count = int(np.count_nonzero(valid))
        if not out.count:
            return out
        is_whole = out.count == out.total
        for band, plane in enumerate(values):
            x = (plane.reshape(-1) if is_whole else plane[valid]).astype(np.float64)
            out.mean[band] = mean = x.mean()
            out.low[band], out.high[band] = x.min(), x.max()
            classes = np.rint((x - grid.low) / grid.step)
            np.clip(classes, -1, grid.count, out=classes)
            out.histogram[band] = np.bincount(
                classes.astype(np.int64) + 1, minlength=grid.count + 2
            )
            x -= mean
            out.squares[band] = np.dot(x, x)
        return out

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
        centres = self.grid.low + self.grid.step * np.arange(self.grid.count)
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

    def arrays(self, prefix: str) -> dict[str, Array]:
        """Return the state as arrays, their names begun with `prefix`."""
        return {
            f"{prefix}counts": np.array([self.count, self.total]),
            f"{prefix}mean": self.mean,
            f"{prefix}squares": self.squares,
            f"{prefix}low": self.low,
            f"{prefix}high": self.high,
            f"{prefix}histogram": self.histogram,
        }

    @classmethod
    def restore(cls, arrays: Mapping[str, Array], prefix: str, grid: Grid) -> Moments:
        """Return what `arrays` described.

        Raises:
            KeyError: An array is missing.
        """
        mean = arrays[f"{prefix}mean"]
        out = cls(len(mean), grid)
        out.count, out.total = (int(n) for n in arrays[f"{prefix}counts"])
        out.mean, out.squares = mean, arrays[f"{prefix}squares"]
        out.low, out.high = arrays[f"{prefix}low"], arrays[f"{prefix}high"]
        out.histogram = arrays[f"{prefix}histogram"]
        return out
