"""Boxes of prepared volumes from both tiers of the cache against MONAI's cached data sets.

Every side draws the same number of boxes with as many worker processes through torch's DataLoader,
each side in a process of its own, in turn. The volumes are smooth bodies with noise of 12 HU, which
compress about as well as CT. All sides keep them as int16, and read from the page cache.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from domainssl.bench.processes import ROLLUP, Side
from domainssl.bench.report import Goal, Row, Settings, ratio, timed
from domainssl.errors import require
from domainssl.io.volume.cache import VolumeCache
from domainssl.io.volume.prepared import Prepared
from domainssl.io.volume.stores import Packing, Stored, Tier, write_entry

__all__ = ["measure"]

_FULL = (512, 512, 300)
_PRELOAD = ("monai.data", "monai.transforms", "domainssl.bench.volumes")
_PACKINGS = {
    "chunks of 32": Packing(chunk=32),
    "chunks of 128": Packing(chunk=128),
    "lz4": Packing(codec="lz4", level=5),
    "zstd at level 1": Packing(level=1),
}


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What every side does.

    Attributes:
        folder: Where caches lie.
        shape: Voxels of a volume.
        volumes: Their number.
        box: Voxels of a box along each axis.
        boxes: Drawn per round.
        workers: Processes.
    """

    folder: str
    shape: tuple[int, int, int]
    volumes: int
    box: int
    boxes: int
    workers: int


def measure(settings: Settings) -> Iterator[Row]:
    """Yield ratios of time and memory, and what other chunks and codecs would cost."""
    shape = settings.volume or ((40, 40, 24) if settings.quick else (256, 256, 150))
    workers = settings.pick(2, 0, settings.workers)
    with tempfile.TemporaryDirectory(prefix="domainssl-bench-") as folder:
        work = _Work(
            folder=folder,
            shape=shape,
            volumes=settings.pick(4, 2),
            box=min(settings.pick(96, 16), *shape),
            boxes=settings.pick(24, 4, settings.batch),
            workers=workers,
        )
        for tier in ("memmap", "zarr"):
            _stored(work, tier)
        yield from _against_monai(work, settings.pick(5, 1, settings.rounds), settings.quick)
        yield from _packings(work, settings.pick(3, 1, settings.rounds))


def _against_monai(work: _Work, rounds: int, is_quick: bool) -> Iterator[Row]:
    makers = {
        "memory map": partial(_ours, work, "memmap"),
        "Zarr": partial(_ours, work, "zarr"),
        "PersistentDataset": partial(_monai, work, "PersistentDataset"),
        "CacheDataset": partial(_monai, work, "CacheDataset"),
    }
    require("monai.data", "medical")
    make_side = _Here if is_quick else partial(Side, preload=_PRELOAD)
    sides: dict[str, Any] = {name: make_side(make) for name, make in makers.items()}
    try:
        for side in sides.values():
            side()
        times = [{name: side() for name, side in sides.items()} for _ in range(rounds)]
        has_pss = Path(ROLLUP.format("self")).exists()
        memory = (
            {n: side.memory_mb for n, side in sides.items()} if has_pss and not is_quick else {}
        )
    finally:
        for side in sides.values():
            side.close()
    x, y, z = work.shape
    megabytes = 2e-6 * x * y * z
    rates = {n: work.boxes / statistics.median(t[n] for t in times) for n in sides}
    note = (
        f"{work.volumes} volumes of {x} x {y} x {z}, {megabytes:.0f} MB each, boxes of {work.box}, "
        f"{work.workers} workers; boxes per second: "
        + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    )
    is_full = min(a / b for a, b in zip(work.shape, _FULL, strict=True)) >= 1
    for ours, other, goal in (
        ("Zarr", "PersistentDataset", Goal("at least", 2.0)),
        ("memory map", "PersistentDataset", None),
        ("memory map", "CacheDataset", Goal("at least", 1 / 1.5)),
        ("Zarr", "CacheDataset", None),
    ):
        pairs = [(t[ours], t[other]) for t in times]
        what = f"{other} / {ours}, time per box"
        yield ratio("volumes", what, pairs, goal if is_full else None, note, (ours, other))
    for name, value in memory.items():
        note = f"{work.volumes * megabytes:.0f} MB of volumes; pages of mapped files count"
        yield Row(
            subject="volumes",
            what=f"PSS of main process and workers, {name}",
            values=(value,),
            unit="MB",
            goal=None,
            note=note,
        )


# ------------------------------------------------------------------------------- sides


class _Here:
    """A side in this process: quick runs only show that it works."""

    def __init__(self, make: Callable[[], Callable[[], None]]) -> None:
        self._run = make()

    def __call__(self) -> float:
        return timed(self._run)

    def close(self) -> None:
        """Do nothing: there is no process."""


