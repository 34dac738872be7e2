"""The embedded samples of scans: folders of NIfTI files and a manifest, made from known factors.

`petct`: 96 training and 96 held-out exams of registered CT and PET. As in real files, the stored
axes point in several directions, CT is stored as integers, with and without an offset, and PET
with a slope of its own or in floating point; some patients come twice.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.datamodules.samples import made_once, volumes_petct
from domainssl.datamodules.samples.volumes_files import affine_of, write_nifti
from domainssl.datamodules.samples.volumes_petct import PetCT
from domainssl.datamodules.samples.volumes_scene import PATTERNS
from domainssl.errors import ConfigError, nearest

__all__ = ["EXAMS", "SAMPLES", "classes", "petct", "sample_root"]

Array = np.ndarray[Any, Any]

EXAMS = {"train": 96, "val": 96}
_SEED = 20261127
_TWICE = 8  # the last of so many exams is of the patient before
_ORIENTATIONS = ("RAS", "LPS", "LAS", "RAS", "PIR")


def sample_root(name: str) -> Path:
    """Return the folder of a sample, made on first use in seconds.

    Raises:
        ConfigError: There is no such sample.
    """
    if name not in SAMPLES:
        raise ConfigError(
            f"sample:{name}: no such sample of volumes.{nearest(name, SAMPLES)} "
            f"There are {', '.join(SAMPLES)}."
        )
    version, build = SAMPLES[name]
    return made_once(f"volumes-{name}", version, f"sample of volumes {name!r}", build)


def classes(split: str) -> Array:
    """Return the class of each exam of a split, position in `PATTERNS`."""
    rng = np.random.default_rng([_SEED, len(split)])
    return rng.permutation(np.arange(EXAMS[split]) % len(PATTERNS))


def petct(split: str, number: int) -> PetCT:
    """Draw an exam of `sample:petct` again, without writing any file."""
    rngs = _generators("petct", split, number)
    return volumes_petct.draw(*rngs, int(classes(split)[number]))


def _generators(
    name: str, split: str, number: int
) -> tuple[np.random.Generator, np.random.Generator]:
    """Return the source of an exam's draws and that of the patient's body."""
    seed = [_SEED, len(name), len(split)]
    return (
        np.random.default_rng([*seed, number]),
        np.random.default_rng([*seed, 1000 + _patient(number)]),
    )


def _patient(number: int) -> int:
    return number - (number % _TWICE == _TWICE - 1)


def _names(split: str, number: int) -> tuple[str, str]:
    """Return id and patient of an exam."""
    letter = "t" if split == "train" else "v"
    return f"{letter}{number:03d}", f"phantom-{letter}{_patient(number):03d}"


def _build_petct(folder: Path) -> None:
    """Write the sample into an empty folder; the same bytes every time."""
    _write_all(folder, ("ct", "pet"), partial(_write_petct, folder))


def _write_all(
    folder: Path, columns: Sequence[str], write: Callable[[str, int], dict[str, Any]]
) -> None:
    keys = [(split, number) for split, total in EXAMS.items() for number in range(total)]
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda key: write(*key), keys))
    with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["id", "patient", "split", *columns, "label"])
        table.writeheader()
        table.writerows(rows)


def _row(split: str, number: int, cells: dict[str, str]) -> dict[str, Any]:
    name, patient = _names(split, number)
    label = PATTERNS[classes(split)[number]]
    return {"id": name, "patient": patient, "split": split, **cells, "label": label}


def _write_petct(folder: Path, split: str, number: int) -> dict[str, Any]:
    """Write the files of an exam and return its row of the manifest."""
    exam, grid = petct(split, number), volumes_petct.GRID
    affine = affine_of(grid.shape, grid.spacing_mm)
    name = _names(split, number)[0]
    (folder / name).mkdir()
    ends = [_ORIENTATIONS[(number + more) % len(_ORIENTATIONS)] for more in (0, 2)]
    units = np.round(exam.ct)
    if number % 3:  # unsigned with an offset, as some converters write
        stored, scaling = (units + 1024).astype(np.uint16), (1.0, -1024.0)
        write_nifti(
            folder / name / "ct.nii.gz", stored, affine, orientation=ends[0], scaling=scaling
        )
    else:
        path = folder / name / "ct.nii.gz"
        write_nifti(path, units.astype(np.int16), affine, orientation=ends[0])
    path = folder / name / "pet.nii.gz"
    if number % 4:
        slope = float(exam.pet.max()) / 4000
        counts = np.round(exam.pet / slope).astype(np.int16)
        write_nifti(path, counts, affine, orientation=ends[1], scaling=(slope, 0.0))
    else:
        write_nifti(path, exam.pet.round(2), affine, orientation=ends[1])
    return _row(split, number, {key: f"{name}/{key}.nii.gz" for key in ("ct", "pet")})


# name -> (version, which changes with the values, and what writes it)
SAMPLES: dict[str, tuple[str, Callable[[Path], None]]] = {"petct": ("1", _build_petct)}
