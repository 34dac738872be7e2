"""Which exams an embedded sample of scans has: splits, patients, classes, seeds, the manifest."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.datamodules.samples.volumes_scene import PATTERNS

__all__ = ["ORIENTATIONS", "Plan"]

Array = np.ndarray[Any, Any]
Rng = np.random.Generator

# where the axes of stored arrays point, in turn
ORIENTATIONS = ("RAS", "LPS", "LAS", "RAS", "PIR")
_SEED = 20261127
_TWICE = 8  # the last of so many exams is of the patient before


@dataclass(frozen=True)
class Plan:
    """The exams of a sample.

    Attributes:
        name: Of the sample.
        exams: Number of exams per split.
        columns: Columns of the manifest between `split` and `label`, and after it.
        patterns: Names of the classes; where there are none, maps alone say what exams show.
    """

    name: str
    exams: Mapping[str, int]
    columns: tuple[Sequence[str], Sequence[str]]
    patterns: tuple[str, ...] = PATTERNS

    def classes(self, split: str) -> Array:
        """Return the class of every exam, position in `patterns`: even and odd exams balanced."""
        out = np.empty(self.exams[split], int)
        for half in (0, 1):
            rng = np.random.default_rng([_SEED, len(self.name), len(split), half])
            out[half::2] = rng.permutation(np.arange(len(out[half::2])) % len(self.patterns))
        return out

    def generators(self, split: str, number: int) -> tuple[Rng, Rng]:
        """Return the source of an exam's draws and that of its patient's body."""
        seed = [_SEED, *self.name.encode(), len(split)]
        own, body = [*seed, number], [*seed, 1000 + _patient(number)]
        return np.random.default_rng(own), np.random.default_rng(body)

    def case(self, split: str, number: int) -> str:
        """Return the id of an exam, which is its folder."""
        return f"{split[0]}{number:03d}"

    def row(self, split: str, number: int, cells: Mapping[str, str]) -> dict[str, Any]:
        """Return a row of the manifest."""
        return {
            "id": self.case(split, number),
            "patient": f"phantom-{split[0]}{_patient(number):03d}",
            "split": split,
            "label": self.patterns[self.classes(split)[number]] if self.patterns else "",
            **cells,
        }

    def write(
        self, folder: Path, write_exam: Callable[[Path, str, int], Mapping[str, str]]
    ) -> None:
        """Write all exams and the manifest into an empty folder; the same bytes every time.

        Args:
            folder: Where to.
            write_exam: Writes the files of an exam below that folder and returns the cells of its
                row.
        """
        keys = [(split, number) for split, total in self.exams.items() for number in range(total)]
        with ThreadPoolExecutor(2) as pool:
            cells = list(pool.map(lambda key: write_exam(folder, *key), keys))
        before, after = self.columns
        with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, ["id", "patient", "split", *before, "label", *after])
            table.writeheader()
            table.writerows(self.row(*key, found) for key, found in zip(keys, cells, strict=True))


def _patient(number: int) -> int:
    return number - (number % _TWICE == _TWICE - 1)