def _volume(number: int, shape: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """Return a body in air, int16 (1, X, Y, Z)."""
    rng = np.random.default_rng(number)
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape]
    x, y, z = axes[0][:, None, None], axes[1][:, None], axes[2]
    body = 40 + 30 * np.sin(9 * x) * np.cos(7 * y + number) * np.cos(4 * z)
    inside = (x / 0.8) ** 2 + (y / 0.6) ** 2 + 0 * z < 1
    noise = rng.normal(0, 12, (31, *shape[1:])).astype(np.float32)  # planes that repeat far apart
    values = np.where(inside, body, -1000) + noise[np.arange(shape[0]) % 31]
    return np.asarray(values.clip(-1024, 3071).astype(np.int16)[None])


def _prepare(number: int, shape: tuple[int, int, int]) -> Prepared:
    return Prepared(values={"ct": _volume(number, shape)}, affine=np.eye(4))


def _stored(work: _Work, tier: Tier) -> list[Stored]:
    cache = VolumeCache({"bench": 1}, tier, work.folder)
    numbers = range(work.volumes)
    return [cache.fetch(cache.key(i), partial(_prepare, i, work.shape)) for i in numbers]


class _Boxes(Dataset[Tensor]):
    """Boxes of prepared volumes, one volume after the other."""

    def __init__(self, stored: list[Stored], work: _Work) -> None:
        self.stored, self.work = stored, work

    def __len__(self) -> int:
        return self.work.boxes

    def __getitem__(self, number: int) -> Tensor:
        found = self.stored[number % len(self.stored)]
        size = (self.work.box,) * 3
        start = [int(torch.randint(n - self.work.box + 1, ())) for n in found.shape]
        return torch.from_numpy(found.crop(start, size).values["ct"])


def _ours(work: _Work, tier: Tier) -> Callable[[], None]:
    return _loop(_Boxes(_stored(work, tier), work), work)


def _monai(work: _Work, kind: str) -> Callable[[], None]:
    data: Any = require("monai.data", "medical")
    transforms: Any = require("monai.transforms", "medical")

    class Make(transforms.Transform):  # type: ignore[misc]
        """Stands for reading and preparing; what is no transform of MONAI is not cached."""

        def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
            return {"image": torch.from_numpy(_volume(item["number"], work.shape))}

    cut = transforms.RandSpatialCropd(["image"], roi_size=(work.box,) * 3, random_size=False)
    steps = transforms.Compose([Make(), cut])
    items = [{"number": i} for i in range(work.volumes)]
    if kind == "CacheDataset":
        # without a copy of the whole volume per item, which it makes by default
        found = data.CacheDataset(items, steps, progress=False, num_workers=None, copy_cache=False)
    else:
        found = data.PersistentDataset(items, steps, cache_dir=Path(work.folder) / "monai")
    return _loop(_Repeated(found, work.boxes), work)


class _Repeated(Dataset[Tensor]):
    """The items of a data set of MONAI, again and again."""

    def __init__(self, dataset: Any, count: int) -> None:
        self.dataset, self.count = dataset, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Tensor:
        found = self.dataset[number % len(self.dataset)]["image"]
        return torch.as_tensor(found)


def _loop(dataset: Dataset[Tensor], work: _Work) -> Callable[[], None]:
    torch.set_num_threads(1)
    has_fork = work.workers > 0 and "fork" in multiprocessing.get_all_start_methods()
    loader = DataLoader(
        dataset,
        batch_size=2,
        num_workers=work.workers,
        persistent_workers=work.workers > 0,
        multiprocessing_context="fork" if has_fork else None,
    )

    def run() -> None:
        for _ in loader:
            pass

    return run


# ------------------------------------------------------------------------------- packings


def _packings(work: _Work, rounds: int) -> Iterator[Row]:
    """Compare other chunks and codecs with the chosen ones, in this process."""
    exam, found, sizes = _prepare(0, work.shape), {}, {}
    for name, packing in {"ours": Packing(), **_PACKINGS}.items():
        folder = Path(work.folder) / "packings" / name
        folder.mkdir(parents=True)
        write_entry(folder, exam, name, "zarr", packing)
        found[name] = Stored.open(folder, name)
        sizes[name] = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    times = [
        {name: _seconds(stored, work) for name, stored in found.items()} for _ in range(rounds)
    ]
    for name in _PACKINGS:
        yield ratio(
            "volumes",
            f"{name} / chunks of 64 with zstd at level 3, time per box",
            [(t["ours"], t[name]) for t in times],
            note=f"files {sizes[name] / exam.num_bytes:.2f} of the volume, chosen "
            f"{sizes['ours'] / exam.num_bytes:.2f}; {max(4, work.boxes // 4)} boxes of {work.box}",
            unit_s=("chosen", name),
        )


def _seconds(stored: Stored, work: _Work) -> float:
    rng = np.random.default_rng(0)
    starts = rng.integers(0, [n - work.box + 1 for n in stored.shape], (max(4, work.boxes // 4), 3))
    return timed(lambda: [stored.crop(start, (work.box,) * 3) for start in starts.tolist()])
