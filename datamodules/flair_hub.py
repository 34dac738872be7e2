"""FLAIR-HUB: aerial images, SPOT, heights and Sentinel series of France, as a torch data set.

data:
class_path: DatasetDataModule
init_args:
root: /data/flair_hub
dataset: {name: domainssl.datamodules.flair_hub.FlairHub}
"""

from __future__ import annotations

import csv
import json
import os
import sqlite3
from collections.abc import Mapping
from typing import Any, ClassVar
from urllib.parse import quote

import numpy as np

from domainssl.datamodules.dataset import DatasetModality
from domainssl.errors import ConfigError, DataError, nearest, parsing
from domainssl.io.raster.patches import folders_in, measured_or_nan, read_map, read_patch
from domainssl.io.ssl4eo.facts import PRODUCTS
from domainssl.io.storage.archives import check_member
from domainssl.io.tables import cut_row
from domainssl.sensors import L2A_BANDS

__all__ = ["FlairHub"]

_TABLES = {"train": "FLAIR-HUB_TRAIN.csv", "val": "FLAIR-HUB_VALID.csv",
           "test": "FLAIR-HUB_TEST.csv"}  # fmt: skip
_COSIA = "AERIAL_LABEL-COSIA"
_MASKS = "SENTINEL2_MSK-SC"
_BANDS = tuple(band for band in L2A_BANDS if band not in ("B01", "B09"))
# key -> name of the modality, channels of a date, side
_IMAGES = {"aerial": ("AERIAL_RGBI", 4, 512), "spot": ("SPOT_RGBI", 4, 64),
           "dem": ("DEM_ELEV", 2, 512)}  # fmt: skip
_SERIES = {"s2": ("SENTINEL2_TS", 10), "s1_asc": ("SENTINEL1-ASC_TS", 2),
           "s1_des": ("SENTINEL1-DESC_TS", 2)}  # fmt: skip
_CELLS = 10
_GSD_M = 10.24
_CLASSES, _USED = 19, 15  # the last four are of no class
_NO_CLASS = 255
Array = np.ndarray[Any, Any]


def _of(name: str, bands: tuple[str, ...]) -> dict[str, Any]:
    facts = PRODUCTS[name]
    at = [facts.bands.index(band) for band in bands]
    return {
        "channels": bands, "value_unit": facts.value_unit, "kind": "series", "optional": True,
        "size": (_CELLS, _CELLS), "gsd_m": _GSD_M, "mean": tuple(facts.mean[i] for i in at),
        "std": tuple(facts.std[i] for i in at),
    }  # fmt: skip


