"""SSL4EO-S12 v1.0: GeoTIFF folders per location and date, or LMDB of packed samples.

    <root>/s1/0000000/S1A_IW_GRDH_1SDV_20200510T174031_…/VV.tif, VH.tif        float32 dB
    <root>/s2c/0000000/20200330T052649_20200330T053037_T44RKT/B1.tif … B12.tif 13 files of L1C
    <root>/s2a/…                                                               12 files of L2A
    <root>/*.lmdb (or data.mdb): decimal number -> pickled (bytes, shape, bytes, shape, …)

Both become groups of `layout.py`, with the dates of every sensor in the order of time: the first of
one stands beside the first of the others.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from domainssl.errors import ConfigError, DataError, nearest
from domainssl.io.raster.gdal import open_raster, reading
from domainssl.io.raster.grid import plain_crs
from domainssl.io.raster.time import product_time
from domainssl.io.ssl4eo.facts import Product
from domainssl.io.ssl4eo.layout import Catalogue, Group
from domainssl.io.ssl4eo.lmdb_file import LmdbFile
from domainssl.io.ssl4eo.plain_pickle import parse_plain
from domainssl.io.ssl4eo.tiles import Raw, TileFacts, facts_of_nothing, joined
from domainssl.io.storage.archives import Member
from domainssl.io.storage.handles import HandlePool
from domainssl.io.storage.paths import join, stamp

__all__ = [
    "FOLDERS", "PACKED", "Packed", "is_first", "load_folders", "load_packed", "packed_sample",
    "scan_first", "sensors_at",
]  # fmt: skip

Array = np.ndarray[Any, Any]
FOLDERS, PACKED = "1.0", "1.0 LMDB"  # releases
_FOLDER = {"S1GRD": "s1", "S2L1C": "s2c", "S2L2A": "s2a"}
_NAMES = {folder: name for name, folder in _FOLDER.items()}
_SIDE = 264
_SIDES = (264, 132, 44)  # of bands of 10, 20 and 60 m
_DATES = 4
_LEAST_DN = 20.0  # fractions below it are reflectance or standardised values
_PER_GROUP = 64
_ID = re.compile(r"\d{7}")
_NATIVE = {"S1GRD": "float32", "S2L1C": "int16", "S2L2A": "int16"}
_DTYPES = ("native", "uint8", "int16", "uint16", "float32")
# of 50,000 locations, by which the values of the uint8 release were scaled
_SCALED = {
    "S1GRD": ((-12.548, -20.192), (5.257, 5.912)),
    "S2L2A": (
        (752.40, 884.30, 1144.16, 1297.47, 1624.91, 2194.64, 2422.21, 2517.76, 2581.65, 2645.52,
         2368.51, 1805.07),
        (1108.03, 1155.15, 1183.63, 1368.11, 1370.27, 1355.55, 1416.51, 1474.79, 1439.31, 1582.28,
         1455.52, 1343.48),
    ),
    "S2L1C": (
        (1605.58, 1390.78, 1314.87, 1363.52, 1549.44, 2091.75, 2371.72, 2299.90, 2560.30, 830.07,
         22.10, 2177.07, 1524.07),
        (786.79, 850.35, 875.06, 1138.85, 1122.18, 1161.59, 1274.39, 1248.43, 1345.53, 577.32,
         51.15, 1336.10, 1136.54),
    ),
}  # fmt: skip
_NO_SAMPLES = (b"__len__", b"__keys__")
_WHERE = "data.init_args.storage_options.lmdb"
_LMDB = HandlePool(limit=8)


@dataclass(frozen=True)
class Packed:
    """What the LMDB of SSL4EO-S12 v1.0 do not say of themselves.

    Attributes:
        order: Sensors in the order of a sample's arrays, out of `s1`, `s2a`, `s2c`; of files that
            are named after one sensor, that one counts.
        dtype: `native` (float32 of s1, int16 of s2), `uint8` (scaled by mean and deviation, brought
            back to dB and digital numbers), or another one of all sensors.
    """

    order: tuple[str, ...] = ("s1", "s2a", "s2c")
    dtype: str = "native"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Take them out of the storage options of a DataModule.

        Raises:
            ConfigError: There are others than `order` and `dtype`.
        """
        given = dict(options.get("lmdb") or {})
        odd = [name for name in given if name not in ("order", "dtype")]
        if odd:
            raise ConfigError(
                f"data.init_args.storage_options.lmdb: unknown {odd[0]!r}, expected order and "
                f"dtype.{nearest(odd[0], ('order', 'dtype'))}"
            )
        return cls(**given)

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", tuple(self.order))
        odd = [name for name in self.order if name not in _NAMES]
        if odd or len(set(self.order)) < len(self.order) or not self.order:
            raise ConfigError(
                f"{_WHERE}.order: got {list(self.order)}, expected some of "
                f"{', '.join(_NAMES)}, each once.{nearest(odd[0], _NAMES) if odd else ''}"
            )
        if self.dtype not in _DTYPES:
            raise ConfigError(
                f"data.init_args.storage_options.lmdb.dtype: got {self.dtype!r}, expected one of "
                f"{', '.join(_DTYPES)}.{nearest(self.dtype, _DTYPES)}"
            )


