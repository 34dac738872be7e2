"""Phantoms of the head at four visits: what tells the patients apart is when their tissue changed.

The layers of the brain are sagittal at the first visit. In some patients they are axial from a
later visit on, and stay so; the class is which one. Single visits tell no more than whether that
was before, and no visit shows it in brightness or contrast: both patterns have the same values.
Layers before and after the change are those of the patient; days between visits, gain, bias field,
grain and noise are drawn for each visit anew.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.datamodules.samples.volumes_brain import GRID, draw_scan, head_tissues
from domainssl.datamodules.samples.volumes_files import affine_of, write_nifti
from domainssl.datamodules.samples.volumes_plan import ORIENTATIONS, Plan
from domainssl.datamodules.samples.volumes_scene import PATTERNS, layered

__all__ = ["VISITS", "Visits", "visits", "write_visits"]

Array = np.ndarray[Any, Any]

# the visit from which on the layers are axial
CHANGES = ("never", "fourth", "third", "second")
_COUNT = 4
_DAYS = (150, 240)  # between visits
_PERIOD_MM = (25, 37)


@dataclass(frozen=True)
class _Visits(Plan):
    """A plan whose exams are patients; the manifest has a row per visit, with its day."""

    def write(
        self, folder: Path, write_exam: Callable[[Path, str, int], Mapping[str, str]]
    ) -> None:
        """Write all visits and the manifest; see `Plan.write`."""
        keys = [(split, number) for split, total in self.exams.items() for number in range(total)]
        with ThreadPoolExecutor(2) as pool:
            cells = list(pool.map(lambda key: write_exam(folder, *key), keys))
        with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, ["id", "patient", "split", "day", "flair", "label"])
            table.writeheader()
            for (split, number), paths in zip(keys, cells, strict=True):
                for day, path in paths.items():
                    name = Path(path).name.removesuffix(".nii.gz")
                    own = {"id": name, "patient": f"phantom-{split[0]}{number:03d}"}
                    table.writerow({**self.row(split, number, own), "day": day, "flair": path})


VISITS = _Visits("visits", {"train": 128, "val": 96}, ((), ()), CHANGES)


@dataclass(frozen=True, kw_only=True)
class Visits:
    """A phantom.

    Attributes:
        days: Since the first visit.
        scans: FLAIR of each visit, arbitrary numbers, float32 (X, Y, Z).
        layers: Of each visit, unit variance, zero outside of the brain.
    """

    days: tuple[int, ...]
    scans: tuple[Array, ...]
    layers: tuple[Array, ...]


def visits(split: str, number: int) -> Visits:
    """Draw a patient of the sample, without writing any file."""
    rng, body_rng = VISITS.generators(split, number)
    tissues = head_tissues(body_rng)
    changed = int(VISITS.classes(split)[number])
    days = np.cumsum([0, *rng.integers(*_DAYS, _COUNT - 1)])
    period, contrast = rng.uniform(*_PERIOD_MM), np.exp(rng.normal(0, 0.15))
    scans, layers = [], []
    healthy = np.zeros(GRID.shape, np.uint8)
    before, after = (
        layered(rng, GRID, PATTERNS.index(name), period) * (tissues > 3)
        for name in ("sagittal", "axial")
    )
    for visit in range(_COUNT):
        found = after if visit >= _COUNT - changed else before
        gain = float(np.exp(rng.normal(0, 0.2)))
        scans.append(draw_scan(rng, "flair", tissues, found * contrast, healthy, gain))
        layers.append(found)
    return Visits(days=tuple(map(int, days)), scans=tuple(scans), layers=tuple(layers))


def write_visits(folder: Path, split: str, number: int) -> dict[str, str]:
    """Write the files of a patient and return their paths by day."""
    found = visits(split, number)
    case = VISITS.case(split, number)
    (folder / case).mkdir()
    affine = affine_of(GRID.shape, GRID.spacing_mm)
    paths = {}
    for visit, (day, values) in enumerate(zip(found.days, found.scans, strict=True)):
        path = f"{case}/{case}_v{visit}.nii.gz"
        ends = ORIENTATIONS[(number + visit) % len(ORIENTATIONS)]
        write_nifti(folder / path, np.round(values).astype(np.int16), affine, orientation=ends)
        paths[str(day)] = path
    return paths
