"""Tiny benchmark sets of Earth observation in their exact layouts."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import rasterio

S2_PATCH = "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_26_57"
S1_PATCH = "S1A_IW_GRDH_1SDV_20170613T165043_33UUP_26_57"
FLAIR = "D012-2019_AF-S1-27_5-10"


def tif(path: Path, values: np.ndarray, metres: float = 10.0) -> None:
    """Write a GeoTIFF (C, H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", width=values.shape[2], height=values.shape[1],
        count=len(values), dtype=values.dtype, crs="EPSG:32633",
        transform=rasterio.Affine(metres, 0, 0, 0, -metres, 0),
    ) as file:  # fmt: skip
        file.write(values)


def bigearthnet(root: Path) -> Path:
    """Write one patch per split, with its reference map."""
    rows: dict[str, list[object]] = {
        "patch_id": [], "labels": [], "split": [], "country": [], "s1_name": [],
        "contains_seasonal_snow": [], "contains_cloud_or_shadow": [],
    }  # fmt: skip
    for number, split in enumerate(("train", "validation", "test")):
        patch, radar = f"{S2_PATCH[:-1]}{number}", f"{S1_PATCH[:-1]}{number}"
        values = (patch, ["Pastures", "Inland waters"], split, "Austria", radar, False, number == 2)
        for name, value in zip(rows, values, strict=True):
            rows[name].append(value)
        folder = root / "BigEarthNet-S2" / patch.rsplit("_", 2)[0] / patch
        for at in (*range(1, 10), 11, 12, 80):
            band = "B8A" if at == 80 else f"B{at:02d}"
            side = 120 if at in (2, 3, 4, 8) else 20 if at in (1, 9) else 60
            tif(folder / f"{patch}_{band}.tif", np.full((1, side, side), 100 + at, np.uint16))
        folder = root / "BigEarthNet-S1" / radar.rsplit("_", 3)[0] / radar
        for band, level in (("VV", -10.25), ("VH", -17.75)):
            tif(folder / f"{radar}_{band}.tif", np.full((1, 120, 120), level, np.float32))
        codes = np.full((1, 120, 120), 231, np.uint16)
        codes[0, :10], codes[0, 10:20] = 999, 512
        folder = root / "Reference_Maps" / patch.rsplit("_", 2)[0] / patch
        tif(folder / f"{patch}_reference_map.tif", codes)
    pyarrow.parquet.write_table(pyarrow.table(rows), root / "metadata.parquet")
    return root


def eurosat(root: Path, *, is_radar: bool) -> Path:
    """Write ten patches of two classes."""
    for number in range(1, 11):
        for level, name in enumerate(("AnnualCrop", "SeaLake")):
            values = (
                np.full((2, 64, 64), -5.5 - level, np.float32)
                if is_radar
                else np.broadcast_to(np.arange(1, 14, dtype=np.uint16)[:, None, None], (13, 64, 64))
            )
            tif(root / name / f"{name}_{number}.tif", np.ascontiguousarray(values))
    (root / "HerbaceousVegetation").mkdir()
    return root


def dfc2020(root: Path) -> Path:
    """Write two patches for training and one held out."""
    for folder, numbers in (("ROIs0000_test", (2, 10)), ("ROIs0000_validation", (32,))):
        for number in numbers:
            lc = np.zeros((4, 256, 256), np.uint16)
            dfc = np.full((1, 256, 256), 10, np.uint8)
            dfc[0, :16], dfc[0, 16:20] = 1, 3
            s2 = np.full((13, 256, 256), 900, np.uint16)
            s2[10] = 0  # cirrus is often 0
            s2[:, 0, 0] = 0
            for kind, values in (("s1", np.full((2, 256, 256), -12.5, np.float32)), ("s2", s2),
                                 ("lc", lc), ("dfc", dfc)):  # fmt: skip
                tif(root / folder / f"{kind}_0" / f"{folder}_{kind}_0_p{number}.tif", values)
    return root


def flair_hub(root: Path, dates: int = 3) -> Path:
    """Write one patch per split; the held-out one lacks all but the aerial image."""
    for number, (split, table) in enumerate((("train", "TRAIN"), ("val", "VALID"))):
        patch = f"{FLAIR[:-1]}{number}"
        domain, area, place = patch.split("_")

        def path(name: str, domain: str = domain, area: str = area, place: str = place) -> str:
            return f"{domain}_{name}/{area}/{domain}_{name}_{area}_{place}.tif"

        names = ["AERIAL_RGBI", "DEM_ELEV", "SPOT_RGBI", "SENTINEL2_TS"]
        line = ";".join([patch, *(path(name) for name in names)])
        text = ";".join(["patch_id", *names])
        (root / f"FLAIR-HUB_{table}.csv").write_text(f"{text}\n{line}\n")
        aerial = np.arange(4, dtype=np.uint8)[:, None, None] + np.full((512, 512), 10, np.uint8)
        tif(root / path("AERIAL_RGBI"), aerial, 0.2)
        if split == "val":
            continue
        heights = np.full((2, 512, 512), 250.5, np.float32)
        heights[:, 0, 0] = -9999
        tif(root / path("DEM_ELEV"), heights, 0.2)
        tif(root / path("SPOT_RGBI"), np.full((4, 64, 64), 400, np.uint16), 1.6)
        series = 100 + np.arange(10 * dates, dtype=np.uint16)[:, None, None]
        tif(root / path("SENTINEL2_TS"), np.ascontiguousarray(
            np.broadcast_to(series, (10 * dates, 10, 10))), 10.24)  # fmt: skip
        clouds = np.zeros((2 * dates, 10, 10), np.uint16)
        clouds[3, :5] = 80  # cloud of the second date
        tif(root / path("SENTINEL2_MSK-SC"), clouds, 10.24)
        tif(root / path("SENTINEL1-ASC_TS"), np.full((2 * dates, 10, 10), 0.1, np.float32), 10.24)
        cover = np.full((1, 512, 512), 6, np.uint8)
        cover[0, :100] = 18
        tif(root / path("AERIAL_LABEL-COSIA"), cover, 0.2)
    folder = root / "GLOBAL_ALL_MTD"
    folder.mkdir()
    connection = sqlite3.connect(folder / "GLOBAL_SENTINEL2_MTD_DATES.gpkg")
    connection.execute("CREATE TABLE gpkg_contents (table_name TEXT)")
    connection.execute("INSERT INTO gpkg_contents VALUES ('dates')")
    connection.execute("CREATE TABLE dates (patch_id TEXT, acquisition_dates TEXT)")
    days = json.dumps({str(n + 1): f"2019010{n + 1}" for n in range(dates)})
    connection.execute("INSERT INTO dates VALUES (?, ?)", (FLAIR, days))
    connection.commit()
    connection.close()
    return root
