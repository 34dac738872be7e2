"""SSL4EO-S12 v1.0: folders of GeoTIFF and LMDB, whose pickles are parsed and never run."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from domainssl.datamodules.ssl4eo import SSL4EOS12DataModule
from domainssl.errors import ConfigError, DataError
from domainssl.inspection.recognise import inspect_path
from domainssl.io.ssl4eo.facts import PRODUCTS
from domainssl.io.ssl4eo.lmdb_file import LmdbFile
from domainssl.io.ssl4eo.plain_pickle import parse_plain
from domainssl.loading.plan import Piece
from domainssl.loading.source import Loading
from domainssl.sources.dates import Dates
from domainssl.sources.windows import Window

TIMES = ("20200105T052649", "20200410T052649", "20200714T052649", "20201012T052649")
# by name, the radar dates are in another order than in time
RADAR = [f"S1{s}_IW_GRDH_1SDV_{t}_{t}_032509_03C3E2_30A2"
         for s, t in zip("BAAB", TIMES, strict=True)]  # fmt: skip
NATIVE = {"B1": 44, "B9": 44, "B10": 44} | dict.fromkeys(("B2", "B3", "B4", "B8"), 264)


def _tif(path: Path, values: np.ndarray, metres: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", width=values.shape[1], height=values.shape[0], count=1,
        dtype=values.dtype, crs="EPSG:32644",
        transform=rasterio.Affine(metres, 0, 500_000, 0, -metres, 3_000_000),
    ) as file:  # fmt: skip
        file.write(values, 1)


def _code(location: int, date: int, band: int) -> int:
    return 1000 * location + 100 * date + band + 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("v1")
    for number, name in enumerate(("0000000", "0000007")):
        for date, time in enumerate(TIMES):
            for band, title in enumerate(("VV", "VH")):
                values = np.full((264, 264), -_code(number, date, band) / 100, np.float32)
                _tif(root / "s1" / name / RADAR[date] / f"{title}.tif", values, 10)
            for band, title in enumerate(PRODUCTS["S2L2A"].bands):
                short = title.replace("B0", "B")
                side = NATIVE.get(short, 132)
                values = np.full((side, side), _code(number, date, band), np.int16)
                values[0, -1] = 1
                _tif(root / "s2a" / name / f"{time}_{time}_T44RKT" / f"{short}.tif", values,
                     2640 / side)  # fmt: skip
    (root / "s1" / "0000009").mkdir()
    (root / "s1" / "0000000" / ".ipynb_checkpoints").mkdir()  # is no date
    return root


def _data(root: Path, names: dict[str, str], **more: Any) -> SSL4EOS12DataModule:
    data = SSL4EOS12DataModule(
        root=str(root), modalities=names, global_batch_size=2, labels=None,
        window=Window(size=264, flips=False, quarter_turns=False),
        dates=Dates(mode="all"), loading=Loading(workers=0), **more,
    )  # fmt: skip
    data.setup("fit")
    return data


def test_folders_are_read_in_the_order_of_time_at_one_resolution(folders: Path) -> None:
    data = _data(folders, {"s1": "S1GRD", "s2": "S2L2A"})
    assert "1 locations without a partner" in data.problems[0]
    assert any("SSL4EO-S12 v1.0, train: 2 locations" in line for line in data.describe())
    rows = data.source("train").load(Piece(0, 0, 2), 0).data
    assert rows["id"] == ["0000000", "0000007"]
    s1, s2 = np.asarray(rows["s1"]), np.asarray(rows["s2"])
    assert s1.shape == (2, 4, 2, 264, 264) and s2.shape == (2, 4, 12, 264, 264)
    for number in range(2):
        for date in range(4):
            expected = [-_code(number, date, band) / 100 for band in range(2)]
            np.testing.assert_allclose(s1[number, date, :, 100, 100], expected, rtol=1e-6)
            codes = [_code(number, date, band) for band in range(12)]
            assert s2[number, date, :, 100, 100].tolist() == codes
            # the last pixel of the first row: 1 at 10 m, 2 at 20 m, 6 at 60 m wide
            assert (s2[number, date, :, 0, -1] == 1).all()
            assert s2[number, date, 0, 5, 258] == 1 and s2[number, date, 1, 1, -1] != 1
    days = [str(np.datetime64(int(d), "D")) for d in np.asarray(rows["s1.dates"])[0]]
    assert days == ["2020-01-05", "2020-04-10", "2020-07-14", "2020-10-12"]
    geo = rows["s2.geo"][0]
    assert (geo["crs"], geo["c"], geo["f"]) == (32644, 500_000, 3_000_000)
    assert data.identity()["splits"]["train"]["locations"] == 2
    report = inspect_path(str(folders))
    assert report["splits"]["train"]["modalities"].keys() == {"s1", "s2"}


def test_folders_that_are_not_as_published_are_refused(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds s1, s2a, not S2L1C. Choose of S1GRD, S2L2A"):
        _data(folders, {"s2": "S2L1C"})
    source = _data(folders, {"s1": "S1GRD"}).source("train")
    rows = source.load(Piece(0, 2, 3), 0)
    assert "0 folders of dates, expected 4" in rows.bad[0]


def _packed(root: Path, samples: list[bytes]) -> Path:
    lmdb = pytest.importorskip("lmdb", reason="extra lmdb")
    root.mkdir(parents=True)
    with lmdb.open(str(root), map_size=2**26) as env, env.begin(write=True) as transaction:
        for number, sample in enumerate(samples):
            transaction.put(str(number).encode(), sample)
        transaction.put(b"__len__", b"2")  # as many tools add it
    return root


def test_packed_samples_are_read_in_the_order_and_type_that_are_named(tmp_path: Path) -> None:
    radar = np.full((4, 2, 264, 264), -10, np.float32)
    optical = np.arange(4 * 13, dtype=np.int16).reshape(4, 13, 1, 1) + np.ones((264, 264), np.int16)
    scaled = np.full((4, 2, 264, 264), 128, np.uint8)
    native = [pickle.dumps((radar.tobytes(), radar.shape, optical.tobytes(), optical.shape))] * 2
    _packed(tmp_path / "native", native)
    names = {"s1": "S1GRD", "s2": "S2L1C"}
    options = {"lmdb": {"order": ["s1", "s2c"]}}
    data = _data(tmp_path / "native", names, storage_options=options)
    rows = data.source("train").load(Piece(0, 0, 2), 0).data
    assert rows["id"] == ["0", "1"] and (np.asarray(rows["s1"]) == -10).all()
    assert (np.asarray(rows["s2"])[:, :, :, 5, 5] == np.arange(52).reshape(4, 13) + 1).all()
    # files named after a sensor, uint8: 128/255 of the way from mean - 2 std to mean + 2 std
    _packed(tmp_path / "eight" / "s1.lmdb", [pickle.dumps((scaled.tobytes(), scaled.shape))])
    data = _data(tmp_path / "eight", {"s1": "S1GRD"}, storage_options={"lmdb": {"dtype": "uint8"}})
    found = np.asarray(data.source("train").load(Piece(0, 0, 1), 0).data["s1"])[0, 0, :, 0, 0]
    mean, std = np.array([-12.548, -20.192]), np.array([5.257, 5.912])
    np.testing.assert_allclose(found, mean + (128 / 255 * 4 - 2) * std, rtol=1e-5)
    # the bytes tell that type or order are wrong
    for folder, lmdb in (("native", {"order": ["s2c", "s1"]}), ("eight", {})):
        source = _data(tmp_path / folder, {"s1": "S1GRD"}, storage_options={"lmdb": lmdb})
        rows = source.source("train").load(Piece(0, 0, 1), 0)
        assert "storage_options.lmdb.dtype" in rows.bad[0]
    for split in ("train", "val"):
        (tmp_path / "twice").mkdir(exist_ok=True)
        (tmp_path / "twice" / split).symlink_to(tmp_path / "native")
    [text] = _data(tmp_path / "twice", names, storage_options=options).problems
    assert "begins or ends with the same sample as the LMDB of 'train'" in text
    assert os.listdir(tmp_path / "native" / "..")  # opened without lock: nothing was written
    with pytest.raises(ConfigError, match="unknown 'ordr'.*Did you mean 'order'"):
        _data(tmp_path / "native", names, storage_options={"lmdb": {"ordr": []}})


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (
            np.full((264, 264), 40_000, np.int32),
            "holds 40000, expected digital numbers",
        ),
        (np.full((264, 264), 200, np.uint8), "holds uint8, values that were scaled to 8 bit"),
        (np.full((66, 66), 200, np.int16), r"1 bands of \(66, 66\), expected one of 264, 132 or"),
    ],
    ids=["would wrap around", "8 bit", "another size"],
)
def test_a_band_that_holds_no_digital_numbers_at_a_known_size_is_refused(
    tmp_path: Path, values: np.ndarray, found: str
) -> None:
    for time in TIMES:
        for title in PRODUCTS["S2L2A"].bands:
            short = title.replace("B0", "B")
            path = tmp_path / "s2a" / "0000000" / f"{time}_{time}_T44RKT" / f"{short}.tif"
            _tif(path, values if short == "B4" else np.full((132, 132), 7, np.int16), 10)
    rows = _data(tmp_path, {"s2": "S2L2A"}).source("train").load(Piece(0, 0, 1), 0)
    assert re.search(rf"B4\.tif: .*{found}", rows.bad[0])


def test_packed_floats_are_digital_numbers_or_refused(tmp_path: Path) -> None:
    for name, factor in (("dn", 1.0), ("reflectance", 1e-4)):
        optical = np.full((4, 13, 264, 264), 534 * factor, np.float32)
        optical[:, :, 0, 0] = np.nan
        sample = pickle.dumps((optical.tobytes(), optical.shape))
        _packed(tmp_path / name / "s2c.lmdb", [sample])
        options = {"lmdb": {"dtype": "float32"}}
        source = _data(tmp_path / name, {"s2": "S2L1C"}, storage_options=options).source("train")
        rows = source.load(Piece(0, 0, 1), 0)
        if name == "dn":
            found, valid = (np.asarray(rows.data[key])[0, 0] for key in ("s2", "s2.valid"))
            assert (found[:, 5, 5] == 534).all() and not valid[0, 0] and valid[5, 5]
        else:
            assert "holds fractions up to 0.0534, expected digital numbers" in rows.bad[0]


@pytest.mark.parametrize("kept", [0.5, 0.9, 8192])
def test_an_lmdb_that_was_cut_is_refused_before_it_is_mapped(tmp_path: Path, kept: float) -> None:
    path = _packed(tmp_path / "a", [bytes(100_000)] * 3) / "data.mdb"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(kept * len(raw)) if kept < 1 else int(kept)])
    with pytest.raises(DataError, match=r"data\.mdb: \d+ bytes, but its header speaks of"):
        _data(tmp_path / "a", {"s1": "S1GRD"})


def test_values_are_found_as_the_library_finds_them_and_forged_pages_are_errors(
    tmp_path: Path,
) -> None:
    import lmdb

    values = {str(n).encode(): bytes([n % 251]) * (3 + 37 * n % 9000) for n in range(700)}
    with lmdb.open(str(tmp_path / "a"), map_size=2**24) as env, env.begin(write=True) as write:
        for key, value in values.items():
            write.put(key, value)
    path = tmp_path / "a" / "data.mdb"
    file = LmdbFile(str(path))
    assert file.entries == 700
    assert all(file.get(key) == value for key, value in values.items())
    assert file.get(b"700") is None and file.get(b"") is None
    raw, page = path.read_bytes(), 4096
    draw = np.random.default_rng(0)
    pages = [n for n in range(2, len(raw) // page) if raw[n * page + 10] & 3 and
             int.from_bytes(raw[n * page : n * page + 8], "little") == n]  # fmt: skip
    for _ in range(60):
        forged = bytearray(raw)
        for number in draw.choice(pages, 3):  # heads, places and nodes
            for at in draw.integers(8, page, 40):
                forged[number * page + at] = draw.integers(0, 256)
        (tmp_path / "forged").write_bytes(forged)
        other = LmdbFile(str(tmp_path / "forged"))
        for key in list(values)[::50]:
            try:
                found = other.get(key)
            except DataError as error:
                assert "the LMDB is damaged" in str(error)
            else:
                assert found is None or len(found) <= len(raw)


class _Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/was_run_by_a_pickle",)


def test_pickles_are_parsed_and_never_run() -> None:
    value = (b"abc" * 100, (4, 2, 264, 264), b"", (70_000, 2**40, -3))
    for protocol in (3, 4, 5):
        assert parse_plain(pickle.dumps(value, protocol), "x") == value
    assert parse_plain(pickle.dumps((value[1], value[1])), "x") == (value[1], value[1])
    with pytest.raises(DataError, match=r"the instruction (STACK_)?GLOBAL|SHORT_BINUNICODE"):
        parse_plain(pickle.dumps((_Runs(),)), "x")
    assert not os.path.exists("/tmp/was_run_by_a_pickle")
    for odd in ([1], {"a": 1}, ("text",), (1.5,), (None,), b"bytes"):
        with pytest.raises(DataError):
            parse_plain(pickle.dumps(odd), "x")
    whole = pickle.dumps(value)
    for damaged in (
        whole[:20],
        whole[:-1],
        b"",
        b"\x80\x04\x85.",
        b"\x80\x04t.",
        b"\x80\x04h\x05.",
    ):
        with pytest.raises(DataError, match="the pickle"):
            parse_plain(damaged, "x")
    pairs = b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(100))
    doubled = parse_plain(b"\x80\x04()\x94" + pairs + b"t.", "x")
    assert len(doubled) == 101  # at once, though its last tuple holds the first one 2^100 times
