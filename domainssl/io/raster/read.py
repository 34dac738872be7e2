"""Pixels of one sensor over a rectangle of the world: decoded, resampled, masked.

Every band is read from its own grid. One that is coarser than asked for is repeated, one that is
finer is averaged over its valid pixels (backscatter as power); nothing is shifted by more than
half of a pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from domainssl.errors import DataError, setting
from domainssl.io.raster.bands import open_store
from domainssl.io.raster.geotiff import read_geotiff
from domainssl.io.raster.grid import Bounds, Grid
from domainssl.io.raster.layer import LayerFile, StoredBand
from domainssl.io.raster.safe import read_safe
from domainssl.missing import marks, tell
from domainssl.units import unit_change

__all__ = [
    "MaskRule",
    "Pixels",
    "Target",
    "conversion",
    "missing_of",
    "read_classes",
    "read_pixels",
]

Array = np.ndarray[Any, Any]
_WHOLE = 2**24  # up to there float32 holds every whole number
_DB = ("db", "decibel", "decibels")
_ONE = ("1", "reflectance", "unitless", "linear", "power", "m2/m2")


@dataclass(frozen=True)
class MaskRule:
    """Which values of a mask make a pixel invalid.

    Attributes:
        values: Class numbers, or bits.
        is_bits: The mask holds bit flags, and any of `values` counts.
    """

    values: tuple[int, ...] = ()
    is_bits: bool = False

    def hides(self, mask: Array) -> Array:
        """Return True where a pixel is to be left out; NaN in a mask of floats is no class."""
        unknown: Any = False
        if mask.dtype.kind == "f":
            unknown = ~np.isfinite(mask)
            mask = np.where(unknown, 0, mask).astype(np.int64)
        if self.is_bits:
            return unknown | np.asarray((mask & mask.dtype.type(sum(self.values))) != 0)
        return unknown | np.isin(mask, self.values)


@dataclass(frozen=True)
class Target:
    """What pixels are delivered as.

    Attributes:
        unit: `dn`, `reflectance`, `db`, or any other name for values taken as they are.
        stored_unit: What decoded values are; see `conversion` and `LayerFile.stored_unit`.
        step: Pixel size in CRS units.
        rule: Which mask values are left out.
    """

    unit: str
    stored_unit: str
    step: float
    rule: MaskRule = MaskRule()


@dataclass
class Pixels:
    """A rectangle of several dates.

    Attributes:
        values: float32 (T, C, H, W), 0 where not valid.
        valid: True where every band was measured and no mask hides it, (T, H, W).
        bytes_decoded: What came out of the decoder.
        bytes_needed: What was asked for, as stored.
    """

    values: Array
    valid: Array
    bytes_decoded: int = 0
    bytes_needed: int = 0

    def merged(self, counts: Sequence[int]) -> Pixels:
        """Merge runs of dates, `counts` long; of each run the first valid pixel counts."""
        ends = np.cumsum(counts)[:-1]
        values = []
        for theirs, valid in zip(np.split(self.values, ends), np.split(self.valid, ends)):
            first = valid.argmax(0)[None, None]
            values.append(np.take_along_axis(theirs, first, 0)[0])
        valid = np.stack([part.any(0) for part in np.split(self.valid, ends)])
        return replace(self, values=np.stack(values), valid=valid)


def conversion(
    band: StoredBand, unit: str, stored_unit: str, where: str
) -> tuple[str, float, float]:
    """Return how decoded values become `unit`: a kind, and factor and offset on stored numbers.

    Args:
        band: Where the values come from.
        unit: `dn` (Sentinel-2 numbers without offset), `reflectance`, `db`, or another name.
        stored_unit: `dn`, `dn+1000`, `reflectance`, `db`, `linear`, `amplitude`, or `auto`, which
            asks the attributes.
        where: How errors call the file.

    Returns:
        `linear` (value = factor·stored + offset), `power` (10·log10 of that) or `amplitude`
        (20·log10 of that).

    Raises:
        DataError: The attributes do not tell, or there is no way from one to the other.
    """
    source = _source_unit(band, unit, where) if stored_unit == "auto" else stored_unit
    change = unit_change(source, unit)
    if change is not None:
        kind, factor, addition = change
        if factor == 1.0:
            return kind, band.scale, band.offset + addition
        return kind, _tidy(band.scale * factor), _tidy((band.offset + addition) * factor)
    raise DataError(
        f"{where}: there is no way from stored {source!r} to value_unit {unit!r}. Set "
        f"{setting('stored_unit')}, to what the file holds: dn, dn+1000, reflectance, db, linear, "
        "amplitude or baseline."
    )


def _tidy(value: float) -> float:
    return float(f"{value:.12g}")  # 1e-4 · 1e4 is 1


def _source_unit(band: StoredBand, unit: str, where: str) -> str:
    text = band.unit.strip().lower()
    found = None
    if unit in ("dn", "reflectance"):
        if band.is_scaled:  # scale 1 means that only the +1000 is taken off
            found = "dn" if band.scale == 1.0 else "reflectance"
        elif band.is_integer:
            found = "dn"
        elif text in _ONE:
            found = "reflectance"
    elif unit == "db":
        found = "db" if text in _DB else "linear" if text in _ONE else None
    else:
        found = unit
    if found is None:
        raise DataError(
            f"{where}: band {band.name!r} has units {band.unit!r}, which does not say what its "
            f"numbers are. Set {setting('stored_unit')}: dn, dn+1000, reflectance, db, linear or "
            "amplitude."
        )
    return found


def read_pixels(file: LayerFile, dates: Sequence[int], bounds: Bounds, target: Target) -> Pixels:
    """Read all bands of some dates over a rectangle.

    Args:
        file: The layer.
        dates: Positions of the dates.
        bounds: In CRS units; its sides are multiples of the pixel size wanted.
        target: What to deliver.

    Raises:
        DataError: Something does not decode, or the grids do not fit each other.
    """
    height, width = (round(side / target.step) for side in (bounds.height, bounds.width))
    out = Pixels(
        np.empty((len(dates), len(file.bands), height, width), np.float32),
        np.ones((len(dates), height, width), bool),
    )
    zeros = _Zeros(file.bands, target.unit)
    for members in _together(file.bands):
        first = file.bands[members[0]]
        places = _Places.of(first.grid, bounds, target.step, (height, width), file.path)
        stored, hidden = _stored(file, [file.bands[m] for m in members], dates, places, out)
        for at, member in enumerate(members):
            band = file.bands[member]
            values, missing = _decode_dates(stored[at], hidden[at], band, dates, target, file)
            values, missing = places.resample(values, missing, in_power=target.unit == "db")
            out.values[:, member] = values
            if missing.any():
                out.valid &= ~missing
            zeros.look(stored[at], places)
    zeros.hide(out.valid)
    if file.mask is not None and target.rule.values:
        places = _Places.of(file.mask.grid, bounds, target.step, (height, width), file.path)
        [mask], _ = _stored(file, [file.mask], dates, places, out, is_map=True)
        out.valid &= ~places.any(target.rule.hides(mask) | missing_of(mask, file.mask))
    if not out.valid.all():
        out.values *= out.valid[:, None]
    return out


class _Zeros:
    """Pixels that are stored as 0 in every band of a sensor: no data, declared or not.

    That is so for Sentinel-2 (where one band alone may be 0: cirrus, deep water), and decibels of
    exactly 0 in every polarisation are what exports fill with.
    """

    def __init__(self, bands: Sequence[StoredBand], unit: str) -> None:
        least = {"dn": 3, "reflectance": 3, "db": 2}.get(unit)
        self._found: Any = None if least is None or len(bands) < least else True

    def look(self, stored: Array, places: _Places) -> None:
        """Look at the stored numbers (T, h, w) of one more band."""
        if self._found is not None:
            is_zero = stored == 0
            self._found = self._found & places.all(is_zero) if is_zero.any() else None

    def hide(self, valid: Array) -> None:
        """Take the pixels that were 0 in all bands out of `valid` (T, H, W)."""
        if self._found is not None:
            valid &= ~self._found


def read_classes(file: LayerFile, bounds: Bounds, step: float) -> tuple[Array, Array]:
    """Read the first band as whole numbers, nearest neighbour.

    Returns:
        Classes int64 (H, W), and True where there is one.
    """
    shape = (round(bounds.height / step), round(bounds.width / step))
    band = file.bands[0]
    places = _Places.of(band.grid, bounds, step, shape, file.path)
    [stored], [hidden] = _stored(file, [band], [0], places, None, is_map=True)
    missing = places.nearest(missing_of(stored, band) | hidden)[0]
    classes = np.where(missing, 0, places.nearest(stored)[0])
    return classes.astype(np.int64), ~missing


def _together(bands: Sequence[StoredBand]) -> list[list[int]]:
    """Group the bands that lie in one array, so that its chunks are decoded once."""
    groups: dict[tuple[str, str, Grid], list[int]] = {}
    for i, band in enumerate(bands):
        groups.setdefault((band.path, band.array, band.grid), []).append(i)
    return list(groups.values())


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Which rows and columns of a grid lie under the pixels of a rectangle.

    Attributes:
        rows: Contiguous rows to read, of the array.
        columns: Contiguous columns.
        down: Row of the read part below each delivered row's centre, north first.
        across: The same for columns.
        finer: Stored pixels along the side of a delivered one; 1 where nearest.
    """

    rows: slice
    columns: slice
    down: Array
    across: Array
    finer: int

    @classmethod
    def of(
        cls, grid: Grid, bounds: Bounds, step: float, shape: tuple[int, int], where: str
    ) -> _Places:
        ratio = step / grid.step
        finer = round(ratio) if ratio > 1.5 else 1
        if finer > 1 and abs(ratio - finer) > 1e-3 * ratio:
            raise DataError(
                f"{where}: pixels of {grid.step:g} cannot be averaged to {step:g}, which is "
                f"{ratio:g} times as large. Choose a gsd_m that is a multiple of theirs."
            )
        fine = step / finer
        rows = _centres(grid.top - bounds.top, shape[0] * finer, fine, grid.step)
        columns = _centres(bounds.left - grid.left, shape[1] * finer, fine, grid.step)
        for name, places, size in (("row", rows, grid.height), ("column", columns, grid.width)):
            if places[0] < 0 or places[-1] >= size:
                raise DataError(
                    f"{where}: {name}s {places[0]} to {places[-1]} are wanted of {size}; the "
                    "rectangle leaves the raster."
                )
        if grid.is_y_ascending:
            rows = grid.height - 1 - rows
        low = int(rows.min())
        return cls(
            rows=slice(low, int(rows.max()) + 1),
            columns=slice(int(columns[0]), int(columns[-1]) + 1),
            down=rows - low,
            across=columns - columns[0],
            finer=finer,
        )

    def nearest(self, values: Array) -> Array:
        """Lay the read part (..., h, w) out in pixels of `finer` per delivered one."""
        h, w = values.shape[-2:]
        if np.array_equal(self.down, np.arange(h)) and np.array_equal(self.across, np.arange(w)):
            return values
        return values[..., self.down[:, None], self.across[None]]

    def _blocks(self, values: Array) -> Array:
        h, w = values.shape[-2] // self.finer, values.shape[-1] // self.finer
        return values.reshape(*values.shape[:-2], h, self.finer, w, self.finer)

    def any(self, hidden: Array) -> Array:
        """Return True (..., H, W) where any stored pixel below is True."""
        laid = self.nearest(hidden)
        return np.asarray(self._blocks(laid).any((-3, -1))) if self.finer > 1 else laid

    def all(self, hidden: Array) -> Array:
        """Return True (..., H, W) where all stored pixels below are True."""
        return ~self.any(~hidden)

    def resample(self, values: Array, missing: Array, *, in_power: bool) -> tuple[Array, Array]:
        """Return float32 values and their mask on the delivered pixels, (..., H, W)."""
        values, missing = self.nearest(values), self.nearest(missing)
        if self.finer == 1:
            return values, missing
        if in_power:
            values = 10.0 ** (values / 10.0)
        kept = self._blocks(~missing)
        count = kept.sum((-3, -1))
        mean = (self._blocks(values) * kept).sum((-3, -1)) / np.maximum(count, 1)
        if in_power:
            mean = 10.0 * np.log10(np.where(count > 0, mean, 1.0))
        return mean.astype(np.float32), count == 0


