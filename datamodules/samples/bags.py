"""The embedded samples of feature bags: slides whose class is which tissue the lymphocytes lie in.

`bags` has 96 training and 64 held-out slides, in the layouts of TRIDENT (`trident/`) and CLAM
(`clam/`), each with a table of slides, patients, splits and classes. `cohort` goes on where these
end, in TRIDENT's layout: a tenth of its training slides are eight of a class.

A tile is tumour, stroma or necrosis, in areas a few tiles wide, and has many, few or no
lymphocytes; one half of its features says the first, the other half the second. Many lymphocytes
lie in tumour (`inflamed`), in stroma (`excluded`) or in necrosis (`necrotic`) more often than by
chance. How much there is of everything is drawn for every slide, whatever its class: no statistic
of single features tells the classes, and one tile tells little.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from domainssl.datamodules.samples import made_once
from domainssl.io.slide.features import Bag, write_bag

__all__ = ["CLASSES", "DIM", "SAMPLES", "SPLITS", "Slides", "build", "sample_root"]

CLASSES = ("inflamed", "excluded", "necrotic")
SPLITS = {"train": 96, "val": 64}
DIM = 32
_SEED = 20261128
_KINDS = 3  # of tissue, and amounts of lymphocytes
_PATCH, _STEP = 256, 512  # pixels of a tile at 20x, and of level 0 at 40x
_TWICE = 8  # the last of so many slides is of the patient before
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Slides:
    """Which slides a sample has.

    Attributes:
        version: A new one makes caches write the sample anew.
        splits: Number of slides per split.
        first: Number of their first one.
        layouts: Folders, and how slides are written there.
    """

    version: str
    splits: Mapping[str, int]
    first: Mapping[str, int]
    layouts: tuple[Literal["trident", "clam"], ...]

    def keys(self) -> list[tuple[str, int]]:
        """Return split and number of every slide."""
        return [
            (split, self.first[split] + number)
            for split, count in self.splits.items()
            for number in range(count)
        ]


SAMPLES = {
    "bags": Slides("3", SPLITS, {"train": 0, "val": 0}, ("trident", "clam")),
    "cohort": Slides("1", {"train": 240, "val": 120}, SPLITS, ("trident",)),
}


def sample_root(name: str = "bags") -> Path:
    """Return the folder of a sample of `SAMPLES`, made on first use in seconds."""
    what = "sample of feature bags" if name == "bags" else f"sample of feature bags ({name})"
    return made_once(name, SAMPLES[name].version, what, partial(build, slides=SAMPLES[name]))


def build(folder: Path, slides: Slides = SAMPLES["bags"]) -> None:
    """Write a sample into an empty folder; the same features every time."""
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda key: _write(folder, slides.layouts, *key), slides.keys()))
    for layout in slides.layouts:
        with open(folder / layout / "manifest.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, ["slide_id", "patient_id", "split", "label"])
            table.writeheader()
            table.writerows(rows)


def _write(
    folder: Path, layouts: Sequence[Literal["trident", "clam"]], split: str, number: int
) -> dict[str, str]:
    """Write one slide in these layouts; return its row of the table."""
    bag, label = slide(split, number)
    for layout in layouts:
        write_bag(folder / layout, bag, layout)
    patient = number - (number % _TWICE == _TWICE - 1)
    return {
        "slide_id": bag.slide,
        "patient_id": f"phantom-{split[0]}{patient:03d}",
        "split": split,
        "label": CLASSES[label],
    }


def slide(split: str, number: int) -> tuple[Bag, int]:
    """Return the bag of a slide and its class."""
    rng = np.random.default_rng([_SEED, len(split), number])
    label = number % len(CLASSES)
    kinds = _tissue(rng)
    rows, columns = np.nonzero(kinds >= 0)
    kind = kinds[rows, columns]
    follows = rng.random(len(kind)) < rng.uniform(0.2, 0.33)
    amount = np.where(follows, (kind - label) % _KINDS, rng.integers(0, _KINDS, len(kind)))
    tissue, lymphocytes = _prototypes()
    values = np.concatenate([tissue[kind], lymphocytes[amount]], 1)
    values = values + rng.normal(0, 0.8, values.shape)
    values = values * rng.uniform(0.9, 1.1) + rng.normal(0, 0.05, DIM)  # scanner and stain
    order = rng.permutation(len(kind))  # the order of tiles means nothing
    coords = np.stack([columns, rows], 1)[order] * _STEP
    height, width = kinds.shape
    return Bag(
        slide=f"{split[0]}{number:03d}",
        features=values[order].astype(np.float32),
        coords=coords.astype(np.int64),
        patch_size_level0=_STEP,
        patch_size=_PATCH,
        mpp_um=0.5,
        level0_mpp_um=0.25,
        level0_size=(width * _STEP, height * _STEP),
        encoder="phantom",
    ), label


def _prototypes() -> Array:
    """Return features of kinds of tissue and of amounts of lymphocytes, (2, 3, DIM / 2)."""
    drawn = np.random.default_rng(_SEED).normal(size=(2, _KINDS, DIM // 2))
    drawn -= drawn.mean(1, keepdims=True)
    found: Array = 0.7 * drawn / drawn.std((1, 2), keepdims=True)
    return found


def _tissue(rng: np.random.Generator) -> Array:
    """Return the kind of every cell, 0 to 2, or -1 without tissue."""
    shape = tuple(int(n) for n in rng.integers(17, 23, 2))
    inside = _outline(rng, shape)
    spacing = rng.uniform(3, 5)
    height = np.stack([_areas(rng, shape, spacing)[inside] for _ in range(_KINDS)])
    wanted = rng.dirichlet(np.full(_KINDS, 12.0))
    level = np.zeros(_KINDS)
    for _ in range(60):  # until every kind has its share
        highest = (height + level[:, None]).argmax(0)
        level += 0.7 * (wanted - np.bincount(highest, minlength=_KINDS) / len(highest))
    kinds = np.full(shape, -1)
    kinds[inside] = highest
    return kinds


def _outline(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return where tissue is: most of an ellipse, with a gap."""
    rows, columns = np.indices(shape)
    centre = [(n - 1) / 2 for n in shape]
    distance = ((rows - centre[0]) / (0.62 * shape[0])) ** 2
    distance = distance + ((columns - centre[1]) / (0.62 * shape[1])) ** 2
    inside: Array = distance < 1
    top, left = (int(rng.integers(0, n - 3)) for n in shape)
    inside[top : top + 3, left : left + 2] = False
    return inside


def _areas(rng: np.random.Generator, shape: tuple[int, ...], spacing: float) -> Array:
    """Return noise of unit variance whose maxima lie about `spacing` cells apart."""
    size = 32
    frequency = np.fft.fftfreq(size)
    turns = np.hypot(frequency[:, None], frequency) * spacing
    passed = np.fft.fft2(rng.normal(size=(size, size))) * np.exp(-0.5 * ((turns - 1) / 0.25) ** 2)
    waves = np.fft.ifft2(passed).real[: shape[0], : shape[1]]
    found: Array = waves / waves.std()
    return found
