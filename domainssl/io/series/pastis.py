"""PASTIS (also -R and -HD) on disk: one geojson of patches, one array per patch and sensor."""

from __future__ import annotations

import hashlib
import json
import re
import tokenize
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.errors import DataError, UnreadableError, parsing
from domainssl.files import open_regular, read_json
from domainssl.io.raster.gdal import open_raster, reading
from domainssl.io.series.tile import Array, Image, Series, Tile, Unit

__all__ = ["CLASSES", "SERIES", "VOID", "Patch", "PastisCatalogue", "read_pastis", "scan_pastis"]

CLASSES = (
    "Background", "Meadow", "Soft winter wheat", "Corn", "Winter barley", "Winter rapeseed",
    "Spring barley", "Sunflower", "Grapevine", "Beet", "Winter triticale", "Winter durum wheat",
    "Fruits, vegetables, flowers", "Potatoes", "Leguminous fodder", "Soybeans", "Orchard",
    "Mixed cereal", "Sorghum",
)  # fmt: skip
VOID = 19
_TRIES = 4  # patches that are opened for the size of all
# key -> (folder, dates in the geojson, channels stored, channels used, unit)
SERIES: dict[str, tuple[str, str, int, int, Unit]] = {
    "s2": ("S2", "dates-S2", 10, 10, "dn"),
    "s1_asc": ("S1A", "dates-S1A", 3, 2, "db"),  # VV, VH and their difference
    "s1_des": ("S1D", "dates-S1D", 3, 2, "db"),
}
SPOT_FOLDER = "DATA_SPOT/PASTIS_SPOT6_RVB_1M00_2019"
SPOT_DAY = int(np.datetime64("2019-07-01", "D").astype(np.int64))  # the files carry no date


@dataclass(frozen=True)
class Patch:
    """One patch: its number, its fold, and the days of each series since 1970-01-01."""

    id: str
    fold: int
    days: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class PastisCatalogue:
    """The patches of some folds.

    Attributes:
        root: Folder of the data set.
        folds: Folds they belong to.
        patches: The patches.
        side: Rows and columns of a patch in the series.
        problems: What was left out, and why.
    """

    root: str
    folds: tuple[int, ...]
    patches: tuple[Patch, ...]
    side: int
    problems: tuple[str, ...]

    @property
    def titles(self) -> tuple[str, ...]:
        """What the patches are called."""
        return tuple(each.id for each in self.patches)

    def identity(self) -> dict[str, Any]:
        """Return what tells this data set from others: hash of its table, number of patches."""
        table = Path(self.root) / "metadata.geojson"
        return {
            "table": table.name,
            "sha256": hashlib.sha256(table.read_bytes()).hexdigest(),
            "folds": list(self.folds),
            "patches": len(self.patches),
            "side": self.side,
        }


def scan_pastis(
    root: str, folds: Sequence[int], modalities: Collection[str]
) -> PastisCatalogue | None:
    """Find the patches of some folds; None where there are none of them.

    Args:
        root: Folder with `metadata.geojson`, `DATA_S2/` and so on.
        folds: Folds, 1 to 5.
        modalities: Keys that are read; patches that lack one of their files are left out.

    Raises:
        DataError: The table is missing or unreadable, or no patch is complete.
    """
    base = Path(root)
    table = base / "metadata.geojson"
    if not table.is_file():
        raise DataError(
            f"data.init_args.root={root!r}: there is no metadata.geojson; expected the folder of "
            "PASTIS with DATA_S2/ and ANNOTATIONS/. 'sample' is the embedded sample."
        )
    advice = "Expected a feature per patch with ID_PATCH, Fold, dates-S2, ..."
    content = read_json(table)
    with parsing(f"{table}: not laid out as published; it", advice=advice):
        patches = [_patch(feature) for feature in content["features"]]
    patches = [patch for patch in patches if patch.fold in folds]
    if not patches:
        return None
    there = {folder: _files(base / folder) for folder in {_path(m, "0")[0] for m in modalities}}
    kept: list[Patch] = []
    problems = []
    for name in modalities:
        lacking = [p.id for p in patches if _path(name, p.id)[1] not in there[_path(name, p.id)[0]]]
        if lacking:
            problems.append(
                f"{len(lacking)} of {len(patches)} patches have no {name} in "
                f"{_path(name, '0')[0]}/, such as {lacking[0]}; they are left out"
            )
    kept = [
        p for p in patches if all(_path(m, p.id)[1] in there[_path(m, p.id)[0]] for m in modalities)
    ]
    if not kept:
        raise DataError(f"{root}: no patch of the folds {list(folds)} is complete: {problems[0]}.")
    return PastisCatalogue(
        root=str(base),
        folds=tuple(folds),
        patches=tuple(kept),
        side=_side(base, kept),
        problems=tuple(problems),
    )


