"""Opening the sites of a large cube, cold and from the index in the cache, against plain loops.

The sites are written for the occasion: stores of format 2 with consolidated metadata, four bands
that were never written, and coordinates; all but the easting are hard links. Cold is the opening
of every site by one process. Warm is the whole set-up of the DataModule from the index: find the
sites, check them, cut them into blocks and hold some out. The plain forms read and parse the same
files, and ask the system for their sizes and times, and do nothing else.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.bench.processes import ROLLUP, Side
from domainssl.bench.report import Goal, Row, Settings, interleaved, ratio, silent, timed
from domainssl.datamodules.cubes import SentinelCubeDataModule
from domainssl.io.raster.describe import LayerFiles, Sought
from domainssl.io.raster.sites import find_files
from domainssl.pieces import cores
from domainssl.sources.cube_options import Layer

__all__ = ["measure"]

_BANDS = ("B02", "B03", "B04", "B08")
_SIDE, _STEP = 256, 10.0
_READ = (".zmetadata", "x/0", "y/0", "time/0")
_STATES = (*_READ, "zarr.json", ".zgroup", "")


def measure(settings: Settings) -> Iterator[Row]:
    """Yield seconds, exponents and ratios for growing numbers of sites."""
    most = settings.pick(10_000, 40, settings.sites)
    sizes = [size for size in (1_000, 10_000, 100_000) if size <= most] or [most // 4, most]
    rounds = settings.pick(3, 1, settings.rounds)
    colds: list[list[float]] = []
    warms: list[list[float]] = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="domainssl-bench-") as folder:
            root = Path(folder) / "sites"
            _write(root, size)
            with _own_cache(Path(folder) / "cache"):
                pairs = _pairs(root, size, rounds, (partial(_open, root, 0), _plain_cold))
                colds.append([cold for cold, _ in pairs])
                yield from _cold_rows(root, size, pairs)
                pairs = _pairs(root, size, rounds, (partial(_set_up, root), _plain_warm))
                warms.append([warm for warm, _ in pairs])
                yield from _warm_rows(root, size, pairs)
    for what, seconds in (("cold", colds), ("warm", warms)):
        if len(sizes) > 1:
            yield Row(
                subject="scan",
                what=f"{what}, exponent of the processor time over the number of sites",
                values=tuple(_exponent(sizes, ends) for ends in zip(seconds[0], seconds[-1])),
                unit="",
                goal=Goal("at most", 1.1),
                note=f"{sizes[0]} to {sizes[-1]} sites",
            )


def _pairs(
    root: Path, size: int, rounds: int, sides: tuple[Callable[[], Any], Callable[[Path], Any]]
) -> list[tuple[float, float]]:
    """Return processor times of both sides; of many sites once, because they take minutes."""
    ours, plain = sides[0], partial(sides[1], root)
    if size > 1_000:
        return [tuple(timed(side, clock=time.process_time) for side in (ours, plain))]  # type: ignore[list-item]
    return interleaved(ours, plain, rounds, clock=time.process_time)


def _exponent(sizes: list[int], seconds: tuple[float, float]) -> float:
    return math.log(seconds[1] / seconds[0]) / math.log(sizes[-1] / sizes[0])


def _cold_rows(root: Path, size: int, pairs: list[tuple[float, float]]) -> Iterator[Row]:
    yield Row(
        subject="scan",
        what=f"cold, {size} sites, processor time per site, one process",
        values=tuple(1000 * cold / size for cold, _ in pairs),
        unit="ms",
        goal=Goal("at most", 10.0),
    )
    yield ratio(
        "scan",
        f"cold, {size} sites, reading and parsing the same files / ours, processor time",
        pairs,
        unit_s=("ours", "plain"),
    )
    if size > 1_000:
        return
    walls = interleaved(partial(_open, root, None), partial(_open, root, 0), 1)
    yield ratio(
        "scan",
        f"cold, {size} sites, one process / one per core, time",
        walls,
        note=f"{cores()} cores",
        unit_s=("all cores", "one"),
    )


def _warm_rows(root: Path, size: int, pairs: list[tuple[float, float]]) -> Iterator[Row]:
    yield Row(
        subject="scan",
        what=f"warm, {size} sites, processor time of a set-up",
        values=tuple(warm for warm, _ in pairs),
        unit="s",
        goal=Goal("at most", 60 * size / 100_000),
    )
    yield ratio(
        "scan",
        f"warm, {size} sites, asking for the same files' states / set-up, processor time",
        pairs,
        unit_s=("set-up", "states"),
    )
    if os.path.exists(ROLLUP.format("self")):
        side = Side(partial(_held, root), ("domainssl.datamodules.cubes",))
        memory = side.memory_mb
        side.close()
        yield Row(
            subject="scan",
            what=f"warm, {size} sites, memory of the process after set-up (PSS)",
            values=(memory,),
            unit="MB",
            goal=Goal("at most", 1000.0),
        )


# The sites ----------------------------------------------------------------------------------


def _array(shape: list[int], chunks: list[int], dtype: str, fill: Any) -> dict[str, Any]:
    return {
        "zarr_format": 2, "shape": shape, "chunks": chunks, "dtype": dtype, "compressor": None,
        "filters": None, "fill_value": fill, "order": "C",
    }  # fmt: skip


def _metadata() -> dict[str, Any]:
    found: dict[str, Any] = {".zgroup": {"zarr_format": 2}, ".zattrs": {"proj:code": "EPSG:32632"}}
    for name, length, dtype in (("x", _SIDE, "<f8"), ("y", _SIDE, "<f8"), ("time", 2, "<i8")):
        found[f"{name}/.zarray"] = _array([length], [length], dtype, None)
        attrs: dict[str, Any] = {"_ARRAY_DIMENSIONS": [name]}
        found[f"{name}/.zattrs"] = attrs
    found["time/.zattrs"]["units"] = "days since 2021-03-01"
    for band in _BANDS:
        found[f"{band}/.zarray"] = _array([2, _SIDE, _SIDE], [1, _SIDE, _SIDE], "<u2", 0)
        found[f"{band}/.zattrs"] = {"_ARRAY_DIMENSIONS": ["time", "y", "x"]}
    return {"zarr_consolidated_format": 1, "metadata": found}


def _write(root: Path, count: int) -> None:
    """Write sites side by side, in rows of a thousand."""
    across = (np.arange(_SIDE) + 0.5) * _STEP
    first: Path | None = None
    for number in range(count):
        row, column = divmod(number, 1_000)
        site = root / f"site{number:06d}.zarr"
        for name in ("x", "y", "time"):
            (site / name).mkdir(parents=True)
        (site / "x/0").write_bytes((column * _SIDE * _STEP + across).tobytes())
        if first is None or number % 1_000 == 0:  # another northing
            first = site
            (site / "y/0").write_bytes((5e6 - row * _SIDE * _STEP - across).tobytes())
            (site / "time/0").write_bytes(np.array([0, 20]).tobytes())
            (site / ".zmetadata").write_text(json.dumps(_metadata()))
            continue
        for name in (".zmetadata", "y/0", "time/0"):
            os.link(first / name, site / name)


@contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    before = os.environ.get("DOMAINSSL_CACHE")
    os.environ["DOMAINSSL_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["DOMAINSSL_CACHE"]
        else:
            os.environ["DOMAINSSL_CACHE"] = before


# Both sides ---------------------------------------------------------------------------------


def _open(root: Path, jobs: int | None) -> None:
    """Open every site without an index from before."""
    shutil.rmtree(os.environ["DOMAINSSL_CACHE"], ignore_errors=True)
    found = find_files(str(root), "", "")
    files = [file for several in found.values() for file in several]
    with silent():
        LayerFiles(str(root)).fill({Sought(bands=_BANDS, step_hint=_STEP): files}, jobs)


def _set_up(root: Path) -> SentinelCubeDataModule:
    data = SentinelCubeDataModule(
        root=str(root),
        modalities={"s2": Layer(bands=_BANDS, path="{site}.zarr")},
        labels=None,
        global_batch_size=2,
    )
    with silent():
        data.setup("fit")
    return data


def _held(root: Path) -> Any:
    """Set up and keep what was set up, for another process."""
    data = _set_up(root)
    return lambda: data


def _plain_cold(root: Path) -> None:
    for site in os.scandir(root):
        for name in _READ:
            with open(f"{site.path}/{name}", "rb") as file:
                content = file.read()
            if name == ".zmetadata":
                json.loads(content)
            else:
                np.frombuffer(content, "<f8")


def _plain_warm(root: Path) -> None:
    for site in os.scandir(root):
        for name in _STATES:
            try:
                os.stat(f"{site.path}/{name}")
            except FileNotFoundError:
                continue