def scan_first(
    root: str, split: str, products: Mapping[str, str], packed: Packed
) -> Catalogue | None:
    """Find the locations of v1.0 in a local folder; None where it holds another release.

    Args:
        root: Folder that holds `s1/`, `s2c/`, `s2a/` or LMDB files, or such folders by split.
        split: `train` or `val`.
        products: Product of each modality key: S1GRD, S2L1C, S2L2A.
        packed: What LMDB files do not say.

    Raises:
        DataError: A product or a partner is missing, or nothing is there.
    """
    base = join(root, split) if os.path.isdir(join(root, split)) else root
    if not os.path.isdir(base):
        return None
    names = sorted(os.listdir(base))
    stores = [n for n in names if n.endswith(".lmdb")] or ["."] * ("data.mdb" in names)
    if stores:
        return _scan_stores(root, split, base, stores, products, packed)
    if not set(names) & set(_NAMES) or set(names) & set(_FOLDER):
        return None
    return _scan_folders(root, split, base, products)


def _wanted(products: Mapping[str, str], there: Sequence[str], base: str) -> dict[str, str]:
    """Return the sensor of each modality; all must be there."""
    for m, name in products.items():
        if _FOLDER.get(name, "") not in there:
            raise DataError(
                f"data.init_args.modalities.{m}: {base} is SSL4EO-S12 v1.0 and holds "
                f"{', '.join(there)}, not {name}. Choose of "
                f"{', '.join(_NAMES[n] for n in there)}."
            )
    return {m: _FOLDER[name] for m, name in products.items()}


def _scan_folders(root: str, split: str, base: str, products: Mapping[str, str]) -> Catalogue:
    there = [n for n in _NAMES if os.path.isdir(join(base, n))]
    sensors = _wanted(products, there, base)
    ids = {
        m: {n for n in os.listdir(join(base, s)) if _ID.fullmatch(n)} for m, s in sensors.items()
    }
    shared = sorted(set.intersection(*ids.values()))
    if not shared:
        raise DataError(
            f"{base}: no location is in all of {', '.join(sensors.values())}; expected folders "
            "of seven digits, such as s1/0000000/."
        )
    problems = [
        f"{join(base, sensors[m])}: {len(found) - len(shared)} locations without a partner are "
        "left out"
        for m, found in ids.items() if len(found) > len(shared)
    ]  # fmt: skip
    groups = tuple(
        Group(
            key=f"{shared[low]}",
            release=FOLDERS,
            products=dict(products),
            files={m: join(base, s) for m, s in sensors.items()},
            count=len(run),
            dates=_DATES,
            size=(_SIDE, _SIDE),
            members={m: tuple(Member(name, 0, 0) for name in run) for m in sensors},
        )
        for low in range(0, len(shared), _PER_GROUP)
        for run in [shared[low : low + _PER_GROUP]]
    )
    return Catalogue(
        root=root, split=split, release=FOLDERS, products=dict(products), groups=groups,
        problems=tuple(problems),
    ).logged()  # fmt: skip