class FlairHub:
    """Patches of 102.4 m with land cover of 20 cm; a patch may lack all but the aerial image.

    Statistics of series are those of SSL4EO-S12; aerial images have none: measure them. Items hold
    `mask` (15 classes of COSIA, -1 for others) and `label`, the class of most pixels.

    Args:
        root: Folder with `D012-2019_AERIAL_RGBI/` and so on.
        split: `train`, `val` or `test`.
        table: Table of the split; None is `FLAIR-HUB_TRAIN.csv`, `_VALID.csv` or `_TEST.csv`.
        max_dates: Dates of a series, evenly spread; None reads all.
        cloud_percent: Pixels of Sentinel-2 are not valid where the probability of cloud or snow is
            larger; None does not look at it.

    Raises:
        DataError: The table is missing or names no patch.
    """

    classes: ClassVar[tuple[str, ...]] = (
        "building", "greenhouse", "swimming pool", "impervious surface", "pervious surface",
        "bare soil", "water", "snow", "herbaceous vegetation", "agricultural land", "plowed land",
        "vineyard", "deciduous", "coniferous", "brushwood",
    )  # fmt: skip
    dates: ClassVar[Mapping[str, str]] = {key: f"{key}_dates" for key in _SERIES}
    described: ClassVar[Mapping[str, DatasetModality]] = {
        "aerial": DatasetModality(
            key="aerial", channels=("R", "G", "B", "NIR"), value_unit="rgb8", size=(512, 512),
            gsd_m=0.2,
        ),
        "spot": DatasetModality(
            key="spot", channels=("R", "G", "B", "NIR"), value_unit="arbitrary", size=(64, 64),
            gsd_m=1.6, mean=(433.26, 508.75, 467.77, 1137.03), std=(312.76, 284.61, 226.02, 543.11),
            optional=True,
        ),
        "dem": DatasetModality(
            key="dem", channels=("DSM", "DTM"), value_unit="m", size=(512, 512), gsd_m=0.2,
            mean=(311.06, 311.06), std=(537.55, 537.55), nodata=-9999.0, optional=True,
        ),
        "s2": DatasetModality(key="s2", **_of("S2L2A", _BANDS)),
        "s1_asc": DatasetModality(
            key="s1_asc", stored_unit="linear", **_of("S1GRD", PRODUCTS["S1GRD"].bands)
        ),
        "s1_des": DatasetModality(
            key="s1_des", stored_unit="linear", **_of("S1GRD", PRODUCTS["S1GRD"].bands)
        ),
    }  # fmt: skip

    def __init__(
        self,
        root: str,
        split: str = "train",
        table: str | None = None,
        max_dates: int | None = None,
        cloud_percent: float | None = None,
    ) -> None:
        if split not in _TABLES:
            raise ConfigError(
                f"FlairHub: split {split!r} is not one of {', '.join(_TABLES)}."
                f"{nearest(split, _TABLES)}"
            )
        self.root, self.max_dates, self.cloud_percent = root, max_dates, cloud_percent
        path = table or os.path.join(root, _TABLES[split])
        if not os.path.isfile(path):
            raise DataError(
                f"{path}: no table of the split; expected {_TABLES[split]} in the folder of "
                "FLAIR-HUB. Name another one in data.init_args.dataset.splits: {train: {table: …}}."
            )
        with parsing(f"{path}: the table", also=(csv.Error,)), open(
            path, newline="", encoding="utf-8-sig"
        ) as file:  # fmt: skip
            head = file.readline()
            file.seek(0)
            self._rows = list(csv.DictReader(file, delimiter=";" if ";" in head else ","))
        if not self._rows or not self._rows[0].get("patch_id"):
            raise DataError(f"{path}: no column 'patch_id', or no patch in it.")
        if (cut := cut_row(self._rows)) is not None:
            raise DataError(f"{path}, {cut}")
        self._must_be_there(path)
        self._dates = {key: _dates(root, name) for key, (name, _) in _SERIES.items()}
        self.problems = self._undated()

    def _must_be_there(self, table: str) -> None:
        """Refuse a table of which no patch has an aerial image."""
        indices = range(len(self._rows))
        if not any(os.path.isfile(self._path(index, "AERIAL_RGBI")) for index in indices):
            raise DataError(
                f"{table}: none of its {len(indices)} patches is there: it names "
                f"{self._path(0, 'AERIAL_RGBI')}, and "
                f"{self.root} holds {', '.join(folders_in(self.root)[:3]) or 'no folder'}. Unpack "
                "the domains of the table beside it, or name the table of those that are there."
            )

    def _undated(self) -> list[str]:
        """Say which series that are there have no table of dates."""
        folders = folders_in(self.root)
        return [
            f"{self.root}: no {_table_of_dates(name)}, so dates of {key!r} are not known (0)."
            " Get the publisher's GLOBAL_ALL_MTD/ if the model uses dates."
            for key, (name, _) in _SERIES.items()
            if not self._dates[key] and any(folder.endswith(f"_{name}") for folder in folders)
        ]

    @property
    def item_names(self) -> list[str]:
        """What the patches are called."""
        return [row["patch_id"] for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def _path(self, index: int, name: str) -> str:
        """Return the file of a modality: as the table says, else by the names of folders."""
        row = self._rows[index]
        given = row.get(name) or next(
            (v for v in row.values() if isinstance(v, str) and f"_{name}/" in v), None
        )
        if given:
            parts = given.replace("\\", "/").split("/")
            at = next((i for i, part in enumerate(parts) if part.endswith(f"_{name}")), 0)
            inside = "/".join(parts[at:])  # tables of the publisher begin with a folder of theirs
        else:
            domain, area, place = _parts(row["patch_id"])
            inside = f"{domain}_{name}/{area}/{domain}_{name}_{area}_{place}.tif"
        return os.path.join(self.root, check_member(inside, self.root))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the modalities that are there, dates of series, `mask`, `label` and `id`."""
        patch = self._rows[index]["patch_id"]
        item: dict[str, Any] = {"id": patch}
        for key, (name, bands, side) in _IMAGES.items():
            path = self._path(index, name)
            if key == "aerial" or os.path.isfile(path):
                item[key] = read_patch(path, bands, side).astype(np.float32)
        for key, (name, bands) in _SERIES.items():
            path = self._path(index, name)
            if os.path.isfile(path):
                item |= self._series(key, path, bands, index)
        path = self._path(index, _COSIA)
        if os.path.isfile(path):
            mask = read_map(path, 512)
            odd = mask[(mask < 0) | ((mask >= _CLASSES) & (mask != _NO_CLASS))]
            if odd.size:
                raise DataError(
                    f"{path}: holds the class {odd[0]}, expected 0 to {_CLASSES - 1}, or "
                    f"{_NO_CLASS} for none. Maps that count classes from 1 are of another release."
                )
            mask[(mask < 0) | (mask >= _USED)] = -1
            counts = np.bincount(mask[mask >= 0], minlength=_USED)
            item |= {"mask": mask, "label": int(counts.argmax()) if counts.any() else -1}
        return item

    def _series(self, key: str, path: str, bands: int, index: int) -> dict[str, Any]:
        """Return a series (T, C, H, W) and its dates, which are stored one after the other."""
        flat = read_patch(path, None, _CELLS)
        if len(flat) % bands:
            raise DataError(f"{path}: {len(flat)} bands are no dates of {bands} bands.")
        values = flat.reshape(-1, bands, _CELLS, _CELLS)
        domain, area, _ = _parts(self._rows[index]["patch_id"])
        days = self._dates[key].get(f"{domain}_{area}")
        if days is None and self._dates[key]:
            raise DataError(
                f"{path}: the table of dates does not know {domain}_{area}; it has "
                f"{', '.join(list(self._dates[key])[:3])}, … Take the table of the same release."
            )
        if days is not None and len(days) != len(values):
            raise DataError(f"{path}: {len(values)} dates, but {len(days)} in the table of dates.")
        known = np.zeros(len(values), np.int64) if days is None else days
        chosen = np.arange(len(values))
        if self.max_dates is not None and len(values) > self.max_dates:
            chosen = np.linspace(0, len(values) - 1, self.max_dates).round().astype(np.int64)
        if key == "s2":
            out = np.stack([measured_or_nan(date, "dn") for date in values[chosen]])
            if self.cloud_percent is not None:
                masks = read_patch(self._path(index, _MASKS), 2 * len(values), _CELLS)
                hidden = masks.reshape(-1, 2, _CELLS, _CELLS).max(1)[chosen] > self.cloud_percent
                out[np.broadcast_to(hidden[:, None], out.shape)] = np.nan
        else:
            out = values[chosen].astype(np.float32)
        return {key: out, f"{key}_dates": known[chosen]}


def _parts(patch: str) -> tuple[str, str, str]:
    parts = patch.split("_")
    if len(parts) != 3:
        raise DataError(
            f"FLAIR-HUB: patch {patch!r} is not named like D012-2019_AF-S1-27_5-10 (domain, area, "
            "place)."
        )
    return parts[0], parts[1], parts[2]


def _refuse_view(connection: sqlite3.Connection, name: str) -> None:
    """Let tables alone be read: a view is a query, which may never end.

    Raises:
        ValueError: It is none.
    """
    query = "SELECT type, sql FROM sqlite_master WHERE name = ?"
    kinds = connection.execute(query, (name,)).fetchall()
    if any(kind != "table" or "VIRTUAL" in str(sql).upper() for kind, sql in kinds):
        raise ValueError(f"{name!r} is no plain table")


def _table_of_dates(name: str) -> str:
    return f"GLOBAL_ALL_MTD/GLOBAL_{name.rpartition('_')[0]}_MTD_DATES.gpkg"


def _dates(root: str, name: str) -> dict[str, Array]:
    """Return the days since 1970-01-01 of each area, {} where there is no table of dates."""
    path = os.path.join(root, _table_of_dates(name))
    if not os.path.isfile(path):
        return {}
    found: dict[str, Array] = {}
    advice = "Expected the columns patch_id and acquisition_dates."
    with parsing(f"{path}: the table of dates", advice=advice, also=(sqlite3.Error,)):
        connection = sqlite3.connect(f"file:{quote(os.path.abspath(path))}?mode=ro", uri=True)
        try:
            _refuse_view(connection, "gpkg_contents")
            [(table,), *_] = connection.execute("SELECT table_name FROM gpkg_contents").fetchall()
            _refuse_view(connection, str(table))
            title = str(table).replace('"', '""')
            query = f'SELECT patch_id, acquisition_dates FROM "{title}"'
            for patch, text in connection.execute(query):
                days = json.loads(text)
                ordered = [str(days[at]) for at in sorted(days, key=int)]  # counted from 1
                stamps = [f"{d[:4]}-{d[4:6]}-{d[6:8]}" for d in ordered]
                area = "_".join(str(patch).split("_")[:2])
                found[area] = np.array(stamps, "datetime64[D]").astype(np.int64)
        finally:
            connection.close()
    return found
