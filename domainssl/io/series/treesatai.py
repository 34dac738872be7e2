"""TreeSatAI Time Series on disk: tables of tiles, aerial GeoTIFFs, HDF5 files of series."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.errors import DataError, parsing
from domainssl.files import read_json, read_small
from domainssl.io.raster.gdal import open_raster, reading
from domainssl.io.raster.time import days, product_time
from domainssl.io.series.tile import Array, Image, Series, Tile
from domainssl.io.storage.hdf5 import dataset, open_hdf5, texts
from domainssl.io.tables import cut_row

__all__ = ["GENERA", "SERIES", "TreeSatCatalogue", "TreeSatTile", "read_treesat", "scan_treesat"]

GENERA = (
    "Betula", "Cleared", "Quercus", "Larix", "Fraxinus", "Alnus", "Pseudotsuga", "Prunus",
    "Fagus", "Acer", "Abies", "Pinus", "Tilia", "Picea", "Populus",
)  # fmt: skip
SERIES = {"s2": "sen-2", "s1_asc": "sen-1-asc", "s1_des": "sen-1-des"}  # key -> name in the files
_BANDS = {"s2": 10, "s1_asc": 2, "s1_des": 2}
_LABELS = "labels/TreeSatBA_v9_60m_multi_labels.json"
_FOLDERS = ("sentinel-ts", "sentinel")


@dataclass(frozen=True)
class TreeSatTile:
    """One row of a split.

    Attributes:
        aerial: File name in `aerial/`.
        sentinel: File name in the folder of the series.
        day: Day of the aerial image since 1970-01-01.
        shares: Share of the area of each genus, 0..1; empty where unknown.
    """

    aerial: str
    sentinel: str
    day: int
    shares: tuple[float, ...]

    @property
    def id(self) -> str:
        """Name of the tile: that of its aerial image."""
        return self.aerial.rsplit(".", 1)[0]


@dataclass(frozen=True, kw_only=True)
class TreeSatCatalogue:
    """The tiles of one split.

    Attributes:
        root: Folder of the data set.
        split: `train`, `val` or `test`.
        table: File that lists the tiles, relative to the root.
        folder: Folder of the series, relative to the root.
        tiles: The tiles.
        names: Genera in the order of the shares.
        problems: What was left out, and why.
    """

    root: str
    split: str
    table: str
    folder: str
    tiles: tuple[TreeSatTile, ...]
    names: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def titles(self) -> tuple[str, ...]:
        """What the tiles are called."""
        return tuple(each.id for each in self.tiles)

    def identity(self) -> dict[str, Any]:
        """Return what tells this split from others: hash of its table, size of its first files."""
        first = self.tiles[0]
        return {
            "table": self.table,
            "sha256": hashlib.sha256((Path(self.root) / self.table).read_bytes()).hexdigest(),
            "tiles": len(self.tiles),
            "first": first.sentinel,
            "bytes": (Path(self.root) / self.folder / first.sentinel).stat().st_size,
        }


def scan_treesat(root: str, split: str, modalities: Collection[str]) -> TreeSatCatalogue | None:
    """Find the tiles of a split; None where no table lists it.

    A split is listed by `<split>.csv` (file names, date and shares) or by
    `<split>_filenames.lst` with the shares in `labels/`.

    Args:
        root: Folder with `aerial/` and `sentinel-ts/` (or, in older copies, `sentinel/`).
        split: `train`, `val` or `test`.
        modalities: Keys that are read; tiles that lack one of their files are left out.

    Raises:
        DataError: Folders or columns are missing, or no tile is complete.
    """
    base = Path(root)
    table = base / f"{split}.csv"
    folder = next((name for name in _FOLDERS if (base / name).is_dir()), _FOLDERS[0])
    if table.is_file():
        names, tiles = _rows(table)
    elif (base / f"{split}_filenames.lst").is_file():
        table = base / f"{split}_filenames.lst"
        names, tiles = _listed(base, table, folder)
    else:
        return None
    kept, problems = _complete(base, folder, tiles, modalities)
    if not kept:
        raise DataError(
            f"{table}: none of its {len(tiles)} tiles has all its files in 'aerial/' and "
            f"'{folder}/' ({problems[0] if problems else 'the table is empty'}). Check that the "
            "archives are unpacked beside the table."
        )
    return TreeSatCatalogue(
        root=str(base),
        split=split,
        table=table.name,
        folder=folder,
        tiles=tuple(kept),
        names=names,
        problems=tuple(problems),
    )


def _rows(table: Path) -> tuple[tuple[str, ...], list[TreeSatTile]]:
    """Read a table with a header; genera are the columns after the first three."""
    with parsing(f"{table}: the table", also=(csv.Error,)):
        reader = csv.DictReader(io.StringIO(read_small(table), newline=""))
        columns = list(reader.fieldnames or ())
        missing = [c for c in ("aerial_name", "sen_name", "aerial_date") if c not in columns]
        if missing:
            raise DataError(
                f"{table}: no column {missing[0]!r} in {columns}; expected aerial_name, sen_name, "
                "aerial_date and one column per genus."
            )
        names = tuple(columns[3:])
        tiles = []
        rows = list(reader)
        if (cut := cut_row(rows)) is not None:
            raise DataError(f"{table}, {cut}")
        for number, row in enumerate(rows, 2):
            try:
                shares = tuple(float(row[name]) for name in names)
                day = _day(row["aerial_date"])
            except ValueError as error:
                raise DataError(
                    f"{table}, line {number}: {error}; expected a date as YYYYMMDD and a share "
                    "of the area for each genus."
                ) from error
            names_of = [_inside(row[column], table) for column in ("aerial_name", "sen_name")]
            tiles.append(TreeSatTile(names_of[0], names_of[1], day, shares))
    return names, tiles


def _inside(name: Any, table: Path) -> str:
    """Return a file name of a table if it is one: the files lie in the folders of the data set."""
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
        raise DataError(f"{table}: {name!r} is no file name; paths are not followed.")
    return name


def _listed(base: Path, table: Path, folder: str) -> tuple[tuple[str, ...], list[TreeSatTile]]:
    """Read a list of aerial names; series are found by their stem, shares in the labels."""
    labels: dict[str, Any] = {}
    if (base / _LABELS).is_file():
        labels = read_json(base / _LABELS)
        if not isinstance(labels, dict):
            raise DataError(f"{base / _LABELS}: a {type(labels).__name__}, expected a mapping.")
    listed = [Path(line).name for line in read_small(table).split()]
    if labels and listed and not any(name in labels for name in listed):
        raise DataError(
            f"{base / _LABELS}: names none of the {len(listed)} tiles of {table.name}: it has "
            f"{next(iter(labels))!r}, the list {listed[0]!r}. Take both from the same release."
        )
    by_stem: dict[str, str] = {}
    for name in sorted(_files(base / folder, ".h5")):
        by_stem[re.sub(r"_\d{4}$", "", name[:-3])] = name
    tiles = []
    for aerial in listed:
        sentinel = by_stem.get(aerial.rsplit(".", 1)[0], "")
        year = re.search(r"_(\d{4})\.h5$", sentinel)
        # the list has no dates: the middle of the year of the series
        day = _day(f"{year.group(1)}0701") if year else 0
        tiles.append(TreeSatTile(aerial, sentinel, day, _shares(labels.get(aerial), table)))
    return GENERA, tiles


def _shares(entry: Any, table: Path) -> tuple[float, ...]:
    """Return the shares of `[[genus, share], ...]` in the order of GENERA."""
    if entry is None:
        return ()
    with parsing(f"{table.parent / _LABELS}: an entry, expected [[genus, share], ...];"):
        found = {str(name): float(share) for name, share in entry}
    unknown = sorted(set(found) - set(GENERA))
    if unknown:
        raise DataError(
            f"{table.parent / _LABELS}: unknown genus {unknown[0]!r}; known are "
            f"{', '.join(GENERA)}."
        )
    return tuple(found.get(name, 0.0) for name in GENERA)


def _complete(
    base: Path, folder: str, tiles: Sequence[TreeSatTile], modalities: Collection[str]
) -> tuple[list[TreeSatTile], list[str]]:
    """Leave out tiles that lack a file."""
    aerial = _files(base / "aerial", "") if "aerial" in modalities else None
    series = _files(base / folder, ".h5") if set(modalities) & set(SERIES) else None
    without_aerial = [t for t in tiles if aerial is not None and t.aerial not in aerial]
    without_series = [t for t in tiles if series is not None and t.sentinel not in series]
    problems = []
    for lacking, where in ((without_aerial, "aerial"), (without_series, folder)):
        if lacking:
            problems.append(
                f"{len(lacking)} of {len(tiles)} tiles have no file in '{where}/', such as "
                f"{lacking[0].id}; they are left out"
            )
    gone = {t.id for t in (*without_aerial, *without_series)}
    return [t for t in tiles if t.id not in gone], problems


def _files(folder: Path, ending: str) -> set[str]:
    if not folder.is_dir():
        return set()
    return {path.name for path in folder.iterdir() if path.name.endswith(ending)}


def _day(date: str) -> int:
    """Return days since 1970-01-01 of YYYYMMDD."""
    text = f"{date[:4]}-{date[4:6]}-{date[6:8]}"
    return int(np.datetime64(text, "D").astype(np.int64))


def read_treesat(
    catalogue: TreeSatCatalogue, tile: TreeSatTile, modalities: Collection[str]
) -> Tile:
    """Read the files of one tile as they are stored.

    Raises:
        DataError: A file cannot be read or is not laid out as published.
    """
    base = Path(catalogue.root)
    images: dict[str, Image] = {}
    if "aerial" in modalities:
        images["aerial"] = _read_aerial(base / "aerial" / tile.aerial, tile.day)
    series: dict[str, Series] = {}
    wanted = [name for name in SERIES if name in modalities]
    if wanted:
        series = _read_series(base / catalogue.folder / tile.sentinel, wanted)
    decoded = sum(image.values.nbytes for image in images.values())
    decoded += sum(s.values.nbytes for s in series.values())
    return Tile(id=tile.id, images=images, series=series, bytes_decoded=decoded)


def _read_aerial(path: Path, day: int) -> Image:
    """Read near infrared, green, blue, red; the fourth band is called alpha and is none."""
    with open_raster(path) as file, reading(path):
        if (file.count, *file.shape) != (4, 304, 304) or set(file.dtypes) != {"uint8"}:
            raise DataError(
                f"{path}: got {file.dtypes[0]} of shape {(file.count, *file.shape)}, expected "
                "uint8 (4, 304, 304)."
            )
        corner = (float(file.transform.c), float(file.transform.f))
        crs = file.crs.to_epsg() or file.crs.to_wkt() if file.crs else ""
        return Image(file.read(), day, corner, crs)


def _read_series(path: Path, wanted: Sequence[str]) -> dict[str, Series]:
    with open_hdf5(path) as file, parsing(f"{path}: the HDF5"):
        return {
            name: found for name in wanted if (found := _one_series(path, file, name)) is not None
        }


def _one_series(path: Path, file: Any, name: str) -> Series | None:
    """Read one sensor; None where it has no acquisition."""
    prefix, bands = SERIES[name], _BANDS[name]
    stored = dataset(path, file, f"{prefix}-data", dims=4, kinds="iuf")
    if not len(stored):
        return None
    products = texts(path, file, f"{prefix}-products")
    if stored.shape[:2] != (len(products), bands):
        raise DataError(
            f"{path}: {prefix}-data has the shape {stored.shape}, expected ({len(products)}, "
            f"{bands}, 6, 6) for its {len(products)} products."
        )
    values: Array = stored[...]
    found = days(product_time(products))
    if not found.all():
        unreadable = products[int(np.argmin(found != 0))]
        raise DataError(f"{path}: no acquisition time in the product name {unreadable!r}.")
    if name != "s2":
        return Series(values, found, "linear")
    # some files have 10 mask channels: only snow and cloud, the first two, are filled
    if "sen-2-masks" not in file:
        return Series(values, found, "dn")
    masks = dataset(path, file, "sen-2-masks", dims=4, kinds="iuf")
    if masks.shape[0] != len(values) or masks.shape[2:] != values.shape[2:] or not masks.shape[1]:
        raise DataError(
            f"{path}: sen-2-masks has the shape {masks.shape}, expected that of sen-2-data, "
            f"{values.shape}, with 2 or 10 channels."
        )
    cloud = np.nan_to_num(masks[:, :2], nan=100.0).max(1)
    return Series(values, found, "dn", cloud)
