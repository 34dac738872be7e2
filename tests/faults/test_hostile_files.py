"""Files that would read something else, unfold without end, or say nonsense about themselves."""

from __future__ import annotations

import gc
import json
import os
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest

from domainssl.errors import DataError
from domainssl.inspection.recognise import inspect_path
from domainssl.io.raster.gdal import open_raster
from domainssl.io.raster.zarr import open_cube
from domainssl.io.storage.archives import tar_index
from domainssl.io.storage.bounded import unpack

GROUP = {".zgroup": b'{"zarr_format": 2}'}
DIMS = b'{"_ARRAY_DIMENSIONS": ["sample", "band", "y", "x"]}'
V3: dict[str, Any] = {
    "zarr_format": 3, "node_type": "array", "shape": [2, 64], "data_type": "uint8",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2, 64]}},
    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    "fill_value": 0, "codecs": [{"name": "bytes"}], "attributes": {},
}  # fmt: skip
V3_GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}


def v2(**facts: Any) -> bytes:
    usual = {"zarr_format": 2, "shape": [2, 2, 8, 8], "chunks": [2, 2, 8, 8], "dtype": "<i2",
             "compressor": None, "filters": None, "fill_value": 0, "order": "C"}  # fmt: skip
    return json.dumps({**usual, **facts}).encode()