def _patch(feature: Mapping[str, Any]) -> Patch:
    facts = feature["properties"]
    days = {}
    for name, (_, column, *_rest) in SERIES.items():
        dates = facts.get(column) or {}
        if isinstance(dates, str):
            dates = json.loads(dates)
        ordered = [dates[place] for place in sorted(dates, key=int)]
        days[name] = tuple(_day(int(date)) for date in ordered)
    name = str(facts["ID_PATCH"])
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"ID_PATCH {name!r} is no part of a file name")
    return Patch(name, int(facts["Fold"]), days)


def _day(date: int) -> int:
    text = f"{date // 10_000:04d}-{date // 100 % 100:02d}-{date % 100:02d}"
    return int(np.datetime64(text, "D").astype(np.int64))


def _path(name: str, patch: str) -> tuple[str, str]:
    """Return folder and file of a modality (or of the annotations)."""
    if name == "spot":
        return SPOT_FOLDER, f"SPOT6_RVB_1M00_2019_{patch}.tif"
    if name == "classes":
        return "ANNOTATIONS", f"TARGET_{patch}.npy"
    folder = SERIES[name][0]
    return f"DATA_{folder}", f"{folder}_{patch}.npy"


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _side(base: Path, patches: Sequence[Patch]) -> int:
    """Return the side of patches, from an annotation or a series of the first ones.

    Raises:
        DataError: None of them has such a file that can be read.
    """
    problem = DataError(f"{base}: patch {patches[0].id} has neither annotation nor series.")
    for patch in patches[:_TRIES]:
        for name in ("classes", *SERIES):
            path = base.joinpath(*_path(name, patch.id))
            if path.is_file():
                try:
                    return int(_mapped(path).shape[-1])
                except UnreadableError as error:  # reading the patch names it
                    problem = error
    raise problem


def _mapped(path: Path) -> Array:
    # numpy takes the header apart as Python source, without running it
    with parsing(f"{path}: the array", also=(SyntaxError, tokenize.TokenError)):
        open_regular(path).close()  # mapping a pipe would wait
        found: Array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.memmap) or found.dtype.kind not in "iuf" or not found.ndim:
            raise ValueError("not one array of numbers in the .npy format")
    return found


def read_pastis(catalogue: PastisCatalogue, patch: Patch, modalities: Collection[str]) -> Tile:
    """Map the files of one patch; pixels are read when windows are cut out.

    Raises:
        DataError: A file cannot be read or is not laid out as published.
    """
    base, side = Path(catalogue.root), catalogue.side
    series = {}
    for name, (_, column, stored, used, unit) in SERIES.items():
        if name not in modalities:
            continue
        path = base.joinpath(*_path(name, patch.id))
        values, days = _mapped(path), patch.days[name]
        if values.shape != (len(days), stored, side, side):
            raise DataError(
                f"{path}: got the shape {values.shape}, expected ({len(days)}, {stored}, {side}, "
                f"{side}) for the {len(days)} dates in '{column}' of metadata.geojson."
            )
        if days:
            series[name] = Series(values[:, :used], np.array(days, np.int32), unit)
    images = {}
    decoded = 0
    if "spot" in modalities:
        images["spot"] = _read_spot(base.joinpath(*_path("spot", patch.id)), side)
        decoded = images["spot"].values.nbytes
    target = base.joinpath(*_path("classes", patch.id))
    classes = _classes(target, side) if target.is_file() else None
    return Tile(id=patch.id, images=images, series=series, classes=classes, bytes_decoded=decoded)


def _classes(path: Path, side: int) -> Array:
    values = _mapped(path)
    if values.ndim != 3 or values.shape[1:] != (side, side) or not len(values):
        raise DataError(f"{path}: got the shape {values.shape}, expected (n, {side}, {side}).")
    classes: Array = values[0]
    return classes


def _read_spot(path: Path, side: int) -> Image:
    expected = (3, 10 * side, 10 * side)
    with open_raster(path) as file, reading(path):
        if (file.count, file.height, file.width) != expected or set(file.dtypes) != {"uint8"}:
            raise DataError(
                f"{path}: got {file.dtypes[0]} of shape {(file.count, file.height, file.width)}, "
                f"expected uint8 {expected}, 1 m where the series have 10 m."
            )
        return Image(file.read(), SPOT_DAY)
