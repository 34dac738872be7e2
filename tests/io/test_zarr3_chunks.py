"""Arrays of format 3 read chunk by chunk equal what zarr-python reads, in every usual form."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec

from domainssl.errors import DataError
from domainssl.io.raster.zarr import Cube, open_cube

SHAPE, CHUNKS, SHARDS = (5, 3, 40, 36), (1, 2, 16, 16), (2, 2, 32, 32)
PACKED = {
    "plain": [],
    "gzip": [GzipCodec()],
    "zstd": [ZstdCodec(checksum=True)],
    "blosc": [BloscCodec(cname="zstd", shuffle="bitshuffle")],
    "checked": [ZstdCodec(), Crc32cCodec()],
}
SELECTIONS = (
    (),
    (slice(1, 4), slice(0, 3), slice(7, 33), slice(15, 17)),
    (slice(0, 5), [2, 0], slice(16, 32), slice(0, 36)),
)


def values(dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(0, 100, SHAPE) + 300).astype(dtype)


def write(folder: Path, dtype: str, packed: str, is_sharded: bool, at: str = "end") -> np.ndarray:
    group = zarr.open_group(str(folder), mode="w", zarr_format=3)
    endian = "big" if dtype.startswith(">") else "little"
    codecs = [BytesCodec(endian=endian), *PACKED[packed]]
    grid = CHUNKS
    if is_sharded:
        codecs = [ShardingCodec(chunk_shape=CHUNKS, codecs=codecs, index_location=at)]
        grid = SHARDS
    array = zarr.create(
        SHAPE, store=group.store, path="x", chunks=grid, dtype=dtype, zarr_format=3,
        codecs=codecs, fill_value=7, config={"write_empty_chunks": False},
    )  # fmt: skip
    given = values(dtype)
    given[2:4, :2] = 7  # a shard of which nothing is stored
    given[0, :2, :16, 16:32] = 7  # a chunk that its shard does not hold
    array[...] = given
    return given


CASES = [
    *itertools.product(("<u2", ">f4"), PACKED, (False, True), ("end",)),
    ("|u1", "blosc", True, "start"),
    ("<f8", "zstd", True, "start"),
]


@pytest.mark.parametrize(("dtype", "packed", "is_sharded", "at"), CASES)
def test_every_form_reads_as_it_was_written(
    tmp_path: Path, dtype: str, packed: str, is_sharded: bool, at: str
) -> None:
    given = write(tmp_path / "c.zarr", dtype, packed, is_sharded, at)
    cube = open_cube(str(tmp_path / "c.zarr"))
    assert cube.info("x").stored is not None, "read by zarr, not here"
    for selection in SELECTIONS:
        found = cube.read("x", selection)
        expected = given
        for axis, index in enumerate(selection):
            expected = np.take(expected, np.arange(SHAPE[axis])[index], axis)
        assert found.dtype == np.dtype(dtype).newbyteorder("=")
        assert np.array_equal(found, expected), selection


def test_a_zip_reads_as_the_folder_does(tmp_path: Path) -> None:
    given = write(tmp_path / "c.zarr", "<u2", "blosc", True)
    path = shutil.make_archive(str(tmp_path / "c.zarr"), "zip", tmp_path / "c.zarr")
    assert np.array_equal(open_cube(path).read("x"), given)


def test_other_codecs_are_left_to_zarr(tmp_path: Path) -> None:
    from zarr.codecs import TransposeCodec

    group = zarr.open_group(str(tmp_path / "c.zarr"), mode="w", zarr_format=3)
    array = zarr.create(
        (4, 6), store=group.store, path="x", chunks=(2, 3), dtype="<i4", zarr_format=3,
        codecs=[TransposeCodec(order=(1, 0)), BytesCodec()],
    )  # fmt: skip
    array[...] = np.arange(24).reshape(4, 6)
    cube = open_cube(str(tmp_path / "c.zarr"))
    assert cube.info("x").stored is None
    assert np.array_equal(cube.read("x"), np.arange(24).reshape(4, 6))


def damaged(folder: Path, change) -> Cube:
    write(folder, "<u2", "checked", True)
    shard = folder / "x/c/0/0/0/0"
    content = bytearray(shard.read_bytes())
    shard.write_bytes(bytes(change(content)))
    return open_cube(str(folder))


def flipped(content: bytearray, at: int) -> bytearray:
    content[at] ^= 1
    return content


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c[: len(c) // 2], "checksum"),
        (lambda c: c[:20], "no index of 8 chunks"),
        (lambda c: b"", "no index of 8 chunks"),
        (lambda c: flipped(c, 5), "checksum"),
        (lambda c: flipped(c, len(c) - 20), "checksum"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, change, said: str) -> None:
    with pytest.raises(DataError, match=rf"c\.zarr: array 'x', chunk 'x/c/0/0/0/0'.*{said}"):
        damaged(tmp_path / "c.zarr", change).read("x")


def test_an_index_that_points_outside_its_shard_is_refused(tmp_path: Path) -> None:
    import google_crc32c

    def beyond(content: bytearray) -> bytearray:
        index = np.frombuffer(bytes(content[-132:-4]), "<u8").copy()
        index[0] = 2**40
        body = index.tobytes()
        return content[:-132] + body + google_crc32c.value(body).to_bytes(4, "little")

    with pytest.raises(DataError, match="says that a chunk of .* bytes lies at 1099511627776"):
        damaged(tmp_path / "c.zarr", beyond).read("x")