def _centres(shift: float, count: int, step: float, stored_step: float) -> Array:
    """Return the stored pixel below each centre; `shift` is the distance of the outer edges."""
    centres = shift + (np.arange(count) + 0.5) * step
    # a centre on the border of two pixels belongs to the second, whatever rounding says
    return np.floor(centres / stored_step + 1e-6).astype(np.int64)


def _stored(
    file: LayerFile,
    bands: Sequence[StoredBand],
    dates: Sequence[int],
    places: _Places,
    tally: Pixels | None,
    is_map: bool = False,
) -> tuple[list[Array], list[Any]]:
    """Read bands of one array as stored, and True where a pixel is hidden, each (T, h, w)."""
    hidden: list[Any] = [False] * len(bands)
    if file.kind == "geotiff":
        values, masks, decoded = read_geotiff(
            bands[0].path or file.path,
            [b.index or 0 for b in bands],
            places.rows,
            places.columns,
            has_mask=any(b.has_mask for b in bands),
        )
        stored = [np.repeat(v[None], len(dates), 0) if len(dates) > 1 else v[None] for v in values]
        if masks is not None:
            hidden = [mask[None] for mask in masks]
    elif file.kind == "safe":
        values, decoded = read_safe(file.path, bands[0], places.rows, places.columns, file.options)
        stored = [np.repeat(values[None], len(dates), 0)]
    else:
        stored, hidden, decoded = _read_array(file, bands, dates, places, is_map)
    if tally is not None:
        tally.bytes_decoded += decoded
        tally.bytes_needed += sum(part.nbytes for part in stored)
    return stored, hidden