def load_folders(
    group: Group, modality: str, facts: Product, dates: Sequence[int], chosen: range
) -> Raw:
    """Read dates of some locations out of their folders, bands of 20 and 60 m repeated to 10 m.

    Raises:
        DataError: A folder or a file is missing or not laid out as published.
    """
    metas, parts, decoded = [], [], 0
    for at in chosen:
        name = group.stem(at)
        folder = join(group.files[modality], name)
        acquired = _acquisitions(folder)
        values = np.empty(
            (len(dates), len(facts.bands), *group.size), np.dtype(_NATIVE[facts.name])
        )
        place: tuple[int, float, float] = (0, math.nan, math.nan)
        for number, date in enumerate(dates):
            for band, title in enumerate(facts.bands):
                path = join(folder, acquired[date][1], f"{_file(title)}.tif")
                place = _read_band(path, values[number, band])
        decoded += values.nbytes
        times = np.array([[time for time, _ in acquired]], "datetime64[s]")
        metas.append(_facts(name, times, place))
        parts.append(values)
    return _raw(parts, metas, dates, decoded)


def _acquisitions(folder: str) -> list[tuple[np.datetime64, str]]:
    """Return time and folder of each date, in the order of time, whatever the satellite."""
    there = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    names = [n for n in there if not n.startswith(".") and os.path.isdir(join(folder, n))]
    times = product_time(names) if names else np.empty(0, "datetime64[s]")
    if len(names) != _DATES or np.isnat(times).any():
        raise DataError(
            f"{folder}: {len(names)} folders of dates, expected {_DATES} that are named by their "
            f"products; it holds {', '.join(names[:5]) or 'nothing'}."
        )
    return sorted(zip(times, names, strict=True))


def _file(band: str) -> str:
    """Return how the file of a band is called: `B1`, not `B01`."""
    return re.sub(r"^B0", "B", band)


def _read_band(path: str, out: Array) -> tuple[int, float, float]:
    """Read a band, repeated to the pixels of `out` (Y, X); return EPSG code and corner."""
    with open_raster(path) as file, reading(path):
        shape = (file.height, file.width)
        if file.count != 1 or shape[0] not in _SIDES or shape[0] != shape[1]:
            raise DataError(
                f"{path}: got {file.count} bands of {shape}, expected one of 264, 132 or 44 pixels."
            )
        times = out.shape[0] // shape[0]
        kind = np.dtype(file.dtypes[0])
        if kind.itemsize == 1:
            raise DataError(
                f"{path}: holds {kind}, values that were scaled to 8 bit, and does not say how; "
                f"expected {out.dtype}. Take the release of full precision."
            )
        if not np.can_cast(kind, out.dtype, "same_kind") and kind != np.uint16:
            raise DataError(f"{path}: holds {kind}, expected {out.dtype}.")
        values, nodata = file.read(1), file.nodata
        missing = None if nodata is None else values == nodata
        if kind == np.uint16:
            values = np.minimum(values, np.iinfo(np.int16).max)
        if missing is not None and missing.any():
            values[missing] = np.nan if out.dtype.kind == "f" and kind.kind == "f" else 0
        _refuse_beyond(values, out.dtype, path)
        out[...] = values.repeat(times, 0).repeat(times, 1)
        code = plain_crs(file.crs.to_wkt(), path) if file.crs else ""
        epsg = int(code[5:]) if code.startswith("EPSG:") else 0
        return epsg, float(file.transform.c), float(file.transform.f)


def _refuse_beyond(values: Array, dtype: np.dtype[Any], where: str) -> None:
    """Refuse numbers that an integer type cannot hold, which a cast would wrap around.

    Raises:
        DataError: Names the number.
    """
    if dtype.kind == "f" or np.can_cast(values.dtype, dtype) or not values.size:
        return
    low, high = values.min(), values.max()
    limits = np.iinfo(dtype)
    if low < limits.min or high > limits.max:
        odd = low if low < limits.min else high
        raise DataError(
            f"{where}: holds {odd}, expected digital numbers from {limits.min} to {limits.max}."
        )


