"""The embedded sample of feature bags: slides whose class is which kinds of tissue lie together.

96 training and 64 held-out slides, in the layouts of TRIDENT (`trident/`) and CLAM (`clam/`), each
with a table of slides, patients, splits and classes. A tile is tumour, lymphocytes, stroma or
necrosis, a quarter of the slide each, and its features say which: no statistic of the features
tells the classes. Tumour is mixed with lymphocytes (`inflamed`), with stroma (`desmoplastic`) or
with necrosis (`necrotic`) in some areas of the slide, and the other two kinds in the others.
"""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.datamodules.samples import made_once
from domainssl.io.slide.features import Bag, write_bag

__all__ = ["CLASSES", "DIM", "SPLITS", "build", "sample_root"]

CLASSES = ("inflamed", "desmoplastic", "necrotic")
SPLITS = {"train": 96, "val": 64}
DIM = 32
VERSION = "1"
_SEED = 20261128
_PATCH, _STEP = 256, 512  # pixels of a tile at 20x, and of level 0 at 40x
_TWICE = 8  # the last of so many slides is of the patient before
Array = np.ndarray[Any, Any]


def sample_root() -> Path:
    """Return the folder of the sample, made on first use in seconds."""
    return made_once("bags", VERSION, "sample of feature bags", build)


def build(folder: Path) -> None:
    """Write the sample into an empty folder; the same features every time."""
    keys = [(split, number) for split, count in SPLITS.items() for number in range(count)]
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda key: _write(folder, *key), keys))
    for layout in ("trident", "clam"):
        with open(folder / layout / "manifest.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, ["slide_id", "patient_id", "split", "label"])
            table.writeheader()
            table.writerows(rows)


def _write(folder: Path, split: str, number: int) -> dict[str, str]:
    """Write one slide in both layouts; return its row of the table."""
    bag, label = slide(split, number)
    for layout in ("trident", "clam"):
        write_bag(folder / layout, bag, layout)  # type: ignore[arg-type]
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
    kinds = _tissue(rng, label)
    rows, columns = np.nonzero(kinds >= 0)
    kind = kinds[rows, columns]
    prototypes = np.random.default_rng(_SEED).normal(0, 0.9, (4, DIM))
    prototypes -= prototypes.mean(0)
    values = prototypes[kind] + rng.normal(0, 0.5, (len(kind), DIM))
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


def _tissue(rng: np.random.Generator, label: int) -> Array:
    """Return the kind of every cell, 0 to 3, or -1 without tissue; tumour is kind 0."""
    shape = tuple(int(n) for n in rng.integers(17, 23, 2))
    inside = _outline(rng, shape)
    places = np.flatnonzero(inside)
    ranked = places[np.argsort(_areas(rng, shape).reshape(-1)[places])]
    partner = label + 1
    others = [kind for kind in (1, 2, 3) if kind != partner]
    kinds = np.full(inside.size, -1)
    first = round(rng.uniform(0.2, 0.8) * len(ranked))
    for part, pair in ((ranked[:first], (0, partner)), (ranked[first:], others)):
        share = rng.uniform(0.2, 0.8)
        kinds[part] = np.where(rng.random(len(part)) < share, *pair)
    return kinds.reshape(shape)


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


def _areas(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return smooth noise, whose halves are areas some tiles wide."""
    smooth = rng.normal(size=shape)
    for axis in (0, 1):
        for _ in range(2):
            smooth = (np.roll(smooth, 1, axis) + 2 * smooth + np.roll(smooth, -1, axis)) / 4
    return smooth