def _read_array(
    file: LayerFile,
    bands: Sequence[StoredBand],
    dates: Sequence[int],
    places: _Places,
    is_map: bool,
) -> tuple[list[Array], list[Any], int]:
    """Return bands of one array, True where chunks were never written, and the bytes decoded.

    A map of classes (`is_map`) may leave out chunks of its class 0.
    """
    first = bands[0]
    cube = open_store(first.path or file.path, file.options)
    indices = [band.index for band in bands if band.index is not None]
    distinct = sorted(set(indices))
    wanted: Mapping[str, Any] = {
        "y": places.rows,
        "x": places.columns,
        "band": _run(distinct),
        "time": slice(None),
    }
    parts, gaps, decoded = [], [], 0
    fill = cube.info(first.array).fill or 0
    marks_nothing = not is_map and fill not in first.nodata  # else decoding finds them
    together = _run(sorted(dates))  # dates that do not follow each other are read one by one
    date_runs = [together] if isinstance(together, slice) else [slice(d, d + 1) for d in dates]
    for run in date_runs if "time" in first.axes else [slice(0, 1)]:
        selection = [run if axis == "time" else wanted[axis] for axis in first.axes]
        values = cube.read(first.array, selection)
        decoded += cube.decoded_bytes(first.array, selection)
        absent = cube.unwritten(first.array, selection, values) if marks_nothing else None
        parts.append(_by_name(first.axes, values))
        gaps.append(None if absent is None else _by_name(first.axes, absent))

    def laid_out(parts: list[Array]) -> list[Array]:
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if "time" in first.axes and len(date_runs) == 1:
            whole = whole[np.asarray(dates) - min(dates)]
        elif "time" not in first.axes and len(dates) > 1:
            whole = np.repeat(whole, len(dates), 0)
        at = [distinct.index(b.index) if b.index is not None else 0 for b in bands]
        return [whole[:, i] for i in at]

    hidden: list[Any] = [False] * len(bands)
    if any(gap is not None for gap in gaps):
        full = [np.zeros(p.shape, bool) if g is None else g for p, g in zip(parts, gaps)]
        hidden = laid_out(full)
    return laid_out(parts), hidden, decoded


