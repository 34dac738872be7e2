"""Tiny SSL4EO-S12 files: both products show the same pattern, so that windows can be compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from domainssl.io.ssl4eo.write import TileTable, write_release_a, write_release_b

SIDE, DATES = 40, 4


def tile_table(numbers: list[int], s1: bool = False) -> TileTable:
    n = len(numbers)
    start = np.datetime64("2020-01-05T10:00:00", "s")
    times = start + np.arange(DATES) * np.timedelta64(80, "D") + np.zeros((n, 1), "timedelta64[s]")
    stamps = [[str(t).replace("-", "").replace(":", "") for t in row] for row in times]
    name = "S1B_IW_GRDH_1SDV_{0}_{0}_024000_02D9A0_1234" if s1 else "{0}_{0}_T33SWC"
    return TileTable(
        ids=[f"{number:07d}" for number in numbers],
        times=times,
        file_ids=[[name.format(stamp) for stamp in row] for row in stamps],
        lat=np.full(n, 45.0),
        lon=np.full(n, 9.0),
        crs=np.full(n, 32632),
        x0=500000.0 + 1000.0 * np.array(numbers, float),
        y0=np.full(n, 4_900_000.0),
    )


def pattern(numbers: list[int]) -> np.ndarray:
    """Values that tell location, date and pixel apart, (n, T, Y, X), exact in float16 / 4."""
    y, x = np.mgrid[:SIDE, :SIDE]
    field = (y * SIDE + x) % 1000 + 1.0
    offset = np.array(numbers)[:, None] * 2 + np.arange(DATES)
    return field[None, None] + offset[:, :, None, None]


def write_split(root: Path, split: str, files: list[list[int]], release: str = "A") -> None:
    for number, ids in enumerate(files, 1):
        field = pattern(ids)
        s1 = (field / 4).astype(np.float16)[:, :, None].repeat(2, 2)
        s2 = field.astype(np.int16)[:, :, None].repeat(12, 2)
        cloud = np.zeros((len(ids), DATES, SIDE, SIDE), np.uint8)
        for product, values, mask in (("S1GRD", s1, None), ("S2L2A", s2, cloud)):
            folder = root / split / product
            folder.mkdir(parents=True, exist_ok=True)
            tiles = tile_table(ids, s1=product == "S1GRD")
            if release == "A":
                stored = values + np.int16(1000) if product == "S2L2A" else values
                name = f"ssl4eos12_{split}_seasonal_data_{number:06d}.zarr.zip"
                write_release_a(folder / name, product, stored, tiles, mask)
            else:
                keys = [f"ssl4eos12_{split}_seasonal_data_{i:07d}" for i in ids]
                name = f"ssl4eos12_shard_{number:06d}.tar"
                write_release_b(folder / name, product, values, tiles, keys, mask)


TRAIN = [list(range(0, 6)), list(range(6, 12)), list(range(12, 18)), list(range(18, 22))]
VAL = [list(range(100, 105)), list(range(105, 108))]
