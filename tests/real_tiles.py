"""Write release-A and release-B files from the two real places of the TerraMesh examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio

from domainssl.io.ssl4eo.write import TileTable, write_release_a, write_release_b

PLACES = ("433D_629L_3_1", "637U_59R_1_3")
FOLDERS = {"S1GRD": "S1RTC", "S2L2A": "S2L2A", "S2L1C": "S2L1C", "S2RGB": "S2RGB"}
STORED_OFFSET = {"433D_629L_3_1": 1000, "637U_59R_1_3": 0}  # of both S2 levels in the examples
DATES = 2


def tile(shared_data: Path, product: str, place: str) -> np.ndarray:
    """One real tile as stored, (C, 224, 224)."""
    path = shared_data / "eo" / "terramesh_examples" / FOLDERS[product] / f"{place}.tif"
    with rasterio.open(path) as file:
        return file.read()


def stored(shared_data: Path, product: str, offset: int, repeat: int = 1) -> np.ndarray:
    """Both places at two equal dates with one offset, in the stored dtype, (n, T, C, Y, X)."""
    tiles = []
    for place in PLACES:
        values = tile(shared_data, product, place)
        if product == "S1GRD":
            values = values.astype("<f2")
        elif product in ("S2L2A", "S2L1C"):
            values = (values - STORED_OFFSET[place] + offset).astype("<i2")
        tiles.append(np.stack([values] * DATES))
    return np.stack(tiles * repeat)


def table(shared_data: Path, product: str, repeat: int = 1) -> TileTable:
    times = np.array(["2020-03-01T10:00:00", "2020-09-01T10:00:00"], "datetime64[s]")
    stamps = [str(t).replace("-", "").replace(":", "") for t in times]
    name = "S1A_IW_GRDH_1SDV_{0}_{0}_034567_040ABC_1D2E" if product == "S1GRD" else "{0}_{0}_T32VNJ"
    x0, y0, crs = [], [], []
    for place in PLACES:
        path = shared_data / "eo" / "terramesh_examples" / "S2L2A" / f"{place}.tif"
        with rasterio.open(path) as file:
            x0.append(file.transform.c)
            y0.append(file.transform.f)
            crs.append(file.crs.to_epsg())
    n = len(PLACES) * repeat
    return TileTable(
        ids=[f"{i:07d}" for i in range(n)],
        times=np.broadcast_to(times, (n, DATES)),
        file_ids=[[name.format(stamp) for stamp in stamps]] * n,
        lat=np.array([-38.83, 57.23] * repeat),
        lon=np.array([-72.48, 9.84] * repeat),
        crs=np.array(crs * repeat),
        x0=np.array(x0 * repeat),
        y0=np.array(y0 * repeat),
    )


def write_real(
    root: Path,
    shared_data: Path,
    release: str,
    products: tuple[str, ...] = ("S1GRD", "S2L2A"),
    splits: tuple[str, ...] = ("train", "val"),
    repeat: int = 1,
) -> None:
    """Write each split as one file per product, `repeat` times the two places."""
    for split in splits:
        for product in products:
            folder = root / split / product
            folder.mkdir(parents=True)
            values = stored(shared_data, product, 1000 if release == "A" else 0, repeat)
            tiles = table(shared_data, product, repeat)
            n, dates, _, rows, columns = values.shape
            cloud = None if product == "S1GRD" else np.zeros((n, dates, rows, columns), np.uint8)
            if release == "A":
                name = f"ssl4eos12_{split}_seasonal_data_000001.zarr.zip"
                write_release_a(folder / name, product, values, tiles, cloud)
            else:
                keys = [f"ssl4eos12_{split}_seasonal_data_{i:07d}" for i in range(n)]
                path = folder / "ssl4eos12_shard_000001.tar"
                write_release_b(path, product, values, tiles, keys, cloud)
