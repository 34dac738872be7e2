"""Tiles of slides against OpenSlide reading the same regions, and memory over many tiles.

The slides are written for the occasion: JPEG tiles of 256 px with smooth fields and noise. The
plain side calls `read_region` and makes an array of RGB of it: no resolution, no resampling, no
white, no validity, no count of damage.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from domainssl.bench.report import Goal, Row, Settings, interleaved, ratio
from domainssl.errors import require
from domainssl.io.slide.pyramid import Slide

__all__ = ["measure"]

_TILE = 256
_MPP = 0.5
_SLIDES = 10  # more than are kept open
_CALM = 0.2  # share of the tiles after which memory is looked at first


def measure(settings: Settings) -> Iterator[Row]:
    """Yield the ratio of both sides at two resolutions, and the growth of memory."""
    side = settings.pick(4096, 512)
    rounds = settings.pick(7, 1, settings.rounds)
    with tempfile.TemporaryDirectory(prefix="domainssl-bench-") as folder:
        path = _write(Path(folder) / "slide.tif", side, 0)
        for level in (0, 1):
            step = _TILE * 2**level
            places = [(x, y) for y in range(0, side, step) for x in range(0, side, step)]
            ours, theirs = _ours(path, places, level), _plain(path, places, level)
            yield ratio(
                "tiles",
                f"plain OpenSlide / tiles, level {level}, processor time",
                interleaved(ours, theirs, rounds, clock=time.process_time),
                Goal("at least", 0.9),
                f"{len(places)} tiles of {_TILE} px, JPEG",
                ("tiles", "OpenSlide"),
            )
        count = settings.pick(10_000, 50)
        grown = (_growth(Path(folder), settings.pick(1024, 512), count),)
        yield Row(
            subject="tiles",
            what=f"memory that {count} tiles leave behind",
            values=grown,
            unit="MB",
            goal=Goal("at most", 20.0),
            note=f"from {_SLIDES} slides in turn, after the first {count * _CALM:.0f} tiles",
        )


def _write(path: Path, side: int, seed: int) -> Path:
    """Write a pyramid of two levels."""
    tifffile = require("tifffile", "pathology")
    rng = np.random.default_rng(seed)
    coarse = rng.integers(90, 240, (side // 32, side // 32, 3)).repeat(32, 0).repeat(32, 1)
    values = (coarse + rng.integers(-12, 13, (side, side, 3))).clip(0, 255).astype(np.uint8)
    half = values.reshape(side // 2, 2, side // 2, 2, 3).mean((1, 3)).astype(np.uint8)
    shared = {"tile": (_TILE, _TILE), "compression": "jpeg", "photometric": "rgb", "metadata": None}
    dots = 10_000 / _MPP
    with tifffile.TiffWriter(path) as writer:
        writer.write(values, resolution=(dots, dots), resolutionunit=3, **shared)
        writer.write(half, subfiletype=1, **shared)
    return path


def _ours(path: Path, places: list[tuple[int, int]], level: int) -> Callable[[], Any]:
    slide = Slide(path)

    def read() -> None:
        for x, y in places:
            slide.read(x, y, _TILE, _MPP * 2**level)

    return read


def _plain(path: Path, places: list[tuple[int, int]], level: int) -> Callable[[], Any]:
    slide = require("openslide", "pathology").OpenSlide(str(path))

    def read() -> None:
        for place in places:
            np.asarray(slide.read_region(place, level, (_TILE, _TILE)).convert("RGB"))

    return read


def _growth(folder: Path, side: int, count: int) -> float:
    """Return the MB that a process has grown by between the first tiles and the last."""
    slides = [Slide(_write(folder / f"{n}.tif", side, n)) for n in range(_SLIDES)]
    process, first = psutil.Process(), 0
    rng = np.random.default_rng(0)
    for n in range(count):
        if n == int(count * _CALM):
            first = process.memory_info().rss
        x, y = rng.integers(0, side, 2)
        slides[n % _SLIDES].read(int(x), int(y), _TILE, rng.choice((_MPP, 0.7, 1.0)))
    return (process.memory_info().rss - first) / 1e6