def _facts(name: str, times: Array, place: tuple[int, float, float]) -> TileFacts:
    epsg, x0, y0 = place
    meta = facts_of_nothing(name, times.shape[1])
    meta.times = meta.product_times = times
    meta.crs = np.array([epsg])
    meta.x0, meta.y0 = np.array([x0]), np.array([y0])
    return meta


def _raw(parts: list[Array], metas: list[TileFacts], dates: Sequence[int], decoded: int) -> Raw:
    count = len(parts)
    return Raw(
        values=np.stack(parts),
        cloud=None,
        meta=joined(metas),
        order=np.tile(np.asarray(dates, np.int64), (count, 1)),
        decoded=decoded,
        present=np.ones(count, bool),
    )


# LMDB -------------------------------------------------------------------------------------------


class _Store:
    """An LMDB, opened for reading, without lock, in the process that reads."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = LmdbFile(join(path, "data.mdb") if os.path.isdir(path) else path)
        # tools that pack data sets add how many there are, and their keys
        self.count = self._file.entries - sum(self._file.get(k) is not None for k in _NO_SAMPLES)

    def get(self, key: str) -> bytes:
        found = self._file.get(key.encode())
        if found is None:
            raise DataError(f"{self.path}: no sample {key!r} among {self.count}.")
        return found


def _store(path: str) -> _Store:
    inner = join(path, "data.mdb") if os.path.isdir(path) else path
    found: _Store = _LMDB.get(stamp(inner), lambda: _Store(path))
    return found


def _scan_stores(
    root: str,
    split: str,
    base: str,
    stores: Sequence[str],
    products: Mapping[str, str],
    packed: Packed,
) -> Catalogue:
    holds: dict[str, tuple[str, int]] = {}  # sensor -> file, place in the sample
    for name in stores:
        path = base if name == "." else join(base, name)
        order = _order(name, packed)
        for at, sensor in enumerate(order):
            if sensor in holds:
                raise DataError(
                    f"{base}: {sensor} is in {holds[sensor][0]!r} and in {path!r}. Name files "
                    f"after their sensor (s1.lmdb, s2c.lmdb), or set {_WHERE}.order."
                )
            holds[sensor] = (path, at)
    sensors = _wanted(products, list(holds), base)
    counts = {holds[sensor][0]: _store(holds[sensor][0]).count for sensor in sensors.values()}
    count = min(counts.values())
    if max(counts.values()) != count or not count:
        raise DataError(
            f"{base}: partners hold {counts} samples; expected the same numbers of samples, at "
            "least one. Download the smaller file again."
        )
    groups = tuple(
        Group(
            key=f"sample {low}",
            release=PACKED,
            products=dict(products),
            files={m: holds[sensor][0] for m, sensor in sensors.items()},
            count=len(run),
            dates=_DATES,
            size=(_SIDE, _SIDE),
            # where the file of a tar has an offset, here stands the place in the sample
            members={
                m: tuple(Member(str(n), holds[sensor][1], 0) for n in run)
                for m, sensor in sensors.items()
            },
            storage_options={"dtype": packed.dtype},
        )
        for low in range(0, count, _PER_GROUP)
        for run in [range(low, min(low + _PER_GROUP, count))]
    )
    return Catalogue(root=root, split=split, release=PACKED, products=dict(products), groups=groups)


def _order(name: str, packed: Packed) -> tuple[str, ...]:
    named = [sensor for sensor in _NAMES if re.search(rf"(^|[_\-.]){sensor}([_\-.]|$)", name)]
    return (named[0],) if len(named) == 1 else packed.order


def load_packed(
    group: Group, modality: str, facts: Product, dates: Sequence[int], chosen: range
) -> Raw:
    """Read dates of some samples out of an LMDB.

    Raises:
        DataError: A sample is no pickle of plain values, or its bytes do not fit dtype and order.
    """
    store = _store(group.files[modality])
    metas, parts, decoded = [], [], 0
    for at in chosen:
        member = group.members[modality][at]
        assert member is not None
        where = f"{store.path}, sample {member.key}"
        found = parse_plain(store.get(member.key), where)
        values = _array(found, member.offset, facts, str(group.storage_options["dtype"]), where)
        decoded += values.nbytes
        parts.append(_physical(values[list(dates)], facts, where))
        metas.append(facts_of_nothing(member.key, _DATES))
    return _raw(parts, metas, dates, decoded)


def _array(found: tuple[Any, ...], place: int, facts: Product, asked: str, where: str) -> Array:
    """Return the array of a product, (4, C, Y, X), after its bytes were counted."""
    pairs = list(zip(found[::2], found[1::2], strict=False))
    if (
        len(found) % 2
        or place >= len(pairs)
        or not all(isinstance(raw, bytes) and isinstance(shape, tuple) for raw, shape in pairs)
    ):
        raise DataError(
            f"{where}: {len(pairs)} arrays, number {place + 1} is asked for. A sample is (bytes, "
            "shape) of every sensor in turn; set data.init_args.storage_options.lmdb.order."
        )
    raw, shape = pairs[place]
    dtype = np.dtype(_NATIVE[facts.name] if asked == "native" else asked)
    expected = (_DATES, len(facts.bands), _SIDE, _SIDE)
    if tuple(shape) != expected or len(raw) != math.prod(expected) * dtype.itemsize:
        raise DataError(
            f"{where}: {len(raw)} bytes of shape {tuple(shape)} for {facts.name}, expected "
            f"{math.prod(expected) * dtype.itemsize} of {expected} as {dtype}. Set "
            f"{_WHERE}.dtype to uint8, or order to that of the arrays in a sample."
        )
    return np.frombuffer(raw, dtype).reshape(expected)


def _physical(values: Array, facts: Product, where: str) -> Array:
    """Return dB or digital numbers of stored values (T, C, Y, X).

    Raises:
        DataError: Floats are no digital numbers.
    """
    dtype = np.dtype(_NATIVE[facts.name])
    if values.dtype == np.uint8:  # clip((x - (mean - 2 std)) / (4 std), 0, 1) * 255
        mean, std = (np.array(v, np.float32)[:, None, None] for v in _SCALED[facts.name])
        scaled = values / np.float32(255) * 4 * std + (mean - 2 * std)
        return (scaled.round() if dtype.kind == "i" else scaled).astype(dtype)
    if values.dtype == np.uint16:
        values = np.minimum(values, np.iinfo(np.int16).max)
    if values.dtype.kind == "f" and dtype.kind == "i":
        values = np.where(np.isfinite(values), values, 0)  # no data
        most = float(np.abs(values).max(initial=0))
        if 0 < most < _LEAST_DN and (values != np.rint(values)).any():
            raise DataError(
                f"{where}: {facts.name} holds fractions up to {most:g}, expected digital numbers "
                "(reflectance times 10000). They were scaled in a way that the file does not say; "
                f"write them as digital numbers, or as uint8 and set {_WHERE}.dtype to it."
            )
        values = np.rint(values)
        _refuse_beyond(values, dtype, where)
    return values.astype(dtype)


def packed_sample(path: str, key: str) -> bytes:
    """Return a sample of an LMDB as it is stored.

    Raises:
        DataError: It is not there.
    """
    return _store(path).get(key)


def is_first(root: str) -> bool:
    """Whether a local folder holds v1.0: its sensors' folders of locations, or LMDB."""
    for base in (root, join(root, "train"), join(root, "val")):
        if not os.path.isdir(base):
            continue
        names = os.listdir(base)
        if any(n.endswith(".lmdb") for n in names) or "data.mdb" in names:
            return True
        for sensor in set(names) & set(_NAMES):
            inside = join(base, sensor)
            if os.path.isdir(inside) and any(_ID.fullmatch(n) for n in os.listdir(inside)):
                return True
    return False


def sensors_at(root: str) -> dict[str, str]:
    """Return the products of the folders, or of LMDB named after sensors, by modality key."""
    keys = {"s1": "s1", "s2c": "s2_l1c", "s2a": "s2"}
    bases = [b for b in (join(root, "train"), root) if os.path.isdir(b)]
    names = os.listdir(bases[0])
    found = [s for s in _NAMES if any(n == s or _order(n, Packed()) == (s,) for n in names)]
    return {keys[s]: _NAMES[s] for s in found or ("s1", "s2a")}