def zipped(folder: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> str:
    path = folder / "a.zarr.zip"
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return str(path)


def array(content: bytes, **facts: Any) -> dict[str, bytes]:
    return {**GROUP, "bands/.zattrs": DIMS, "bands/.zarray": v2(**facts), "bands/0.0.0.0": content}


@pytest.fixture
def requests() -> Iterator[tuple[str, list[str]]]:
    """Yield the address of a server and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()
    thread.join()


# ------------------------------------------------------------------------------------- bombs

CODECS: list[dict[str, Any]] = [
    {"id": "zlib", "level": 9}, {"id": "gzip", "level": 9}, {"id": "bz2", "level": 9},
    {"id": "lzma", "format": 1, "check": -1, "preset": 1, "filters": None},
    {"id": "zstd", "level": 1}, {"id": "lz4", "acceleration": 1},
    {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0},
]  # fmt: skip


@pytest.mark.parametrize("damage", ["header", "text", "facts"])
def test_members_damaged_together_are_told_once(tmp_path, caplog, damage):
    wrong = {"text": b'{"zarr', "facts": json.dumps({**V3, "data_type": "uint9"}).encode()}
    array = wrong.get(damage, json.dumps(V3).encode())
    files = {"zarr.json": json.dumps(V3_GROUP).encode()}
    raw = Path(zipped(tmp_path, files | {f"{m}/zarr.json": array for m in "abcd"})).read_bytes()
    for member in "abcd" if damage == "header" else "":
        place = raw.index(f"{member}/zarr.json".encode()) - 30  # not the list at the end
        raw = raw[:place] + b"XX" + raw[place + 2 :]
    with pytest.raises(DataError, match=r"a\.zarr\.zip: "):
        assert open_cube(raw, "a.zarr.zip").arrays
    gc.collect()  # tasks that failed beside the first are finalized here, at the latest
    assert not [r for r in caplog.records if r.name == "asyncio"], caplog.text


@pytest.mark.parametrize("config", CODECS, ids=lambda c: str(c["id"]))
def test_a_codec_gives_its_bytes_up_to_the_limit_and_no_more(config):
    data = np.random.default_rng(0).integers(0, 9, 1000, np.uint8).tobytes()
    codec = numcodecs.get_codec(dict(config))
    assert bytes(unpack(config, codec.encode(data), len(data))) == data
    with pytest.raises(ValueError, match="unfolds to more|announces"):
        unpack(config, codec.encode(b"\0" * 2**22), 2**16)
    with pytest.raises((ValueError, EOFError, RuntimeError)):
        unpack(config, bytes(codec.encode(data))[:-20], len(data))


def test_zstandard_streams_that_do_not_announce_their_size_are_bounded_by_their_blocks():
    head = (0xFD2FB528).to_bytes(4, "little") + bytes([0, 0x88])  # no size, window of 128 MB
    block = (1 << 1 | 2**17 << 3).to_bytes(3, "little") + b"\0"  # 128 kB of zeros in 4 bytes
    last = (1 << 1 | 1 | 2**17 << 3).to_bytes(3, "little") + b"\0"
    assert len(unpack({"id": "zstd"}, head + last, 2**17)) == 2**17
    with pytest.raises(ValueError, match="zstd announces"):
        unpack({"id": "zstd"}, head + 1000 * block + last, 2**17)


@pytest.mark.parametrize("config", CODECS, ids=lambda c: str(c["id"]))
def test_a_chunk_that_unfolds_is_refused_by_its_name(tmp_path, config):
    content = numcodecs.get_codec(dict(config)).encode(b"\0" * 2**22)
    path = zipped(tmp_path, array(bytes(content), compressor=config))
    with pytest.raises(DataError, match=r"a.zarr.zip: array 'bands', chunk 'bands/0.0.0.0'"):
        open_cube(path).read("bands")


@pytest.mark.parametrize("name", ["gzip", "zstd", "blosc"])
def test_a_chunk_of_format_3_that_unfolds_is_refused(tmp_path, name):
    config = next(c for c in CODECS if c["id"] == name)
    facts = {
        "gzip": {"level": 1},
        "zstd": {"level": 1, "checksum": False},
        "blosc": {
            "cname": "lz4",
            "clevel": 5,
            "shuffle": "noshuffle",
            "typesize": 1,
            "blocksize": 0,
        },
    }
    codecs = [{"name": "bytes"}, {"name": name, "configuration": facts[name]}]
    for size, is_fine in ((128, True), (2**22, False)):
        content = bytes(numcodecs.get_codec(dict(config)).encode(b"\1" * size))
        files = {
            "zarr.json": json.dumps(V3_GROUP).encode(),
            "a/zarr.json": json.dumps({**V3, "codecs": codecs}).encode(),
            "a/c/0/0": content,
        }
        cube = open_cube(Path(zipped(tmp_path, files)).read_bytes(), "a.zarr.zip")
        if is_fine:
            assert (cube.read("a") == 1).all()
        else:
            with pytest.raises(DataError, match=rf"a.zarr.zip.*'a'.*({name}|header)"):
                cube.read("a")


@pytest.mark.parametrize("member", [".zmetadata", "bands/.zattrs", "bands/0.0.0.0"])
def test_a_zip_member_that_unfolds_is_refused_before_it_is_read(tmp_path, member):
    files = array(b"", compressor=None) | {member: b"\0" * (2**24 + 1)}
    path = zipped(tmp_path, files, zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match=rf"member '{member}': 16.8 MB, where at most"):
        open_cube(path).read("bands")


def test_zip_members_of_unbounded_methods_are_refused(tmp_path):
    path = zipped(tmp_path, array(b"\0" * 256), zipfile.ZIP_LZMA)
    with pytest.raises(DataError, match="compressed with method 14 of zip"):
        open_cube(path).read("bands")


@pytest.mark.parametrize(
    "facts",
    [
        {"shape": [10**6, 2, 10**6, 10**6], "chunks": [1, 1, 64, 64]},
        {"shape": [2, 2, 8, 10**12], "chunks": [2, 2, 8, 1]},
        {"chunks": [10**6] * 4},
    ],
)
def test_shapes_and_chunks_that_no_memory_holds_are_refused(tmp_path, facts):
    path = zipped(tmp_path, array(b"x", **facts))
    with pytest.raises(DataError, match="array 'bands'|of 'bands'"):
        open_cube(path).read("bands")


def test_a_sparse_raster_of_terabytes_is_measured_in_squares(tmp_path):
    import rasterio
    from rasterio.transform import from_origin

    with rasterio.open(
        tmp_path / "x.tif", "w", driver="GTiff", height=300_000, width=300_000, count=1,
        dtype="uint8", SPARSE_OK=True, tiled=True, BIGTIFF="YES", crs="EPSG:32632",
        transform=from_origin(0, 0, 10, 10),
    ) as file:  # fmt: skip
        file.write(np.full((1, 128, 128), 7, np.uint8), window=((0, 128), (0, 128)))
    [found] = inspect_path(str(tmp_path / "x.tif"))["files"]
    assert found["shape"] == [1, 300_000, 300_000]
    assert found["values"][0]["max"] == 7 and found["values"][0]["mean"] == 7 / 16


# ---------------------------------------------------------------------------------- metadata


@pytest.mark.parametrize(
    "files",
    [
        {"bands/.zarray": v2(chunks=[0] * 4)},
        {"bands/.zarray": v2(shape=[-2, 2, 8, 8])},
        {"bands/.zarray": v2(shape=["a", 2, 8, 8])},
        {"bands/.zarray": v2(shape=[2.0, 2, 8, 8])},
        {"bands/.zarray": v2(shape=None)},
        {"bands/.zarray": v2(chunks=[2, 2])},
        {"bands/.zarray": v2(dtype="|O")},
        {"bands/.zarray": v2(dtype=7)},
        {"bands/.zarray": v2(order="X")},
        {"bands/.zarray": v2(dimension_separator="/../")},
        {"bands/.zarray": v2(compressor="zlib")},
        {"bands/.zarray": v2(filters="pickle")},
        {"bands/.zarray": v2(fill_value=[1])},
        {"bands/.zarray": b"{}"},
        {"bands/.zarray": b"[1, 2]"},
        {"bands/.zarray": b"["},
        {"bands/.zarray": b"[" * 200_000},
        {"bands/.zarray": b"\xff\xfe"},
        {"bands/.zattrs": b"[1]"},
        {"bands/.zattrs": b'{"_ARRAY_DIMENSIONS": 4}'},
        {"bands/.zattrs": b'{"_ARRAY_DIMENSIONS": [1, 2, 3, 4]}'},
        {".zmetadata": b"{}"},
        {".zmetadata": b"[]"},
        {".zmetadata": b'{"metadata": [1]}'},
        {".zmetadata": b'{"metadata": {".zgroup": {}, "../a/.zarray": {}}}'},
        {"zarr.json": b"{"},
        {"zarr.json": json.dumps(V3).encode()},
        {"zarr.json": json.dumps({**V3_GROUP, "attributes": 4}).encode()},
        {"zarr.json": json.dumps(V3_GROUP).encode(), "bands/zarr.json": b"{}"},
        {"zarr.json": json.dumps(V3_GROUP).encode(),
         "bands/zarr.json": json.dumps({**V3, "codecs": [{"name": "numcodecs.pickle"}]}).encode()},
    ],
    ids=lambda files: "-".join(f"{k}={v[:40]!r}" for k, v in files.items())[:70],
)  # fmt: skip
def test_metadata_that_make_no_sense_are_an_error_that_names_the_file(tmp_path, files):
    path = zipped(tmp_path, array(b"\0" * 512) | files)
    with pytest.raises(DataError, match=r"a\.zarr\.zip"):
        open_cube(path).arrays  # noqa: B018


def test_names_in_metadata_of_format_3_do_not_leave_the_store(tmp_path):
    outside = tmp_path / "outside" / "c" / "0" / "0"
    outside.parent.mkdir(parents=True)
    outside.write_bytes(b"S" * 128)
    inline = {"kind": "inline", "must_understand": False, "metadata": {"../outside": V3}}
    (tmp_path / "a.zarr").mkdir()
    text = json.dumps({**V3_GROUP, "consolidated_metadata": inline})
    (tmp_path / "a.zarr" / "zarr.json").write_text(text)
    with pytest.raises(DataError, match=r"refuses member '\.\./outside'"):
        open_cube(str(tmp_path / "a.zarr")).arrays  # noqa: B018


def test_a_sparse_member_of_a_tar_is_refused(tmp_path, monkeypatch):
    import tarfile

    info = tarfile.TarInfo("a.zarr.zip")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(info)
    raw = bytearray((tmp_path / "a.tar").read_bytes())
    raw[156:157] = b"S"  # GNU sparse
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    (tmp_path / "a.tar").write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.tar"):
        tar_index(str(tmp_path / "a.tar"))


# -------------------------------------------------------------------------------- other files


def vrt(source: str, attributes: str = "") -> str:
    return (
        '<VRTDataset rasterXSize="8" rasterYSize="8"><VRTRasterBand dataType="UInt16" band="1"'
        f'{attributes}><SimpleSource><SourceFilename relativeToVRT="0">{source}</SourceFilename>'
        "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )


def geotiff(path: Path, value: int = 1, size: int = 8, **profile: Any) -> None:
    import rasterio
    from rasterio.transform import from_origin

    with rasterio.open(
        path, "w", driver="GTiff", height=size, width=size, count=1, dtype="uint16",
        crs="EPSG:32632", transform=from_origin(0, 0, 10, 10), **profile,
    ) as file:  # fmt: skip
        file.write(np.full((1, size, size), value, np.uint16))


@pytest.mark.parametrize("kind", ["vrt", "url", "raw", "wms", "text", "empty"])
def test_only_geotiff_is_opened_as_geotiff(tmp_path, requests, kind):
    address, asked = requests
    geotiff(tmp_path / "outside.tif", 4242)
    (tmp_path / "in").mkdir()
    wms = (
        f"<GDAL_WMS><Service name='TMS'><ServerUrl>{address}/${{z}}/${{x}}/${{y}}.png</ServerUrl>"
        "</Service><DataWindow><UpperLeftX>0</UpperLeftX><UpperLeftY>8</UpperLeftY>"
        "<LowerRightX>8</LowerRightX><LowerRightY>0</LowerRightY><SizeX>8</SizeX><SizeY>8</SizeY>"
        "<TileLevel>0</TileLevel></DataWindow><BandsCount>1</BandsCount></GDAL_WMS>"
    )
    content = {
        "vrt": vrt(str(tmp_path / "outside.tif")),
        "url": vrt(f"/vsicurl/{address}/a.tif"),
        "raw": vrt(str(tmp_path / "outside.tif"), ' subClass="VRTRawRasterBand"'),
        "wms": wms, "text": "hello", "empty": "",
    }[kind]  # fmt: skip
    (tmp_path / "in" / "x.tif").write_text(content)
    report = inspect_path(str(tmp_path / "in"))
    assert report["files"] == [] and "x.tif: not recognized as GeoTIFF" in report["problems"][0]
    assert asked == []


@pytest.mark.parametrize("ending", [".ovr", ".msk", ".OVR", ".ovr.msk"])
def test_what_gdal_opens_beside_a_raster_is_tiff_too(tmp_path, ending):
    geotiff(tmp_path / "outside.tif", 4242)
    geotiff(tmp_path / "x.tif")
    (tmp_path / f"x.tif{ending}").write_text(vrt(str(tmp_path / "outside.tif")))
    with pytest.raises(DataError, match=rf"x.tif: 'x.tif{ending}' beside it is no TIFF"):
        open_raster(tmp_path / "x.tif")


@pytest.mark.parametrize("place", ["tag", "sidecar"])
def test_overviews_that_lie_elsewhere_are_refused(tmp_path, requests, place):
    import rasterio

    address, asked = requests
    target = f"/vsicurl/{address}/a.tif"
    geotiff(tmp_path / "x.tif")
    if place == "tag":
        with rasterio.open(tmp_path / "x.tif", "r+") as file:
            file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=target)
    else:
        (tmp_path / "x.tif.aux.xml").write_text(
            '<PAMDataset><Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">'
            f"{target}</MDI></Metadata></PAMDataset>"
        )
    with pytest.raises(DataError, match=r"x\.tif: takes its overviews from '/vsicurl"):
        open_raster(tmp_path / "x.tif")
    assert asked == []


@pytest.mark.parametrize("name", ["x.tif", "a.zarr.zip", "zarr.json", ".zmetadata"])
def test_a_named_pipe_is_said_to_be_one_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    try:
        problems = inspect_path(str(tmp_path))["problems"]
    except DataError as error:
        problems = [str(error)]
    assert name in problems[0]


@pytest.mark.parametrize("kind", ["storage", "link", "soft", "virtual", "bomb"])
def test_hdf5_data_lie_in_the_file_itself(tmp_path, kind):
    import h5py

    from domainssl.io.storage.hdf5 import dataset, open_hdf5

    with h5py.File(tmp_path / "outside.h5", "w") as file:
        file["data"] = np.full((2, 8), 4242, np.int16)
    (tmp_path / "outside.bin").write_bytes(np.full(16, 4242, np.int16).tobytes())
    with h5py.File(tmp_path / "a.h5", "w") as file:
        if kind == "storage":
            places = [(str(tmp_path / "outside.bin"), 0, h5py.h5f.UNLIMITED)]
            file.create_dataset("data", (2, 8), np.int16, external=places)
        elif kind == "link":
            file["data"] = h5py.ExternalLink(str(tmp_path / "outside.h5"), "data")
        elif kind == "soft":
            file["data"] = h5py.SoftLink("/elsewhere")
            file["elsewhere"] = h5py.ExternalLink(str(tmp_path / "outside.h5"), "data")
        elif kind == "virtual":
            layout = h5py.VirtualLayout((2, 8), np.int16)
            layout[:] = h5py.VirtualSource(str(tmp_path / "outside.h5"), "data", (2, 8))
            file.create_virtual_dataset("data", layout)
        else:
            import zlib

            made = file.create_dataset("data", (2, 8), np.int16, chunks=(2, 8), compression="gzip")
            made.id.write_direct_chunk((0, 0), zlib.compress(b"\0" * 2**28, 1))
    with (
        pytest.raises(DataError, match=r"a\.h5: .*data"),
        open_hdf5(tmp_path / "a.h5") as file,
    ):
        dataset(tmp_path / "a.h5", file, "data", dims=2, kinds="iuf")


def test_an_array_file_that_is_a_zip_or_pickled_is_refused(tmp_path):
    from domainssl.io.series.pastis import _mapped

    path = tmp_path / "S2_1.npy"
    for write in (
        lambda file: np.savez(file, np.zeros(3)),
        lambda file: np.save(file, np.array([{}], object), allow_pickle=True),
        lambda file: np.save(file, np.array(["a"])),
        lambda file: file.write(b""),
        lambda file: file.write(b"\x93NUMPY\x01\x00\xff\xff{"),
    ):
        with open(path, "wb") as file:
            write(file)
        with pytest.raises(DataError, match=r"S2_1.npy: the array cannot be read"):
            _mapped(path)
