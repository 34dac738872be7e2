"""What opening files found is kept, and never served when something has changed."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
from cube_files import TIMES, coded, write_cube, write_geotiff
from dicom_files import write_series
from ssl4eo_files import write_split

from domainssl.cache import entries
from domainssl.io.raster import describe as describing
from domainssl.io.raster.describe import LayerFiles, Sought, describe
from domainssl.io.raster.layer import LayerFile
from domainssl.io.raster.sites import Found
from domainssl.io.ssl4eo import layout
from domainssl.io.ssl4eo import opened as opening
from domainssl.io.storage import archives, scan_index
from domainssl.io.storage.paths import is_settled
from domainssl.io.volume import dicom, known
from domainssl.io.volume.scan import list_scans

BANDS = ("B02", "B03")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own, and files that count as written long ago."""
    monkeypatch.setenv("DOMAINSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scan_index, "is_settled", lambda facts, now: True)


@pytest.fixture
def opened(monkeypatch):
    """Paths in the order in which they are opened."""
    paths = []

    def counted(sought, found, *args, **options):
        paths.append(Path(found.path).name)
        return describe(sought, found, *args, **options)

    monkeypatch.setattr(describing, "describe", counted)
    return paths


def scan(root: Path, *paths: Path, bands: tuple[str, ...] = BANDS) -> list[LayerFile]:
    files, sought = LayerFiles(str(root)), Sought(bands=bands)
    found = [Found(str(path), "", "") for path in paths]
    files.fill({sought: found})
    return [files.get(sought, each) for each in found]


def same(a: LayerFile, b: LayerFile) -> bool:
    names = [name for name in LayerFile.__slots__ if name not in ("times", "options")]
    is_same = all(getattr(a, name) == getattr(b, name) for name in names)
    return is_same and np.array_equal(a.times, b.times, equal_nan=True)


def cube(path: Path, **changes) -> Path:
    return write_cube(path, coded(4, 2, 32), BANDS, **{"as_variables": True, **changes})


ATTRS = {"scale_factor": 1e-4, "add_offset": -0.1, "_FillValue": 0, "valid_max": 9000, "units": "1"}


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("as_variables", [True, False])
def test_a_store_is_opened_once_and_described_the_same(tmp_path, opened, zarr_format, as_variables):
    path = cube(
        tmp_path / "a.zarr", zarr_format=zarr_format, as_variables=as_variables, attrs=ATTRS
    )
    plain = describe(Sought(bands=BANDS), Found(str(path), "", ""))
    [first], [second] = scan(tmp_path, path), scan(tmp_path, path)
    assert opened == ["a.zarr"]
    assert same(first, plain) and same(second, plain)
    assert first.times.dtype == plain.times.dtype and first.times.tolist() == TIMES.tolist()


def test_geotiff_and_zips_are_remembered_too(tmp_path, opened):
    tif = write_geotiff(tmp_path / "s2_20210301.tif", coded(1, 2, 32)[0], BANDS, nodata=-1)
    store = cube(tmp_path / "b.zarr")
    zipped = Path(shutil.make_archive(str(tmp_path / "b.zarr"), "zip", store))
    plain = [describe(Sought(bands=BANDS), Found(str(p), "", "")) for p in (tif, zipped)]
    assert [same(*pair) for pair in zip(scan(tmp_path, tif, zipped), plain)] == [True, True]
    assert [same(*pair) for pair in zip(scan(tmp_path, tif, zipped), plain)] == [True, True]
    assert opened == ["s2_20210301.tif", "b.zarr.zip"]


def rewrite_values(path: Path) -> None:
    """Other numbers under the same name, of the same size, with the old time of change."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_changed_file_is_opened_again(tmp_path, opened):
    path = cube(tmp_path / "a.zarr", attrs={"units": "1"})
    scan(tmp_path, path)
    meta = path / "B02" / "zarr.json"
    meta.write_text(meta.read_text().replace('"units": "1"', '"units": "2"'))
    [changed] = scan(tmp_path, path)
    assert [band.unit for band in changed.bands] == ["2", "1"]

    cube(tmp_path / "other.zarr", left=500_000.0)
    shutil.copyfile(tmp_path / "other.zarr/x/c/0", path / "x/c/0")
    [moved] = scan(tmp_path, path)
    assert moved.bands[0].grid.left == 500_000.0

    shutil.rmtree(path / "B03")  # what is not there any more is missed, by its own message
    with pytest.raises(describing.DataError, match="no band 'B03'"):
        scan(tmp_path, path)
    assert opened == ["a.zarr"] * 5


def test_times_of_change_set_back_do_not_hide_a_change(tmp_path, opened):
    path = write_geotiff(tmp_path / "a.tif", coded(1, 2, 32)[0], BANDS)
    scan(tmp_path, path)
    rewrite_values(path)
    scan(tmp_path, path)
    assert opened == ["a.tif"] * 2


def test_a_file_that_appears_beside_a_geotiff_counts(tmp_path, opened):
    path = write_geotiff(tmp_path / "a.tif", coded(1, 2, 32)[0], BANDS)
    assert not scan(tmp_path, path)[0].bands[0].has_mask
    other = write_geotiff(tmp_path / "other.tif", coded(1, 2, 32)[0], BANDS)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(other, "r+") as file:
        file.write_mask(np.zeros((32, 32), np.uint8))
    (tmp_path / "other.tif.msk").rename(tmp_path / "a.tif.msk")
    assert scan(tmp_path, path)[0].bands[0].has_mask


def test_only_new_sites_are_opened_and_lost_ones_forgotten(tmp_path, opened):
    paths = [write_geotiff(tmp_path / f"{name}.tif", coded(1, 2, 32)[0], BANDS) for name in "abc"]
    scan(tmp_path, *paths[:2])
    scan(tmp_path, *paths)
    assert opened == ["a.tif", "b.tif", "c.tif"]
    paths[0].unlink()
    write_geotiff(paths[1], coded(1, 2, 48)[0], BANDS)
    scan(tmp_path, *paths[1:])
    [index] = (tmp_path / "cache").glob("scans-1/[!.]*.json")
    content = json.loads(index.read_bytes().partition(b"\n")[2])
    names = {Path(row[0].split("\n")[0]).name for row in content["rows"]}
    assert names == {"b.tif", "c.tif"}
    assert entries()[0].name == "scans"


@pytest.mark.parametrize("damage", ["cut", "flipped", "other", "empty", "rows"])
def test_a_damaged_index_is_built_anew_with_a_message(tmp_path, opened, caplog, damage):
    path = write_geotiff(tmp_path / "a.tif", coded(1, 2, 32)[0], BANDS)
    [plain] = scan(tmp_path, path)
    [index] = (tmp_path / "cache").glob("scans-1/[!.]*.json")
    head, _, body = content = index.read_bytes().partition(b"\n")
    index.write_bytes(
        {
            "cut": b"".join(content)[:-20],
            "flipped": b"".join(content).replace(b"400000.0", b"400010.0"),
            "other": b'{"request": 1}\n{}',
            "empty": b"",
            "rows": head.replace(scan_index.hashlib.sha256(body).hexdigest().encode(),
                                 scan_index.hashlib.sha256(b"[1]").hexdigest().encode()) + b"\n[1]",
        }[damage]
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        [again] = scan(tmp_path, path)
    assert same(again, plain)
    assert "damaged" in caplog.text and str(index) in caplog.text
    assert opened == ["a.tif"] * 2
    scan(tmp_path, path)
    assert opened == ["a.tif"] * 2


def test_what_was_just_written_is_not_believed_yet(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(scan_index, "is_settled", is_settled)
    path = write_geotiff(tmp_path / "a.tif", coded(1, 2, 32)[0], BANDS)
    facts = path.stat()
    last = max(facts.st_mtime_ns, facts.st_ctime_ns)
    monkeypatch.setattr(scan_index.time, "time_ns", lambda: last + 1_000)
    scan(tmp_path, path)
    scan(tmp_path, path)
    assert opened == ["a.tif"] * 2
    monkeypatch.setattr(scan_index.time, "time_ns", lambda: last + 10**10)
    scan(tmp_path, path)
    scan(tmp_path, path)
    assert opened == ["a.tif"] * 3


def test_warnings_about_a_file_are_said_in_later_runs(tmp_path, caplog):
    attrs = {"spatial:transform": [10.0, 0.0, 1_000.0, 0.0, -10.0, 2_000.0]}
    path = cube(tmp_path / "a.zarr", attrs=attrs)
    for _ in range(2):
        describing._say.cache_clear()  # as in another process
        caplog.clear()
        scan(tmp_path, path)
        assert "does not fit the coordinates" in caplog.text


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, opened, caplog):
    (tmp_path / "cache").write_text("a file")
    path = write_geotiff(tmp_path / "a.tif", coded(1, 2, 32)[0], BANDS)
    assert scan(tmp_path, path)[0].bands[0].grid.width == 32
    assert "not kept" in caplog.text
    assert opened == ["a.tif"]


def test_the_longest_unused_indexes_go_first(tmp_path, monkeypatch):
    monkeypatch.setattr(scan_index, "_MOST_FILES", 2)
    path = write_geotiff(tmp_path / "a.tif", coded(1, 2, 32)[0], BANDS)
    for number, bands in enumerate((BANDS, BANDS[:1], BANDS[1:])):
        scan(tmp_path, path, bands=bands)
        for index in (tmp_path / "cache").glob("scans-1/[!.]*.json"):
            os.utime(index, (number, number))
    assert len(list((tmp_path / "cache").glob("scans-1/[!.]*.json"))) == 2


def test_processes_find_the_same_as_one_and_start_where_they_pay(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(scan_index, "_TRIED", 1)
    monkeypatch.setattr(scan_index, "_PAYS_S", 0.0)
    monkeypatch.setattr(scan_index, "_TASK", 1)
    monkeypatch.setattr(scan_index, "cores", lambda: 2)
    paths = [
        write_geotiff(tmp_path / f"{i}.tif", coded(1, 2, 32)[0], BANDS, left=1e5 * i)
        for i in range(1, 5)
    ]
    lefts = [file.bands[0].grid.left for file in scan(tmp_path, *paths)]
    assert lefts == [1e5, 2e5, 3e5, 4e5]
    assert opened == ["1.tif"]  # in this process, to see how long it takes


def test_one_process_opens_while_others_wait(tmp_path, opened, monkeypatch):
    path = write_geotiff(tmp_path / "a.tif", coded(1, 2, 32)[0], BANDS)
    index = scan_index.ScanIndex("cubes", {"root": str(tmp_path)})
    alone, calls = scan_index._alone, []

    def looked_at(keys):
        calls.append(list(keys))
        return [scan_index.Seen("shape", "own", ((0, ""),)) for _ in keys]

    def after_another(path_):
        monkeypatch.setattr(scan_index, "_alone", alone)
        other = scan_index.ScanIndex("cubes", {"root": str(tmp_path)})
        other.fill({"a": str(path)}, looked_at, 0)  # another rank has the lock before us
        return alone(path_)

    monkeypatch.setattr(scan_index, "_alone", after_another)
    index.fill({"a": str(path)}, looked_at, 0)
    assert calls == [["a"]] and index.opened == 0
    assert index.get("a") == ("shape", "own")


def test_files_that_change_every_second_settle_later():
    now = time.time_ns()
    fine = os.stat_result((0,) * 10 + (0.0, 0.0, 0.0, now - 1, now - 1, now - 1))
    assert not is_settled(fine, now)
    assert is_settled(fine, now + 10**9)


class DiesElsewhere:
    """Looks at files in one process only."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def __call__(self, keys):
        if os.getpid() != self.pid:
            os._exit(1)
        return [scan_index.Seen("shape", "own", ((0, ""),)) for _ in keys]


def test_processes_that_die_leave_the_work_to_this_one(tmp_path, caplog):
    path = write_geotiff(tmp_path / "a.tif", coded(1, 2, 32)[0], BANDS)
    look = DiesElsewhere(os.getpid())
    index = scan_index.ScanIndex("cubes", {"root": str(tmp_path)})
    index.fill({str(i): str(path) for i in range(3 * scan_index._TASK)}, look, 2)
    assert index.get("95") == ("shape", "own")
    assert "Going on in this process" in caplog.text


@pytest.mark.parametrize("release", ["A", "B"])
def test_files_of_ssl4eo_are_opened_once_until_they_change(tmp_path, monkeypatch, release):
    read, keep = [], opening._shape

    def counted(path, *more):
        read.append(Path(path).name)
        return keep(path, *more)

    monkeypatch.setattr(opening, "_shape", counted)
    monkeypatch.setattr(opening, "tar_index", archives._scan_tar)  # what a new process does
    write_split(tmp_path / "data", "train", [[0, 1], [2, 3], [4]], release)
    products = {"s1": "S1GRD", "s2": "S2L2A"}
    first = layout.scan(str(tmp_path / "data"), "train", products)
    assert len(read) == 3 and first.count == 5  # one product tells the sizes
    monkeypatch.setattr(opening, "tar_index", None)
    assert layout.scan(str(tmp_path / "data"), "train", products) == first and len(read) == 3
    monkeypatch.setattr(opening, "tar_index", archives._scan_tar)
    path = sorted((tmp_path / "data" / "train" / "S1GRD").iterdir())[1]
    path.write_bytes(path.read_bytes()[:900])
    for _ in range(2):  # what cannot be read is asked again, and said again
        found = layout.scan(str(tmp_path / "data"), "train", products)
        assert path.name in found.problems[0] and found.count == (5 if release == "A" else 3)
    assert len(entries()) == 1


def test_folders_of_dicom_are_opened_once_and_no_name_is_kept(tmp_path, monkeypatch):
    looked, look = [], dicom.look
    monkeypatch.setattr(dicom, "look", lambda path: looked.append(path) or look(path))
    monkeypatch.setattr(known, "MANY", 2)
    folders = [tmp_path / "exams" / name for name in ("miller", "smith", "jones")]
    for folder in folders:
        write_series(folder)
    (folders[2] / "0000.dcm").write_bytes(b"no image")  # comes first: others may be
    wanted = sorted(map(str, folders))
    assert list_scans(tmp_path / "exams") == wanted and len(looked) == 3
    looked.clear()
    assert list_scans(tmp_path / "exams") == wanted and len(looked) == 1
    for path in folders[0].iterdir():
        path.unlink()
    assert list_scans(tmp_path / "exams") == wanted[:1] + wanted[2:]
    kept = [path.read_text() for path in (tmp_path / "cache").rglob("*.json")]
    assert not any(name in text for text in kept for name in ("miller", "smith", "jones", "exams"))
