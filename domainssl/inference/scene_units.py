"""Refuse rasters whose values must be in another unit than the one that a backbone takes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from domainssl.errors import DataError
from domainssl.io.raster.grid import Bounds
from domainssl.io.raster.layer import LayerFile
from domainssl.io.raster.read import Target, read_pixels
from domainssl.modality import Modality
from domainssl.units import unit_of_item

__all__ = ["refuse_other_unit"]

_log = logging.getLogger(__name__)
_SIDE = 64  # pixels along the sides of a part that is looked at
_PLACES = (0.25, 0.75)  # of the parts along each axis
_LEAST = 256  # valid pixels of a part that counts
_SEEM = {
    "reflectance": "reflectance",
    "dn": "digital numbers",
    "linear": "linear power",
    "db": "decibels",
    "normalised": "values that are normalised already; the backbone does that itself",
    "offset": "digital numbers with the offset of 1000, by their cirrus band B10",
}
_STORED = {"reflectance": "reflectance", "dn": "dn", "linear": "linear", "db": "db",
           "offset": "dn+1000"}  # fmt: skip


def refuse_other_unit(
    file: LayerFile, dates: Sequence[int], modality: Modality, target: Target
) -> None:
    """Look at four parts of a raster, and refuse it where all that tell speak for another unit.

    Args:
        file: The raster.
        dates: Positions of the dates that are looked at.
        modality: What the backbone takes.
        target: What is delivered.

    Raises:
        DataError: They do. `--any_unit` takes the values as they are.
    """
    if file.kind == "safe":  # its metadata say what the numbers are
        return
    verdicts, low, high, measured = set(), float("inf"), float("-inf"), 0
    for part in _parts(file, target.step):
        try:
            pixels = read_pixels(file, dates, part, target)
        except DataError:  # of a damaged part the shard that needs it says so
            measured += 1
            continue
        values = pixels.values.swapaxes(0, 1)[:, pixels.valid].astype("float64")
        measured += values.shape[1]
        if values.shape[1] < _LEAST:
            continue
        verdicts.add(unit_of_item(values, modality))
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    if not measured:
        _log.warning(
            "%s: no valid pixel of %s in the parts that were looked at, read with --stored_unit "
            "%s; features are missing there", file.path, modality.name, target.stored_unit,
        )  # fmt: skip
    verdicts.discard("")
    if len(verdicts) != 1 or verdicts == {"fits"}:
        return
    [verdict] = verdicts
    seem = f"they seem to be {_SEEM[verdict]}" if verdict in _SEEM else "nothing measures them"
    better = _STORED.get(verdict)
    asked = f"--stored_unit {better}" if better else "--stored_unit to what the file holds"
    raise DataError(
        f"{file.path}: read with --stored_unit {target.stored_unit}, values of {modality.name} lie "
        f"in [{low:.5g}, {high:.5g}], but the weights take {modality.value_unit!r}; {seem}. Set "
        f"{asked}, or mend scale and offset of the file; --any_unit takes them as they are."
    )


def _parts(file: LayerFile, step: float) -> list[Bounds]:
    """Return squares around the quarters of what all bands cover; one where that is small."""
    bounds = file.bounds
    rows, columns = (int(side / step + 1e-6) for side in (bounds.height, bounds.width))
    found = {}
    for down in _PLACES:
        for across in _PLACES:
            height, width = min(_SIDE, rows), min(_SIDE, columns)
            row = min(max(0, int(rows * down) - height // 2), rows - height)
            column = min(max(0, int(columns * across) - width // 2), columns - width)
            if height and width:
                found[row, column] = bounds.part(row, column, height, width, step)
    return list(found.values())
