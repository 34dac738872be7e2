"""Tiny Sentinel-2 products, laid out as the Copernicus service delivers them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import rasterio

NATIVE = {"B02": 10, "B03": 10, "B04": 10, "B08": 10, "B05": 20, "B06": 20, "B07": 20, "B8A": 20,
          "B11": 20, "B12": 20, "B01": 60, "B09": 60, "B10": 60, "SCL": 20}  # fmt: skip
ORDER = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12"]
SIDE_M = 1200
LEFT, TOP = 600_000, 4_900_020


def stored(band: str, date: str) -> np.ndarray:
    """Return the numbers of a band: they tell row, column, band and date; 0 in the first row."""
    side = SIDE_M // NATIVE[band]
    if band == "SCL":
        classes = np.full((side, side), 4, np.uint8)
        classes[-6:] = 9  # high probability of cloud
        return classes
    rows, columns = np.indices((side, side))
    values = 1000 + 100 * ORDER.index(band) + int(date[6:8]) + 5 * rows + columns
    values[0] = 0
    return values.astype(np.uint16)


def write_safe(
    folder: Path, *, level: str = "2A", date: str = "20220301", tile: str = "T32TQM",
    baseline: str = "04.00", bands: Mapping[str, np.ndarray] | None = None,
) -> Path:  # fmt: skip
    """Write a product and return its folder."""
    name = f"S2A_MSIL{level}_{date}T100031_N{baseline.replace('.', '')}_R122_{tile}_{date}T124512"
    root = folder / f"{name}.SAFE"
    granule = root / "GRANULE" / f"L{level}_{tile}_A034905_{date}T100028"
    tag, added = ("BOA", "BOA") if level == "2A" else ("", "RADIO")
    quantified = f"{tag}_QUANTIFICATION_VALUE".lstrip("_")
    offsets = "".join(
        f'<{added}_ADD_OFFSET band_id="{n}">-1000</{added}_ADD_OFFSET>' for n in range(13)
    )
    (granule / "IMG_DATA").mkdir(parents=True)
    (root / f"MTD_MSIL{level}.xml").write_text(
        '<n1:Level_User_Product xmlns:n1="https://psd-14.sentinel2.eo.esa.int"><n1:General_Info>'
        f"<Product_Info><PRODUCT_START_TIME>{date[:4]}-{date[4:6]}-{date[6:]}T10:00:31.024Z"
        f"</PRODUCT_START_TIME><PROCESSING_BASELINE>{baseline}</PROCESSING_BASELINE></Product_Info>"
        f'<{quantified} unit="none">10000</{quantified}>'
        f"{offsets if baseline >= '04.00' else ''}</n1:General_Info></n1:Level_User_Product>"
    )
    sizes = "".join(
        f'<Size resolution="{m}"><NROWS>{SIDE_M // m}</NROWS><NCOLS>{SIDE_M // m}</NCOLS></Size>'
        f'<Geoposition resolution="{m}"><ULX>{LEFT}</ULX><ULY>{TOP}</ULY></Geoposition>'
        for m in (10, 20, 60)
    )
    (granule / "MTD_TL.xml").write_text(
        '<n1:Tile xmlns:n1="https://psd-14.sentinel2.eo.esa.int"><Tile_Geocoding>'
        f"<HORIZONTAL_CS_CODE>EPSG:32632</HORIZONTAL_CS_CODE>{sizes}</Tile_Geocoding></n1:Tile>"
    )
    for band, metres in NATIVE.items():
        if (band == "B10" and level == "2A") or (band == "SCL" and level == "1C"):
            continue
        part = granule / "IMG_DATA"
        title = f"{tile}_{date}T100031_{band}"
        if level == "2A":
            part, title = part / f"R{metres}m", f"{title}_{metres}m"
        part.mkdir(exist_ok=True)
        values = (bands or {}).get(band, stored(band, date))
        with rasterio.open(
            part / f"{title}.jp2", "w", driver="JP2OpenJPEG", width=values.shape[1],
            height=values.shape[0], count=1, dtype=values.dtype, QUALITY="100", REVERSIBLE="YES",
            crs="EPSG:32632",
            transform=rasterio.Affine(metres, 0, LEFT, 0, -metres, TOP),
        ) as file:  # fmt: skip
            file.write(values, 1)
    return root


def zipped(root: Path, method: int = zipfile.ZIP_STORED) -> Path:
    """Pack a product as it is downloaded, and remove the folder."""
    target = root.with_suffix(".SAFE.zip")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    with zipfile.ZipFile(target, "w", method) as archive:
        for path in files:
            archive.write(path, path.relative_to(root.parent).as_posix())
    for path in files:
        path.unlink()
    root.rename(root.with_name("emptied"))
    return target
