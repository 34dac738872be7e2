"""The embedded samples of CT, MR and PET exams, as folders of NIfTI files with a manifest.

`petct`: registered exams of a trunk with a dense and a soft organ, on either side. One of them
takes up tracer. CT tells which is dense, PET where the uptake is; only both tell the class.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.datamodules.samples import made_once
from domainssl.errors import require

__all__ = ["SAMPLES", "sample_root"]

Array = np.ndarray[Any, Any]
_SHAPE, _SPACING = (32, 24, 16), (8.0, 8.0, 12.0)
_EXAMS = 64
_SEED = 20261127


def sample_root(name: str) -> Path:
    """Return the folder of a sample, made on first use in seconds."""
    version, build = SAMPLES[name]
    return made_once(f"volumes-{name}", version, f"{name} sample", build)


def _petct(folder: Path) -> None:
    """Write the exams; the same values every time."""
    rows = []
    for number in range(_EXAMS):
        rng = np.random.default_rng([_SEED, number])
        label = number % 2  # 0: the dense organ takes up tracer
        ct, pet = _trunk(rng, label)
        case = f"case{number:03d}"
        (folder / case).mkdir()
        for name, values in (("ct", ct), ("pet", pet)):
            _write(folder / case / f"{name}.nii.gz", values)
        label_name = ("dense", "soft")[label]
        rows.append((case, case, f"{case}/ct.nii.gz", f"{case}/pet.nii.gz", label_name))
    with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "patient", "ct", "pet", "label"))
        writer.writerows(rows)


def _trunk(rng: np.random.Generator, label: int) -> tuple[Array, Array]:
    """Return Hounsfield units, int16, and uptake, float32, (X, Y, Z) each."""
    places = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in _SHAPE), indexing="ij"))

    def ball(centre: Any, radius: Any) -> Array:
        offsets = (places - np.reshape(centre, (3, 1, 1, 1))) / np.reshape(radius, (3, 1, 1, 1))
        return np.asarray((offsets**2).sum(0) < 1)

    body = ball(rng.uniform(-0.05, 0.05, 3), rng.uniform(0.8, 0.95, 3) * (1, 1, 1.7))
    side = rng.choice((-1, 1))
    centres = [(s * 0.42 + rng.uniform(-0.08, 0.08), *rng.uniform(-0.25, 0.25, 2))
               for s in (side, -side)]  # fmt: skip
    organs = [ball(centre, rng.uniform(0.25, 0.34, 3)) for centre in centres]
    ct = np.where(body, rng.normal(20, 5), -1000.0)
    ct[organs[0]], ct[organs[1]] = rng.normal(160, 15), rng.normal(-60, 15)
    ct += rng.normal(0, 15, _SHAPE)
    pet = np.where(body, rng.uniform(0.8, 1.2), 0.02)
    for i, organ in enumerate(organs):
        pet[organ] = rng.uniform(4, 6) if i == label else rng.uniform(1.0, 1.6)
    pet = np.maximum(pet * rng.normal(1, 0.1, _SHAPE), 0) * rng.uniform(500, 2000)
    return ct.round().astype(np.int16), pet.astype(np.float32)


def _write(path: Path, values: Array) -> None:
    nibabel: Any = require("nibabel", "medical")
    affine = np.diag([-_SPACING[0], -_SPACING[1], _SPACING[2], 1.0])  # stored as LPS
    image = nibabel.Nifti1Image(values[::-1, ::-1], affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


SAMPLES: dict[str, tuple[str, Callable[[Path], None]]] = {"petct": ("1", _petct)}
