"""Stores over real HTTP, on the loopback: one that fails is never one without the file."""

from __future__ import annotations

import json
import multiprocessing
import threading
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safe_files import stored, write_safe, zipped

from domainssl.cli import main
from domainssl.errors import ConfigError, DataError
from domainssl.io.raster import gdal
from domainssl.io.raster.safe import describe_safe, read_safe
from domainssl.io.raster.zarr import open_cube
from domainssl.io.ssl4eo.labels import labels
from domainssl.io.storage.archives import FolderStore
from domainssl.io.storage.paths import fetch_ranges, is_file, is_folder, open_file, size_of
from domainssl.io.storage.remote import Retry, StoreError

QUICK: dict[str, Any] = {"retry": {"attempts": 2, "first_wait_s": 0}}


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, with ranges, unless it is told to fail."""

    status: int | None = None  # answer this to every request
    failing = ""  # only to paths that contain this
    has_ranges = True
    silence = threading.Event()  # set: answer; clear: wait

    def do_GET(self) -> None:
        self.silence.wait(60)
        if self.status and self.failing in self.path:
            self.send_response(self.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if not (asked and self.has_ranges and path.is_file()):
            super().do_GET()
            return
        first, last = asked.removeprefix("bytes=").split("-")
        content = path.read_bytes()
        part = content[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def do_HEAD(self) -> None:
        self.silence.wait(60)
        if self.status and self.failing in self.path:
            self.send_response(self.status)
            self.end_headers()
            return
        super().do_HEAD()

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in (("status", None), ("failing", ""), ("has_ranges", True)):
        monkeypatch.setattr(Handler, name, value)
    Handler.silence.set()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    http.daemon_threads = True
    thread = threading.Thread(target=partial(http.serve_forever, 0.05), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_address[1]}"
    Handler.silence.set()
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.mark.parametrize("status", [500, 503, 403, 401, 429])
def test_a_server_that_fails_is_not_one_without_the_file(server, tmp_path, monkeypatch, status):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "train.csv").write_text("sample,label\na,0\n")
    monkeypatch.setattr(Handler, "status", status)
    for ask in (
        lambda: is_file(f"{server}/labels/train.csv", QUICK),
        lambda: is_folder(f"{server}/labels/", QUICK),
        lambda: size_of(f"{server}/labels/train.csv", QUICK),
        lambda: open_file(f"{server}/labels/train.csv", QUICK),
        lambda: fetch_ranges(f"{server}/labels/train.csv", [(0, 4)], QUICK),
        lambda: labels(server, "train", QUICK),
        lambda: open_cube(f"{server}/a.zarr.zip", options=QUICK),
    ):
        with pytest.raises(StoreError, match=rf"{status}"):
            ask()
    monkeypatch.setattr(Handler, "status", None)
    found = labels(server, "train", QUICK)
    assert found is not None and found.label == {"a": 0}


@pytest.mark.parametrize("is_zip", [False, True])
def test_a_sentinel_2_product_is_read_by_ranges_or_said_to_fail(
    server, tmp_path, monkeypatch, is_zip
):
    local = write_safe(tmp_path)
    url = f"{server}/{(zipped(local) if is_zip else local).name}"
    file = describe_safe(url, ["B02", "B11"], mask="scl", options=QUICK)
    for band in file.bands:
        values, _ = read_safe(url, band, slice(0, 20), slice(3, 30), QUICK)
        np.testing.assert_array_equal(values, stored(band.name, "20220301")[:20, 3:30])
    monkeypatch.setattr(Handler, "status", 503)
    with pytest.raises(DataError, match="503|JPEG 2000 image cannot be read"):
        read_safe(url, file.mask, slice(0, 20), slice(0, 20), QUICK)  # not opened yet


def test_a_missing_file_is_one(server):
    assert not is_file(f"{server}/none", QUICK) and not is_folder(f"{server}/none", QUICK)
    assert labels(server, "train", QUICK) is None
    with pytest.raises(DataError, match="no such file"):
        open_file(f"{server}/none", QUICK)


def test_folders_and_files_are_told_apart_over_http(server, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.bin").write_bytes(bytes(10))
    assert is_folder(f"{server}/folder/", QUICK) and not is_file(f"{server}/folder/", QUICK)
    assert is_file(f"{server}/folder/a.bin", QUICK)
    assert not is_folder(f"{server}/folder/a.bin", QUICK)


def test_a_request_without_an_answer_ends_after_its_time(server, tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    Handler.silence.clear()
    options = {"retry": {"attempts": 1, "timeout_s": 0.2}}
    with pytest.raises(StoreError, match="no answer in 1 attempts.*retry"):
        size_of(f"{server}/a", options)


@pytest.mark.parametrize(
    "retry",
    [{"timeout": 3}, {"timeout_s": 0}, {"attempts": "5"}, {"attempts": 0}, {"factor": "nan"}, 3],
)
def test_a_policy_that_makes_no_sense_is_a_configuration_error(retry):
    with pytest.raises((ConfigError, TypeError), match=r"retry|int"):
        Retry.of(retry)


def test_a_server_without_ranges_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(bytes(1000))
    monkeypatch.setattr(Handler, "has_ranges", False)
    with pytest.raises(DataError, match="all 1000 bytes where 10 .* does not support Range"):
        fetch_ranges(f"{server}/a.tar", [(100, 10)], QUICK)
    assert fetch_ranges(f"{server}/a.tar", [(0, 1000)], QUICK) == [bytes(1000)]


class Endless(SimpleHTTPRequestHandler):
    """Sends a file of a terabyte to whoever asks for a part of it, and counts what is taken."""

    sent: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(2**40))
        self.end_headers()
        self.sent.append(0)
        with suppress(OSError):
            while True:
                self.sent[-1] += self.wfile.write(bytes(2**16))

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(2**40))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Stay silent."""


