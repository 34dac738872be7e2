"""Zarr cubes in every shape of chunk, codec and store the fast path must equal zarr-python on."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore, ZipStore

from domainssl.errors import DataError
from domainssl.io.raster.time import days, decode_times, product_time, times_of
from domainssl.io.raster.zarr import open_cube
from domainssl.io.storage.handles import HandlePool, SharedFile, window

SHAPE = (5, 4, 3, 7, 6)
VALUES = np.random.default_rng(0).integers(1, 2000, SHAPE).astype("<i2")
BLOSC = numcodecs.Blosc(cname="lz4", clevel=5, shuffle=1)
ZSTD = numcodecs.Blosc(cname="zstd", clevel=3, shuffle=2)


def write(path: Path, chunks: tuple[int, ...], *, zarr_format: int = 2, **options) -> Path:
    zipped = path.suffix == ".zip"
    store = ZipStore(path, mode="w") if zipped else LocalStore(path)
    group = zarr.create_group(store, zarr_format=zarr_format)
    array = group.create_array(
        "bands", shape=SHAPE, dtype=VALUES.dtype, chunks=chunks, fill_value=0, **options
    )
    array[...] = VALUES
    store.close()
    return path


@pytest.mark.parametrize(
    "chunks",
    [SHAPE, (5, 1, 3, 7, 6), (1, 4, 3, 7, 6), (2, 3, 2, 4, 4)],
    ids=["whole", "a date", "a location", "edges"],
)
@pytest.mark.parametrize("codec", [BLOSC, ZSTD, numcodecs.GZip(1), None], ids=str)
def test_any_chunk_shape_and_codec_is_read(tmp_path: Path, chunks, codec) -> None:
    path = write(tmp_path / "a.zarr.zip", chunks, compressors=codec)
    cube = open_cube(str(path))
    np.testing.assert_array_equal(cube.read("bands"), VALUES)
    part = cube.read("bands", [slice(1, 4), [3, 1]])
    np.testing.assert_array_equal(part, VALUES[1:4][:, [3, 1]])


@pytest.mark.parametrize("order", ["C", "F"])
def test_filters_and_memory_order_are_honoured(tmp_path: Path, order: str) -> None:
    delta = numcodecs.Delta(dtype="<i2")
    path = write(tmp_path / "a.zarr", (2, 4, 3, 7, 6), filters=[delta], order=order)
    np.testing.assert_array_equal(open_cube(str(path)).read("bands"), VALUES)


def test_chunk_is_decoded_into_the_array_given(tmp_path: Path) -> None:
    cube = open_cube(str(write(tmp_path / "a.zarr.zip", (5, 1, 3, 7, 6), compressors=BLOSC)))
    out = np.empty((2, 5, 3, 7, 6), np.int16).swapaxes(0, 1)
    assert cube.read("bands", [slice(0, 5), [0, 2]], out) is out
    np.testing.assert_array_equal(out, VALUES[:, [0, 2]])


def test_absent_chunks_read_as_the_fill_value(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr.zip", (5, 1, 3, 7, 6), compressors=BLOSC)
    again = tmp_path / "b.zarr.zip"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w") as new:
        for info in old.infolist():
            if info.filename == "bands/.zarray":
                text = old.read(info).replace(b'"fill_value": 0', b'"fill_value": -7')
                new.writestr(info.filename, text)
            elif info.filename != "bands/0.2.0.0.0":
                new.writestr(info.filename, old.read(info))
    cube = open_cube(str(again))
    assert (cube.read("bands", [slice(None), [2]]) == -7).all()
    assert cube.missing_chunks("bands") == 1


def test_decoded_bytes_count_whole_chunks(tmp_path: Path) -> None:
    cube = open_cube(str(write(tmp_path / "a.zarr.zip", (2, 1, 3, 7, 6), compressors=BLOSC)))
    chunk = 2 * 3 * 7 * 6 * 2
    assert cube.decoded_bytes("bands", [slice(1, 3), [0, 2]]) == 4 * chunk


def test_a_store_one_folder_down_in_its_zip_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr.zip", (2, 1, 3, 7, 6), zarr_format=3)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.zarr.zip", "w") as new:
        for info in old.infolist():
            new.writestr(f"b.zarr/{info.filename}", old.read(info))
    with pytest.raises(DataError, match=r"but in its folder 'b.zarr'. Zip what the folder holds"):
        open_cube(str(tmp_path / "b.zarr.zip")).read("bands")


@pytest.mark.parametrize("name", ["a.zarr", "a.zarr.zip"])
def test_format_3_is_read_through_zarr(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, (2, 2, 3, 7, 6), zarr_format=3)
    cube = open_cube(str(path))
    np.testing.assert_array_equal(cube.read("bands"), VALUES)
    part = cube.read("bands", [slice(1, 4), [3, 1]])
    np.testing.assert_array_equal(part, VALUES[1:4][:, [3, 1]])


def test_bytes_of_a_zip_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr.zip", SHAPE, compressors=BLOSC)
    np.testing.assert_array_equal(open_cube(path.read_bytes()).read("bands"), VALUES)


def test_variable_length_strings_are_read(tmp_path: Path) -> None:
    group = zarr.create_group(LocalStore(tmp_path / "a.zarr"), zarr_format=2)
    array = group.create_array("names", shape=(2,), dtype="str", chunks=(2,))
    array[...] = np.array(["vv", "a long name"], object)
    assert list(open_cube(str(tmp_path / "a.zarr")).read("names")) == ["vv", "a long name"]


def test_unknown_array_names_the_nearest(tmp_path: Path) -> None:
    cube = open_cube(str(write(tmp_path / "a.zarr.zip", SHAPE)))
    with pytest.raises(DataError, match=r"no array 'band'; there are: bands\. Did you mean"):
        cube.read("band")


def test_index_out_of_range_is_refused(tmp_path: Path) -> None:
    cube = open_cube(str(write(tmp_path / "a.zarr.zip", SHAPE)))
    with pytest.raises(DataError, match="4 entries on axis 1"):
        cube.read("bands", [slice(None), [4]])


def test_folder_without_zarr_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no zarr hierarchy"):
        open_cube(str(tmp_path)).arrays  # noqa: B018


def test_handle_pool_keeps_the_latest_and_forgets_when_pickled() -> None:
    pool = HandlePool(limit=2)
    opened = [pool.get(key, object) for key in "aab"]
    assert opened[0] is opened[1] and len(pool) == 2
    pool.get("a", object)
    pool.get("c", object)
    assert pool.get("a", object) is opened[0]  # b was used longest ago
    assert len(pickle.loads(pickle.dumps(pool))) == 0


def test_window_sees_its_range_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    part = window(SharedFile(str(path)), 10, 5)
    assert part.read() == bytes(range(10, 15)) and part.read() == b""
    part.seek(-2, 2)
    assert part.read(9) == bytes([13, 14])


@pytest.mark.parametrize(
    ("value", "units", "expected"),
    [
        (1_584_000_000_123_456_789, "nanoseconds since 1970-01-01", "2020-03-12"),
        (3, "days since 2019-12-30", "2020-01-02"),
        (36, "hours since 2020-01-01 12:00:00", "2020-01-03"),
        (90061, "seconds since 2020-01-01T00:00:00", "2020-01-02"),
        (121, "days since 2020-1-1", "2020-05-01"),
        (121, "Days since 2020-01-01 00:00:00 UTC", "2020-05-01"),
        (12, "hours since 2020-12-30 12:00", "2020-12-31"),
    ],
)
def test_cf_times_become_days(value: int, units: str, expected: str) -> None:
    found = days(decode_times(np.array([value, value]), {"units": units}, "time"))
    assert found.dtype == np.int32
    assert [str(np.datetime64(int(day), "D")) for day in found] == [expected] * 2


def test_times_before_1970_are_unknown_and_odd_units_refused() -> None:
    assert days(decode_times(np.array([0, -5]), {}, "time")).tolist() == [0, 0]
    with pytest.raises(DataError, match=r"time units 'fortnights since 1970-01-01'"):
        decode_times(np.array([1]), {"units": "fortnights since 1970-01-01"}, "file, array 'time'")


def test_missing_times_are_unknown() -> None:
    attrs = {"units": "days since 2020-01-01", "_FillValue": -9999, "missing_value": -1}
    found = decode_times(np.array([-9999, 31, -1]), attrs, "time")
    assert [str(t)[:10] for t in found] == ["NaT", "2020-02-01", "NaT"]


def test_calendar_that_is_not_understood_is_named() -> None:
    attrs = {"units": "days since 2018-01-01", "calendar": "nonsense"}
    with pytest.raises(DataError, match="file: time: time units .* with calendar 'nonsense'"):
        decode_times(np.array([59.0]), attrs, "file: time")


@pytest.mark.parametrize("kind", ["U", "S", "O", "T"])
def test_times_may_be_text(kind: str) -> None:
    texts = ["2020-02-29", "20200501", "2020-05-01T10:11:12+02:00", ""]
    values = np.array(texts, np.dtypes.StringDType() if kind == "T" else kind)
    assert [str(t) for t in decode_times(values, {}, "time")] == [
        "2020-02-29T00:00:00", "2020-05-01T00:00:00", "2020-05-01T08:11:12", "NaT",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"file: time: times \['soon'\] are not understood"):
        decode_times(np.array(["soon"]), {}, "file: time")


@pytest.mark.parametrize(("zarr_format", "kind"), [(2, "S10"), (3, "U10"), (3, "S10")])
def test_a_store_tells_its_times_as_text(tmp_path: Path, zarr_format: int, kind: str) -> None:
    import zarr

    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w", zarr_format=zarr_format)
    dates = np.array(["2020-02-29", "2020-05-01"])
    for name, values, dims in (("b", np.zeros((2, 4, 4)), ["t", "y", "x"]), ("when", dates, ["t"])):
        values = values.astype(kind) if name == "when" else values
        names = {"dimension_names": dims} if zarr_format == 3 else {}
        array = group.create_array(name, shape=values.shape, dtype=values.dtype, **names)
        array[...] = values
        array.attrs["_ARRAY_DIMENSIONS"] = dims
        array.attrs["standard_name"] = "time" if name == "when" else name
    found = times_of(open_cube(str(tmp_path / "a.zarr")), "b", "t")
    assert [str(t)[:10] for t in found] == dates.tolist()


def test_dates_are_found_in_product_names() -> None:
    names = [
        "20201116T023001_20201116T022955_T51TYH",
        "S1B_IW_GRDH_1SDV_20200419T093000_20200419T093025_024000_02D9A0_1234",
        "nothing",
        "20201340T023001_x",
    ]
    found = product_time(names)
    assert [str(t) for t in found[:2]] == ["2020-11-16T02:30:01", "2020-04-19T09:30:00"]
    assert np.isnat(found[2:]).all()
