"""The embedded sample of tiles: folders of H&E and IHC pictures of the same places, and a table.

384 training and 96 held-out places of 80 pixels at 1 micron, four on a slide; some patients have
two slides, and some places were not stained a second time. See `tissue_scene.py` for what is drawn.
"""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from domainssl.datamodules.samples import made_once
from domainssl.datamodules.samples.tissue_scene import (
    KINDS,
    STAINS,
    draw_look,
    draw_tissue,
    render,
)

__all__ = ["PER_SLIDE", "SIDE", "SLIDES", "VERSION", "build", "draw_slide", "sample_root"]

VERSION = "1"
SLIDES = {"train": 96, "val": 24}
PER_SLIDE, SIDE = 4, 80
_SEED = 20261128
_TWICE = 3  # the last of so many slides is of the patient before
_UNPAIRED = 16  # every so many training slides lack the second stain of their last place
_COLUMNS = 2  # tiles side by side
Array = np.ndarray[Any, Any]


def sample_root() -> Path:
    """Return the folder of the sample, made on first use in seconds."""
    return made_once("tiles", VERSION, "sample of tiles", build)


def draw_slide(split: str, number: int) -> tuple[Array, dict[str, Array]]:
    """Draw the tiles of a slide, without writing any file.

    Returns:
        Kind of each tile, position in `KINDS`, (4,), and the pictures by stain, uint8
        (4, 80, 80, 3).
    """
    rng = np.random.default_rng([_SEED, len(split), number])
    kinds = rng.permutation(np.arange(PER_SLIDE) % len(KINDS))
    looks = {stain: draw_look(rng, stain) for stain in STAINS}
    pictures: dict[str, list[Array]] = {stain: [] for stain in STAINS}
    for kind in kinds:
        tissue = draw_tissue(rng, int(kind), SIDE)
        for stain in STAINS:
            pictures[stain].append(render(rng, tissue, stain, looks[stain]))
    return kinds, {stain: np.stack(found) for stain, found in pictures.items()}


def build(folder: Path) -> None:
    """Write the sample into an empty folder; the same values every time."""
    keys = [(split, number) for split, total in SLIDES.items() for number in range(total)]
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda key: _write_slide(folder, *key), keys))
    with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        names = ["id", "patient", "slide", "split", *STAINS, "label"]
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(row for found in rows for row in found)


def _write_slide(folder: Path, split: str, number: int) -> list[dict[str, str]]:
    """Write the tiles of a slide and return their rows of the table."""
    slide = f"{split[0]}{number:02d}"
    patient = f"phantom-{split[0]}{number - (number % _TWICE == _TWICE - 1):02d}"
    kinds, pictures = draw_slide(split, number)
    rows = []
    for stain in STAINS:
        (folder / stain / slide).mkdir(parents=True)
    for place, kind in enumerate(kinds):
        y, x = (SIDE * n for n in divmod(place, _COLUMNS))
        row = {"id": f"{slide}/{x}_{y}", "patient": patient, "slide": slide, "split": split}
        is_last = place == PER_SLIDE - 1 and split == "train"
        for stain in STAINS:
            if is_last and stain == STAINS[1] and number % _UNPAIRED == 0:
                continue
            row[stain] = f"{stain}/{slide}/{x}_{y}.png"
            Image.fromarray(pictures[stain][place]).save(folder / row[stain], compress_level=1)
        rows.append({**row, "label": KINDS[kind]})
    return rows
