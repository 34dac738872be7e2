"""Blocks of SSL4EO-S12 v1.1: the locations of one group, one product, the dates asked for.

Values leave here in the stored dtype, without the +1000 of release A, with S1 in the order of its
acquisition, and with a mask that says which pixels are measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from domainssl.errors import DataError
from domainssl.io.raster.time import days
from domainssl.io.raster.zarr import Cube, open_cube
from domainssl.io.ssl4eo.facts import LAYERS, NO_DATA_CLASS, Product, check_bands
from domainssl.io.ssl4eo.facts import product as look_up
from domainssl.io.ssl4eo.first import FOLDERS, PACKED, load_folders, load_packed
from domainssl.io.ssl4eo.layout import Group
from domainssl.io.ssl4eo.tiles import (
    Raw,
    TileFacts,
    chosen_times,
    date_order,
    facts_a,
    facts_b,
    facts_of_nothing,
    joined,
)
from domainssl.io.ssl4eo.values import DNOffset, Validity, find_offset, remove_offset
from domainssl.io.storage.archives import Member, ZipFileStore
from domainssl.io.storage.handles import HandlePool, SharedFile, window
from domainssl.io.storage.paths import fetch_ranges, is_url, stamp
from domainssl.io.storage.scratch import Scratch

__all__ = ["Block", "DNOffset", "check_same", "cubes_b", "read"]

Array = np.ndarray[Any, Any]

_TARS = HandlePool(limit=16)
_FIRST = {FOLDERS: load_folders, PACKED: load_packed}


@dataclass(kw_only=True)
class Block:
    """What one read returns; n locations, T dates.

    Attributes:
        values: Offset-free DN, dB or 8-bit values in the stored dtype, (n, T, C, Y, X), finite;
            of a read in parts: as stored.
        valid: True where the pixel is a measurement, (n, T, Y, X); n = 0 for a read in parts.
        dates: Days since 1970-01-01, 0 if unknown, int32 (n, T).
        stored_dates: Returns those of all dates of each location, whichever were asked for, int32
            (n, D).
        ids: What pairs the locations over products: the location id (A), the tar key (B).
        location_ids: The location id as stored.
        lat, lon: Centre of each tile, WGS84, (n,); NaN if not stored.
        crs: EPSG code of each tile, int64 (n,); 0 if not stored.
        x0, y0: Outer corner of the first pixel in that CRS, (n,); NaN if not stored.
        bands: Canonical names in the order of C.
        offset: What was subtracted from the stored values, int16 (n,).
        reordered: True where the stored order of S1 dates was repaired, (n,).
        finite_share: Share of the stored values that are neither NaN nor infinite; NaN of a read
            in parts.
        bytes_decoded: Decoded bytes of the chunks that were touched.
        bytes_needed: Bytes of those that were asked for.
        file: The file that was read.
        cloud: Cloud classes as stored, (n, T, Y, X), if there are any.
        validity: The rule behind `valid`.
        present: False where a location lacks the product (TerraMesh), bool (n,); its values are 0.
    """

    values: Array
    valid: Array
    dates: Array
    stored_dates: Callable[[], Array]
    ids: list[str]
    location_ids: list[str]
    lat: Array
    lon: Array
    crs: Array
    x0: Array
    y0: Array
    bands: tuple[str, ...]
    offset: Array
    reordered: Array
    finite_share: float
    bytes_decoded: int
    bytes_needed: int
    file: str
    cloud: Array | None
    validity: Validity
    present: Array

    def part(self, i: int, rows: slice, columns: slice) -> tuple[Array, Array]:
        """Return a part of one location of a read in parts.

        Returns:
            A view (T, C, h, w) of the values, finite, which still carries the offset, and where
            it holds measurements, (T, h, w).
        """
        values = self.values[i, :, :, rows, columns]
        cloud = None if self.cloud is None else self.cloud[i, :, rows, columns]
        return values, self.validity.settle(values, cloud)[0]


def read(
    group: Group,
    modality: str,
    dates: Sequence[int],
    locations: slice | None = None,
    *,
    fix_s1_order: bool = True,
    mask_clouds: bool = False,
    dn_offset: DNOffset = "auto",
    in_parts: bool = False,
    scratch: Scratch | None = None,
) -> Block:
    """Read one product of a group.

    Args:
        group: From `scan`.
        modality: A modality key of the group.
        dates: Which dates, as positions in the time order of each location; only the chunks
            that hold them are decoded.
        locations: Which locations, default all. A chunk that holds more is decoded whole.
        fix_s1_order: Order S1 by the acquisition time in its product names, which release A
            does not always do. False: stored order, stored times.
        mask_clouds: Also mark thin and thick cloud and cloud shadow as not valid.
        dn_offset: What the stored S2 values carry. `auto` decides per location: S2L1C by the
            median of B10, S2L2A by the release unless release A holds pixels too dark for it.
        in_parts: Leave the values as stored, for callers that need a part of each location only
            and take it from `Block.part`; `offset` says what to subtract from all values but 0,
            which means no data and is 0 without offset too.
        scratch: Memory for the values, which are then valid until the next read with it of the
            same modality. None: memory of their own.

    Raises:
        DataError: Names the file, the array and the location.
    """
    product = look_up(group.products[modality])
    _check_dates(group, dates)
    chosen = range(group.count)[locations or slice(None)]
    if chosen.step != 1:
        raise DataError(f"locations: a slice of step 1 was expected, got {locations}")
    repair = fix_s1_order and product.name == "S1GRD"
    if (first := _FIRST.get(group.release)) is not None:
        raw = first(group, modality, product, list(dates), chosen)
    else:
        load = _load_a if group.release == "A" else _load_b
        raw = load(group, modality, product, list(dates), chosen, repair, scratch)
    meta, values = raw.meta, raw.values
    validity = Validity(product, mask_clouds, group.files[modality])
    _check_range(values, product, group.release, group.files[modality])
    if product.has_offset and values.dtype.kind == "u":
        values = values.astype(np.int32)
    if product.value_unit == "class":
        values = np.maximum(values, 0).astype(np.uint8)
    offset = np.zeros(len(chosen), np.int16)
    if product.has_offset:
        offset = find_offset(values, raw.cloud, validity, group.release, dn_offset)
    valid, share = np.empty((0, *values.shape[1:2], *values.shape[3:]), bool), float("nan")
    if not in_parts:
        valid, share = _settled(values, raw.cloud, validity, offset)
    times = chosen_times(meta, raw.order, repair)
    needed = values[0].nbytes * len(chosen) if len(chosen) else 0
    needed += 0 if raw.cloud is None else raw.cloud.nbytes
    return Block(
        values=values,
        valid=valid,
        dates=days(times),
        stored_dates=partial(_all_days, meta, repair),
        ids=meta.ids,
        location_ids=meta.location_ids,
        lat=meta.lat,
        lon=meta.lon,
        crs=meta.crs,
        x0=meta.x0,
        y0=meta.y0,
        bands=product.bands,
        offset=offset,
        reordered=(raw.order != np.asarray(dates)).any(axis=1),
        finite_share=share,
        bytes_decoded=raw.decoded,
        bytes_needed=needed,
        file=group.files[modality],
        cloud=raw.cloud,
        validity=validity,
        present=raw.present,
    )


def _check_range(values: Array, product: Product, release: str, file: str) -> None:
    """Refuse values that the type in which the product is delivered cannot hold.

    Raises:
        DataError: Names the file, both types and the value.
    """
    radar = np.float16 if release == "A" else np.float32
    delivered: Any = np.dtype(radar) if product.value_unit == "db" else product.dtype
    if np.can_cast(values.dtype, delivered) or not values.size:
        return
    most = float((np.finfo if delivered.kind == "f" else np.iinfo)(delivered).max)
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    largest = finite.flat[np.abs(finite.astype(np.float64)).argmax()] if finite.size else 0
    if abs(float(largest)) > most:
        raise DataError(
            f"{file}: array 'bands' of {values.dtype} holds {largest}, but {product.name} is "
            f"delivered as {delivered}, up to {most:g}. SSL4EO-S12 has no such values: get "
            "the file again, or read it with SentinelCubeDataModule, where nodata can be declared."
        )


def _settled(
    values: Array, cloud: Array | None, validity: Validity, offset: Array
) -> tuple[Array, float]:
    """Finish whole locations in place; return validity and the share of finite values."""
    valid = np.empty((*values.shape[:2], *values.shape[3:]), bool)
    count = 0
    for i, item in enumerate(values):
        valid[i], bad = validity.settle(item, None if cloud is None else cloud[i])
        count += bad
    remove_offset(values, offset)
    return valid, 1 - count / max(values.size, 1)


def check_same(blocks: Mapping[str, Block]) -> None:
    """Refuse blocks of one group whose locations differ between products.

    Raises:
        DataError: Names both files and the first location that differs.
    """
    first, *others = blocks.values()
    for other in others:
        for i, (a, b) in enumerate(zip(first.ids, other.ids, strict=False)):
            if a != b:
                raise DataError(
                    f"{other.file}: array 'sample', location {i}: id {b!r}, but {first.file} has "
                    f"{a!r}. The files do not belong together; download both again."
                )
        if len(first.ids) != len(other.ids):
            raise DataError(
                f"{other.file}: {len(other.ids)} locations, but {first.file} has {len(first.ids)}"
            )


def _check_dates(group: Group, dates: Sequence[int]) -> None:
    if not dates or any(not 0 <= d < group.dates for d in dates):
        raise DataError(
            f"{group.key}: dates {list(dates)} asked for, expected at least one of "
            f"0..{group.dates - 1}"
        )


# ---------------------------------------------------------------------------- loading


def _all_days(meta: TileFacts, repair: bool) -> Array:
    """Return all stored dates in days since 1970-01-01, int32 (n, D)."""
    places = np.broadcast_to(np.arange(meta.times.shape[1]), meta.times.shape)
    return days(chosen_times(meta, places, repair))


def _load_a(
    group: Group,
    modality: str,
    product: Product,
    dates: list[int],
    chosen: range,
    repair: bool,
    scratch: Scratch | None,
) -> Raw:
    path = group.files[modality]
    cube = open_cube(path, options=group.storage_options)
    info = cube.info("bands")
    _check_cube(cube, product, ("sample", "time", "band", "y", "x"))
    if info.shape[0] != group.count or info.shape[1] < group.dates:
        raise DataError(
            f"{path}: array 'bands' holds {info.shape[0]} locations and {info.shape[1]} dates, "
            f"its partners {group.count} and {group.dates}"
        )
    rows = slice(chosen.start, chosen.stop)
    meta = facts_a(cube, rows)
    order = date_order(meta, dates, repair)
    shape = (len(chosen), len(dates), *info.shape[2:])
    values = _empty(info.chunks[1], shape, info.dtype, scratch, modality)
    decoded = _gather(cube, "bands", rows, order, dates, values)
    cloud = None
    if "cloud_mask" in cube.arrays and product.value_unit != "db":
        shape = (len(chosen), len(dates), *info.shape[3:])
        chunk = cube.info("cloud_mask").chunks[1]
        cloud = _empty(chunk, shape, np.dtype(np.uint8), scratch, f"{modality}.cloud")
        decoded += _gather(cube, "cloud_mask", rows, order, dates, cloud)
    present = np.ones(len(chosen), bool)
    return Raw(values=values, cloud=cloud, meta=meta, order=order, decoded=decoded, present=present)


def _load_b(
    group: Group,
    modality: str,
    product: Product,
    dates: list[int],
    chosen: range,
    repair: bool,
    scratch: Scratch | None,
) -> Raw:
    metas: list[TileFacts] = []
    orders: list[Array] = []
    values: Array | None = None
    cloud: Array | None = None
    members = group.members[modality]
    present = np.array([members[i] is not None for i in chosen], bool)
    decoded = 0
    least = 1 if product.name in LAYERS else group.dates  # a map may hold for all dates
    for i, cube in enumerate(cubes_b(group, modality, chosen)):
        if cube is None:
            metas.append(facts_of_nothing(group.stem(chosen[i]), group.dates))
            orders.append(np.array([dates]))
            continue
        info = cube.info("bands")
        _check_cube(cube, product, ("time", "band", "y", "x"))
        if values is None:
            shape = (len(chosen), len(dates), *info.shape[1:])
            values = _empty(2, shape, info.dtype, scratch, modality)
            values[~present] = 0
            if "cloud_mask" in cube.arrays and product.value_unit not in ("db", "class"):
                cloud = np.full((len(chosen), len(dates), *info.shape[2:]), NO_DATA_CLASS, np.uint8)
        if info.shape[1:] != values.shape[2:] or info.shape[0] < least:
            raise DataError(
                f"{cube.name}: array 'bands' has shape {info.shape}, the locations before it "
                f"({group.dates}, {', '.join(map(str, values.shape[2:]))})"
            )
        metas.append(facts_b(cube, group.stem(chosen[i]), group.dates))
        orders.append(date_order(metas[-1], dates, repair))
        wanted = [int(d) if info.shape[0] >= group.dates else 0 for d in orders[-1][0]]
        decoded += _cast_into(cube, "bands", wanted, values[i])
        if cloud is not None and "cloud_mask" in cube.arrays:
            decoded += _cast_into(cube, "cloud_mask", wanted, cloud[i])
    if not len(chosen):
        raise DataError(f"{group.key}: no location asked for")
    if values is None:
        shape = (len(chosen), len(dates), len(product.bands), *group.size)
        values = np.zeros(shape, product.dtype)
    return Raw(
        values=values,
        cloud=cloud,
        meta=joined(metas),
        order=np.concatenate(orders),
        decoded=decoded,
        present=present,
    )


def cubes_b(group: Group, modality: str, chosen: range) -> Iterator[Cube | None]:
    """Open the members of a group in tars one after the other; None where there is none."""
    path = group.files[modality]
    members = [group.members[modality][i] for i in chosen]
    if is_url(path):
        ranges = [(member.offset, member.size) for member in members if member is not None]
        parts = iter(fetch_ranges(path, ranges, group.storage_options))
        sources: Iterator[Any] = (None if m is None else next(parts) for m in members)
    else:
        sources = (None if m is None else _local(path, m) for m in members)
    for member, source in zip(members, sources, strict=True):
        if member is None:
            yield None
            continue
        name = f"{path}:{member.key}"
        yield Cube(ZipFileStore(source, name), name)


def _local(path: str, member: Member) -> BinaryIO:
    file = _TARS.get(stamp(path), lambda: SharedFile(path))
    return window(file, member.offset, member.size)


def _cast_into(cube: Cube, name: str, dates: list[int], out: Array) -> int:
    """Read dates of one location (release B stores S1 as float16 or float32), return the cost."""
    if cube.info(name).dtype == out.dtype:
        cube.read(name, [dates], out)
    else:
        out[...] = cube.read(name, [dates])
    return cube.decoded_bytes(name, [dates])


def _gather(cube: Cube, name: str, rows: slice, order: Array, dates: list[int], out: Array) -> int:
    """Fill `out` (n, T, …) with the stored dates that `order` (n, T) names, return the cost."""
    if (order == np.asarray(dates)).all():
        cube.read(name, [rows, dates], out)
        return cube.decoded_bytes(name, [rows, dates])
    cost = 0
    for stored in np.unique(order):  # each block once, spread over the locations that need it
        block = cube.read(name, [rows, [int(stored)]])
        for location, position in zip(*np.nonzero(order == stored), strict=True):
            out[location, position] = block[location, 0]
        cost += cube.decoded_bytes(name, [rows, [int(stored)]])
    return cost


def _empty(
    time_chunk: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    scratch: Scratch | None = None,
    name: str = "",
) -> Array:
    """Allocate (n, T, …) so that a stored chunk is contiguous in it."""
    make = np.empty if scratch is None else partial(scratch.empty, name)
    dtype = dtype.newbyteorder("=")
    if time_chunk > 1:
        return make(shape, dtype)
    return make((shape[1], shape[0], *shape[2:]), dtype).swapaxes(0, 1)


def _check_cube(cube: Cube, product: Product, dims: tuple[str, ...]) -> None:
    info = cube.info("bands")
    if info.dims and info.dims != dims:
        raise DataError(f"{cube.name}: array 'bands' has dimensions {info.dims}, expected {dims}")
    axis = dims.index("band")
    if "band" in cube.arrays:
        names = [str(name) for name in cube.read("band").reshape(-1)]
        check_bands(names, product, f"{cube.name}, array 'band'")
    if info.shape[axis] != len(product.bands):
        raise DataError(
            f"{cube.name}: array 'bands' has {info.shape[axis]} bands, {product.name} has "
            f"{len(product.bands)} ({' '.join(product.bands)})"
        )
    expected = {"dn": "iu", "rgb8": "u", "class": "iu", "m": "iuf"}.get(product.value_unit, "f")
    if info.dtype.kind not in expected:
        raise DataError(
            f"{cube.name}: array 'bands' is {info.dtype}, which {product.name} "
            f"({product.value_unit}) never is. Check that this folder holds {product.name}."
        )