def test_no_whole_file_is_received_for_a_part_of_it():
    Endless.sent.clear()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    http.daemon_threads = True
    thread = threading.Thread(target=partial(http.serve_forever, 0.05), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{http.server_address[1]}/a.zarr.zip"
    with pytest.raises(DataError, match="does not support Range"):
        fetch_ranges(url, [(2**30 * i, 100) for i in range(20)])
    with pytest.raises(DataError, match="does not support Range"):
        open_cube(url)
    with pytest.raises(DataError, match=r"zarr\.json: more than 16\d+ bytes, which is refused"):
        FolderStore(url.removesuffix(".zip")).get("zarr.json")
    http.shutdown()
    http.server_close()
    thread.join()
    assert 3 <= len(Endless.sent) <= 23 and max(Endless.sent) < 2**25  # buffers of the system


def write_v3(path: Path) -> np.ndarray[Any, Any]:
    import zarr

    values = np.arange(2 * 8 * 8, dtype=np.int16).reshape(2, 8, 8)
    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    array = group.create_array("a", shape=values.shape, chunks=(1, 8, 8), dtype="int16")
    array[...] = values
    zarr.consolidate_metadata(str(path), zarr_format=3)
    return values


@pytest.mark.filterwarnings("ignore:Consolidated metadata:UserWarning")
def test_a_chunk_of_format_3_that_the_server_fails_to_send_is_not_taken_for_missing(
    server, tmp_path, monkeypatch
):
    values = write_v3(tmp_path / "a.zarr")
    cube = open_cube(f"{server}/a.zarr/", options=QUICK)
    np.testing.assert_array_equal(cube.read("a"), values)
    for status, failing in ((500, "c/1"), (403, "c/0")):
        monkeypatch.setattr(Handler, "status", status)
        monkeypatch.setattr(Handler, "failing", failing)
        with pytest.raises(StoreError, match=str(status)):
            cube.read("a")
    monkeypatch.setattr(Handler, "status", 404)  # a chunk that was never written is its fill
    monkeypatch.setattr(Handler, "failing", "c/1")
    np.testing.assert_array_equal(cube.read("a"), values * [[[1]], [[0]]])


def test_inspect_of_a_url_ends_with_one_message(server, tmp_path, monkeypatch, capsys):
    with zipfile.ZipFile(tmp_path / "a.zarr.zip", "w") as file:
        file.writestr(".zgroup", '{"zarr_format": 2}')
        facts = {"zarr_format": 2, "shape": [4], "chunks": [4], "dtype": "<i2", "filters": None,
                 "compressor": None, "fill_value": 0, "order": "C"}  # fmt: skip
        file.writestr("a/.zarray", json.dumps(facts))
    assert main(["inspect", f"{server}/a.zarr.zip"]) in (0, 1)
    capsys.readouterr()
    for path, status in (("/none.zarr.zip", None), ("/none.tif", None), ("/a.zarr.zip", 403)):
        monkeypatch.setattr(Handler, "status", status)
        assert main(["inspect", server + path]) in (1, 2)
        found = capsys.readouterr()
        assert "Traceback" not in found.err and path.strip("/") in found.err + found.out
    monkeypatch.setattr(Handler, "has_ranges", False)
    monkeypatch.setattr(Handler, "status", None)
    with zipfile.ZipFile(tmp_path / "b.zarr.zip", "w") as file:
        file.writestr("a/0", bytes(2**20))
    assert main(["inspect", f"{server}/b.zarr.zip"]) == 2
    assert "Range" in capsys.readouterr().err


class Stumbling(Handler):
    """Fails twice, then serves."""

    failures: ClassVar[list[int]] = [500, 503]

    @property
    def status(self) -> int | None:  # type: ignore[override]
        """What the next request is answered with."""
        return self.failures.pop() if self.failures else None


def test_a_geotiff_is_asked_for_again_and_its_server_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rasterio = pytest.importorskip("rasterio")
    monkeypatch.setitem(gdal._PATIENCE, "GDAL_HTTP_RETRY_DELAY", "0.01")
    profile = {"driver": "GTiff", "width": 4, "height": 4, "count": 1, "dtype": "uint8"}
    where = {"crs": "EPSG:32632", "transform": rasterio.Affine(10, 0, 0, 0, -10, 0)}
    with rasterio.open(tmp_path / "a.tif", "w", **profile, **where) as file:
        file.write(np.full((1, 4, 4), 7, np.uint8))
    Handler.silence.set()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Stumbling, directory=str(tmp_path)))
    # rasterio keeps the interpreter while it waits: a thread of this process could not answer
    process = multiprocessing.get_context("fork").Process(target=http.serve_forever, daemon=True)
    process.start()
    url = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        with gdal.open_raster(f"{url}/a.tif") as file, gdal.reading(f"{url}/a.tif"):
            assert (file.read() == 7).all()
        with pytest.raises(DataError, match=r"Its server did not answer as expected.*try again"):
            gdal.open_raster(f"{url}/b.tif")
    finally:
        process.kill()
        process.join()
        http.server_close()
