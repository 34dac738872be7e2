"""The SSL4EO-S12 stream against bare decoding of the same blocks in as many processes.

The files are written for the occasion: release A as published (64 locations of 264 px per file,
one chunk per date), with noise that compresses about as well as the real data. Bare decoding reads
the same zip members and decodes them, and does nothing else: no metadata, no validity, no crops,
no batches.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.bench.report import Goal, Row, Settings, interleaved, ratio, silent
from domainssl.datamodules.ssl4eo import SSL4EOS12DataModule
from domainssl.errors import require
from domainssl.io.ssl4eo.facts import product
from domainssl.io.ssl4eo.write import TileTable, write_release_a
from domainssl.loading.source import Loading
from domainssl.sources.windows import Window

__all__ = ["measure"]

_PRODUCTS = ("S1GRD", "S2L2A")


def measure(settings: Settings) -> Iterator[Row]:
    """Yield the ratio for both kinds of crop and each number of processes."""
    files = settings.pick(4, 2)
    with tempfile.TemporaryDirectory(prefix="domainssl-bench-") as folder:
        paths = write_files(
            Path(folder),
            files,
            locations=settings.pick(64, 4),
            side=settings.pick(264, 48),
        )
        numbers = (0, 2) if settings.workers is None else (settings.workers,)
        for workers in numbers[: 1 if settings.quick else None]:
            for size in (settings.pick(120, 16), settings.pick(224, 32)):
                yield _compare(settings, folder, paths, "fixed crop", size, workers)
            size = settings.pick(120, 16)
            yield _compare(settings, folder, paths, "random-resize crop", size, workers)


def _compare(
    settings: Settings, folder: str, paths: list[Path], kind: str, size: int, workers: int
) -> Row:
    fixed = Window(size=size)
    free = Window(size=size, min_size=size // 2, max_size=size * 3 // 2)
    count = settings.pick(64, 4, settings.batch)
    data = SSL4EOS12DataModule(
        root=folder,
        global_batch_size=count,
        window=fixed if kind == "fixed crop" else free,
        labels=None,
        loading=Loading(workers=workers),
    )
    with silent():  # there is no held-out part, on purpose
        data.setup("fit")
    stream: Any = data.train_dataloader()

    def ours() -> None:
        data.epoch += 1
        for _ in stream:
            pass

    rounds = settings.pick(7, 1, settings.rounds)
    try:
        with _bare(paths, workers) as other:
            pairs = interleaved(ours, other, rounds)
    finally:
        data.teardown()
    return ratio(
        "stream",
        f"bare decoding / stream, {kind} of {size} px, {_processes(workers)}, time",
        pairs,
        Goal("at least", 0.8 if kind == "fixed crop" else 0.5),
        f"batch {count}, {len(paths) // 2} files per sensor, {size} px",
        ("stream", "bare"),
    )


def _processes(workers: int) -> str:
    return "in the main process" if workers == 0 else f"{workers} worker processes"


@contextmanager
def _bare(paths: list[Path], workers: int) -> Iterator[Callable[[], Any]]:
    """Give a function that decodes all blocks, in this process or in `workers` others."""
    if workers == 0:
        yield lambda: [decode(path) for path in paths]
        return
    with multiprocessing.get_context("forkserver").Pool(workers) as pool:
        yield lambda: pool.map(decode, paths, chunksize=1)
        pool.close()
        pool.join()


def decode(path: Path) -> int:
    """Decode the pixels and the cloud mask of a file (one date, one chunk each) into memory
    that stays, so that no time goes into getting fresh pages; return the bytes.
    """
    blosc = require("numcodecs", "geo").Blosc()
    total = 0
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.startswith(("bands/0", "cloud_mask/0")):
                raw = archive.read(name)
                size = int.from_bytes(raw[4:8], "little")  # Blosc header: decoded bytes
                blosc.decode(raw, out=_memory(size)[:size])
                total += size
    return total


_MEMORY: list[np.ndarray[Any, Any]] = []


def _memory(size: int) -> np.ndarray[Any, Any]:
    """Return at least `size` bytes, the same ones every time."""
    if not _MEMORY or len(_MEMORY[0]) < size:
        _MEMORY[:] = [np.empty(size, np.uint8)]
    return _MEMORY[0]


def write_files(root: Path, files: int, locations: int, side: int) -> list[Path]:
    """Write a training split of one date; return the paths, a sensor after the other."""
    rng = np.random.default_rng(0)
    paths = []
    for name in _PRODUCTS:
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for number in range(files):
            path = folder / f"ssl4eos12_train_seasonal_data_{number + 1:06d}.zarr.zip"
            values, mask = _pixels(rng, name, locations, side)
            write_release_a(path, name, values, _table(name, number, locations), mask)
            paths.append(path)
    return paths


def _pixels(rng: np.random.Generator, name: str, count: int, side: int) -> tuple[Any, Any]:
    """Return smooth fields with noise, (n, 1, C, side, side), and the cloud mask of S2."""
    bands, coarse = len(product(name).bands), -(-side // 12)
    field = rng.normal(0, 1, (count, bands, coarse, coarse)).astype(np.float32)
    noise = rng.standard_normal((bands, side, side), np.float32)  # the codec looks back 64 kB
    if name == "S1GRD":
        field, noise = (-14 + 3 * field).astype(np.float16), (1.5 * noise).astype(np.float16)
    else:
        field, noise = (2500 + 300 * field).astype(np.int16), (64 * noise).astype(np.int16)
    values = field.repeat(12, axis=2).repeat(12, axis=3)[..., :side, :side] + noise
    if name == "S1GRD":
        return values[:, None], None
    mask = np.zeros((count, 1, side, side), np.uint8)
    mask[::8, :, : side // 4] = 1
    return values[:, None], mask


def _table(name: str, number: int, count: int) -> TileTable:
    first = number * count
    times = np.full((count, 1), np.datetime64("2020-03-01T10:00:00"))
    s1 = "S1A_IW_GRDH_1SDV_20200301T100000_20200301T100025_034567_040ABC_1D2E"
    s2 = "20200301T100000_20200301T100007_T32ABC"
    return TileTable(
        ids=[f"{first + i:07d}" for i in range(count)],
        times=times,
        file_ids=[[s1 if name == "S1GRD" else s2]] * count,
        lat=np.full(count, 48.0),
        lon=np.full(count, 11.0),
        crs=np.full(count, 32632),
        x0=500_000.0 + 2640.0 * np.arange(count),
        y0=np.full(count, 5_300_000.0),
    )
