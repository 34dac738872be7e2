"""`stats` against the plain form of the same work: decode every chunk, then NumPy's mean and std.

The plain form reads the files that the stream's bench writes, decodes the same chunks into memory
that stays and calls `mean` and `std` per band: no validity, no offset, no extremes, no percentiles.

What a second process gains is counted in processor time, because on a busy machine it waits for its
core: that of one process against that of the main process and the busier of the two that measure,
their start and imports included. Time on the clock stands below it.
"""

from __future__ import annotations

import os
import tempfile
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from domainssl.bench.processes import spent
from domainssl.bench.report import Goal, Row, Settings, interleaved, ratio
from domainssl.bench.stream import decode, write_files
from domainssl.errors import require
from domainssl.inspection.statistics import measure as measure_statistics
from domainssl.inspection.statistics import measure_piece
from domainssl.inspection.subjects import OfCatalogue
from domainssl.io.ssl4eo.facts import product
from domainssl.io.ssl4eo.layout import scan
from domainssl.pieces import Plan, in_order

__all__ = ["measure"]

_PRODUCTS = {"s1": "S1GRD", "s2": "S2L2A"}
_TYPES = {"db": "<f2", "dn": "<i2"}


def measure(settings: Settings) -> Iterator[Row]:
    """Yield time ratios of the plain form to `stats`, and of one process to two."""
    locations, side = settings.pick(64, 2), settings.pick(264, 48)
    with tempfile.TemporaryDirectory(prefix="domainssl-bench-") as folder:
        paths = write_files(Path(folder), 1, locations, side)
        for path in paths[:]:  # one file under several names
            for number in range(2, settings.pick(24, 2) + 1):
                paths.append(path.with_name(path.name.replace("000001", f"{number:06d}")))
                os.link(path, paths[-1])
        megabytes = sum(decode(path) for path in paths) / 1e6
        subject = OfCatalogue(scan(folder, "train", _PRODUCTS))

        def ours(jobs: int) -> None:
            measure_statistics(subject, Path(folder) / "stats.yaml", Plan(jobs=jobs))

        def plain() -> None:
            for path in paths:
                _plain(path, side)

        def seconds(jobs: int) -> float:
            """Return the processor time of the longest way: the main process and one other."""
            start, others = time.process_time(), dict[int, float]()
            for _, (process, spent) in in_order(work, range(len(keys)), jobs):
                others[process] = spent
            own = time.process_time() - start
            return own + (max(others.values()) if jobs > 1 else 0.0)

        keys, work = subject.keys, partial(spent, partial(measure_piece, subject))
        rounds = settings.pick(5, 1, settings.rounds)
        note = f"{megabytes:.0f} MB decoded, {len(paths)} files, {locations} places of {side} px"
        yield ratio(
            "stats",
            "decoding with NumPy's mean and std / stats, one process, time",
            interleaved(lambda: ours(0), plain, rounds),
            Goal("at least", 0.6),
            note,
            ("stats", "NumPy"),
        )
        yield ratio(
            "stats",
            "stats with one process / with two, processor time of the longest way",
            [(seconds(2), seconds(0)) for _ in range(rounds)],
            Goal("at least", 1.6),
            note,
            ("two", "one"),
        )
        yield ratio(
            "stats",
            "stats with one process / with two, time",
            interleaved(lambda: ours(2), lambda: ours(0), rounds),
            note=note,
            unit_s=("two", "one"),
        )


def _plain(path: Path, side: int) -> None:
    """Decode a file chunk by chunk and take mean and spread of every band."""
    blosc = require("numcodecs", "geo").Blosc()
    facts = product(path.parent.name)
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.startswith("cloud_mask/0"):
                blosc.decode(archive.read(name))
            if name.startswith("bands/0"):
                chunk = np.frombuffer(blosc.decode(archive.read(name)), _TYPES[facts.value_unit])
                for plane in np.moveaxis(chunk.reshape(-1, len(facts.bands), side * side), 1, 0):
                    values = plane.astype(np.float32)
                    values.mean(dtype=np.float64)
                    values.std(dtype=np.float64)
