"""Whether Sentinel-2 numbers that say nothing about it still carry the offset of +1000."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from domainssl.errors import DataError
from domainssl.io.raster.layer import OFFSET_BASELINE, LayerFile
from domainssl.io.raster.places import stages
from domainssl.io.raster.read import MaskRule, Target, read_pixels
from domainssl.sensors import DARK_DN, DARK_FRACTION, L1C_BANDS

__all__ = ["is_before_offset", "settled_unit", "unsettled"]

_START = np.datetime64("2022-01-25")  # first products of baseline 04.00
_CHOICE = (
    "dn (numbers without the offset; also where the model was trained on these numbers as they "
    "are) or dn+1000 (still in)"
)
_DATES = 8  # dates of a series that are looked at, on each side of the first date of 04.00


def settled_unit(
    file: LayerFile, dates: Sequence[int], unit: str, value_unit: str, rule: MaskRule
) -> str:
    """Return the stored unit, where `auto` is settled by what the file or its pixels say.

    Whole numbers of Sentinel-2 without scale and offset are `dn` if their processing baseline is
    earlier than 04.00, or if more than 1 % of the pixels are darker than 500 in some band, which
    with the offset would be reflectances below -0.05.

    Args:
        file: The layer.
        dates: Positions of the dates that are read.
        unit: As asked for, see `conversion`.
        value_unit: What is delivered.
        rule: Which mask values are left out.

    Raises:
        DataError: Nothing tells whether the offset is in.
    """
    reason = unsettled(file, dates, unit, value_unit, rule, option="--stored_unit")
    if reason:
        raise DataError(reason)
    plain = [band.is_integer and not band.is_scaled for band in file.bands]
    is_known = unit == "auto" and file.kind != "safe" and value_unit in ("dn", "reflectance")
    is_optical = {band.name for band in file.bands} <= set(L1C_BANDS)
    return "dn" if is_known and is_optical and all(plain) else unit


def is_before_offset(time: np.datetime64) -> bool:
    """Tell whether a date is earlier than the first products of baseline 04.00; unknown is not."""
    return bool(time < _START)


def unsettled(
    file: LayerFile,
    dates: Sequence[int],
    unit: str,
    value_unit: str,
    rule: MaskRule,
    *,
    option: str,
) -> str:
    """Return why nothing settles whether numbers carry the offset; empty where something does.

    Args:
        file: The layer; see `settled_unit` for it and the rest.
        dates: Positions of the dates that are looked at.
        unit: As asked for.
        value_unit: What is delivered.
        rule: Which mask values are left out.
        option: What sets the stored unit.

    Raises:
        DataError: A part that is looked at cannot be read.
    """
    if unit != "auto" or file.kind == "safe" or value_unit not in ("dn", "reflectance"):
        return ""
    silent_bands = [band for band in file.bands if band.is_integer and band.offset == 0.0]
    if not silent_bands or not {band.name for band in file.bands} <= set(L1C_BANDS):
        return ""
    if all(band.is_byte and not band.is_scaled for band in file.bands):
        return (
            f"{file.path}: numbers of one byte (0 to 255), as previews and pictures have them, are "
            "no digital numbers of Sentinel-2 (0 to 10000 and more). Read the product itself; "
            f"{option} dn takes them as they are."
        )
    known = [file.baselines[date] if file.baselines else None for date in dates]
    late = [d for d, b in zip(dates, known, strict=True) if b is not None and b >= OFFSET_BASELINE]
    is_scaled = any(band.is_scaled for band in silent_bands)
    if late and not (is_scaled and _shows_dark(file, late, rule)):
        baseline = file.baselines[late[0]]
        return (
            f"{file.path}: of Sentinel-2 processing baseline {baseline:05.2f}, whose numbers are "
            "1000 too high, and its attributes do not say whether that is still in. Set "
            + (
                f"the offset of its scale, such as with gdal_edit.py -offset -0.1, or {option} to "
                "reflectance where it is off."
                if is_scaled
                else f"{option} to dn+1000 (still in) or dn (taken off)."
            )
        )
    if is_scaled:
        return ""  # a scale without an offset says what the numbers are, but for late baselines
    silent = [date for date, baseline in zip(dates, known, strict=True) if baseline is None]
    before = [date for date in silent if is_before_offset(file.times[date])]
    for group in (before, [date for date in silent if date not in before]):
        if group and not _shows_dark(file, group, rule):
            days = sorted(str(file.times[d])[:10] for d in group if not np.isnat(file.times[d]))
            when = f" of {days[0]}" if days else ""
            return (
                f"{file.path}: nothing says whether the Sentinel-2 numbers{when} still carry the "
                "offset of +1000 of processing baseline 04.00 and later: no baseline is in its "
                f"name or attributes, and at most {DARK_FRACTION:.0%} of the pixels are darker "
                f"than {DARK_DN}, which would show that it is off. Set {option} to {_CHOICE}."
            )
    return ""


def _shows_dark(file: LayerFile, dates: Sequence[int], rule: MaskRule) -> bool:
    """Tell whether one of some dates is too dark to carry the offset."""
    shown = dates[:: -(-len(dates) // _DATES)]
    return any(_is_dark(file, date, rule) for date in shown)


def _is_dark(file: LayerFile, date: int, rule: MaskRule) -> bool:
    """Tell whether too many pixels of a date are too dark to carry the offset, or none is there."""
    step = min(band.grid.step for band in file.bands)
    bounds = file.bounds
    shape = [int(side / step + 1e-6) for side in (bounds.height, bounds.width)]
    is_scaled = any(band.is_scaled for band in file.bands)
    target = Target("dn", "reflectance" if is_scaled else "dn", step, rule)
    dark = measured = 0
    for stage in stages(shape):
        for row, column, side in stage:
            height, width = min(side, shape[0] - row), min(side, shape[1] - column)
            part = bounds.part(row, column, height, width, step)
            pixels = read_pixels(file, [date], part, target)
            values: Any = pixels.values[0]
            seen = pixels.valid[0] & (values != 0).any(0)
            # 0 and numbers below -1000 are marks of no data that nobody declared
            is_low = ((values < DARK_DN) & (values != 0) & (values >= -1000)).any(0)
            dark += int((is_low & seen).sum())
            measured += int(seen.sum())
        if measured:
            return dark > DARK_FRACTION * measured
    return True