def _by_name(axes: Sequence[str], values: Array) -> Array:
    """Order the axes of what was read as (T, C, h, w)."""
    values = values.transpose([axes.index(a) for a in ("time", "band", "y", "x") if a in axes])
    if "band" not in axes:
        values = values[..., None, :, :]
    return values if "time" in axes else values[None]


def _run(indices: Sequence[int]) -> Any:
    """Return indices that follow each other as a slice."""
    if not indices:
        return slice(0, 1)
    low, high = indices[0], indices[-1]
    return slice(low, high + 1) if high - low + 1 == len(indices) else list(indices)


def missing_of(stored: Array, band: StoredBand) -> Array:
    """Return True where stored numbers mean that nothing was measured, for looking at too."""
    first, *others = band.nodata or (None,)
    missing = np.zeros(stored.shape, bool) if first is None else np.asarray(stored == first)
    for number in others:
        missing |= stored == number
    if stored.dtype.kind == "f":
        missing |= ~np.isfinite(stored)
    if band.limits is not None:
        missing |= (stored < band.limits[0]) | (stored > band.limits[1])
    return missing


def _decode_dates(
    stored: Array,
    hidden: Any,
    band: StoredBand,
    dates: Sequence[int],
    target: Target,
    file: LayerFile,
) -> tuple[Array, Array]:
    """Decode (T, h, w), each run of dates by its own stored unit."""
    units = [file.stored_unit(target.stored_unit, date) for date in dates]
    targets = {unit: replace(target, stored_unit=unit) for unit in units}
    if len(targets) == 1:
        return _decode(stored, hidden, band, targets[units[0]], file.path)
    hidden = np.broadcast_to(hidden, stored.shape)
    parts = [
        _decode(stored[i : i + 1], hidden[i : i + 1], band, targets[unit], file.path)
        for i, unit in enumerate(units)
    ]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _decode(
    stored: Array, hidden: Any, band: StoredBand, target: Target, where: str
) -> tuple[Array, Array]:
    """Return physical values in float32 and True where nothing was measured.

    Values that float32 cannot hold are missing: whole numbers beyond 2 ** 24, numbers beyond 3e38.
    """
    missing = missing_of(stored, band)
    if hidden is not False:
        missing |= hidden
    kind, factor, offset = conversion(band, target.unit, target.stored_unit, where)
    if kind == "linear":
        found = marks(stored, factor, offset, target.unit)
        if found is not None and (found & ~missing).any():
            tell(f"{band.path or where}, {band.name}", stored[found & ~missing])
            missing |= found
    if factor == 1.0 and offset.is_integer() and kind == "linear":  # exact in float32
        if stored.dtype.kind in "iu" and stored.dtype.itemsize > 2:
            missing |= (stored > _WHOLE) | (stored < -_WHOLE)
        with np.errstate(over="ignore", invalid="ignore"):
            plain = stored.astype(np.float32)
            plain += np.float32(offset)
        if stored.dtype.itemsize > 4:
            missing |= ~np.isfinite(plain)
        if missing.any():
            plain[missing] = 0
        return plain, missing
    values = stored.astype(np.float64)
    values *= factor
    values += offset
    if missing.any():
        values[missing] = 0
    if kind != "linear":
        missing = missing | (values <= 0)
        values = (10.0 if kind == "power" else 20.0) * np.log10(np.where(missing, 1.0, values))
    with np.errstate(over="ignore"):
        plain = values.astype(np.float32)
    if stored.dtype.kind == "f":
        missing = missing | ~np.isfinite(plain)
        plain[missing] = 0
    return plain, missing
