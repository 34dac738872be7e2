"""The embedded sample of So2Sat LCZ42, version 2: 256 training and 96 validation patches.

Files, arrays, units and orders of channels are those of the published data set, as torchgeo's
`So2Sat` reads them. Scenes are those of the SSL4EO-S12 sample (`ssl4eo_scene.py`) at one date and
half the resolution: which bands change together tells the classes apart, band means do not. Four
of the 17 local climate zones occur.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from domainssl.datamodules.samples import made_once
from domainssl.datamodules.samples.ssl4eo_scene import DATES, draw_location, optical, radar
from domainssl.errors import require
from domainssl.sensors import L1C_BANDS

__all__ = ["BANDS", "PATCHES", "STATISTICS", "VERSION", "build", "sample_root"]

VERSION = "2"
PATCHES = {"training": 256, "validation": 96}
BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
# Sentinel-2: reflectance of torchgeo's So2SatDataModule (version 2) in digital numbers.
# Sentinel-1: So2Sat publishes linear intensities alone; these are the decibels of SSL4EO-S12.
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "s1": ((-12.577, -20.265), (5.179, 5.872)),
    "s2": (
        (1237.57, 1092.77, 1010.86, 1142.40, 1592.66, 1814.72, 1745.74, 1950.16, 1542.85, 1090.51),
        (395.88, 477.78, 663.66, 635.89, 774.44, 910.16, 921.85, 1016.46, 999.18, 878.06),
    ),
}
_ZONES = (10, 16, 7, 11)  # dense trees, water, large low rise, scattered trees, as covers are
_SIDE, _NUM_ZONES = 32, 17
_SEED = 20261127
Array = np.ndarray[Any, Any]


def sample_root() -> Path:
    """Return the folder of the sample, made on first use in seconds."""
    return made_once("so2sat", VERSION, "So2Sat sample", build)


def build(folder: Path) -> None:
    """Write `training.h5` and `validation.h5` into an empty folder; the same values every time."""
    h5py = require("h5py", "geo")
    for split, count in PATCHES.items():
        rng = np.random.default_rng([_SEED, len(split)])
        covers = rng.permutation(np.arange(count) % len(_ZONES))
        parts = [
            _patch(np.random.default_rng([_SEED, len(split), i]), c) for i, c in enumerate(covers)
        ]
        with h5py.File(folder / f"{split}.h5", "w") as file:
            for name, at in (("sen1", 0), ("sen2", 1)):
                values = np.stack([part[at] for part in parts]).astype("<f4")
                file.create_dataset(name, data=values, chunks=(1, *values.shape[1:]), compression=4)
            label = np.zeros((count, _NUM_ZONES), "<f8")
            label[np.arange(count), np.array(_ZONES)[covers]] = 1
            file["label"] = label


def _patch(rng: np.random.Generator, cover: int) -> tuple[Array, Array]:
    """Return the eight channels of Sentinel-1 and the ten of Sentinel-2, (32, 32, C)."""
    place = draw_location(rng, int(cover), rng.uniform(0, 12, DATES).astype(np.float32))
    decibels, _ = radar(rng, place, looks_east=bool(rng.integers(2)))
    surface, _, _, _ = optical(rng, place, np.zeros(DATES, bool))
    row, column = rng.integers(0, decibels.shape[-1] - 2 * _SIDE, 2)
    part = (slice(row, row + 2 * _SIDE), slice(column, column + 2 * _SIDE))
    vv, vh = _halved(10 ** (decibels[0].astype(np.float32)[:, *part] / 10))
    # unfiltered complex channels: circular Gaussian around the filtered intensities
    noise = rng.standard_normal((4, _SIDE, _SIDE)) * np.sqrt(np.stack([vh, vh, vv, vv]) / 2)
    covariance = 0.3 * np.sqrt(vv * vh) * np.exp(2j * np.pi * rng.random((_SIDE, _SIDE)))
    sen1 = np.stack([*noise, vh, vv, covariance.real, covariance.imag], -1)
    bands = [L1C_BANDS.index(band) for band in BANDS]
    reflectance = np.round(_halved(surface[0][:, *part])[bands] * 2000) / 2000  # less to store
    return sen1, reflectance.transpose(1, 2, 0)


def _halved(values: Array) -> Array:
    """Return means of 2 x 2 pixels, (C, 32, 32)."""
    return values.reshape(len(values), _SIDE, 2, _SIDE, 2).mean((2, 4))
