"""TerraMesh: real tiles packed as its shards, missing products, damage, what is refused."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numcodecs import Blosc
from zarr.storage import ZipStore

from domainssl.cli import main
from domainssl.datamodules.terramesh import TerraMeshDataModule
from domainssl.errors import ConfigError, DataError
from domainssl.inspection.recognise import inspect_path
from domainssl.io.ssl4eo.write import TileTable, write_release_b
from domainssl.loading.plan import Piece
from domainssl.loading.source import Loading
from domainssl.sources.windows import Window

PLACES = ("433D_629L_3_1", "637U_59R_1_3")
KEYS = {"s1": "S1RTC", "s2_l1c": "S2L1C", "s2": "S2L2A", "rgb": "S2RGB", "dem": "DEM",
        "ndvi": "NDVI", "lulc": "LULC"}  # fmt: skip
# centre crop of 120 px as stored, by other libraries; 433D carries the +1000
S2L2A_433D = (1342.0244, 1440.6528, 1568.7263, 1654.3310, 1923.2964, 2578.6025, 2850.1383,
              3038.0815, 3090.5961, 3122.8289, 2808.9325, 2248.0881)  # fmt: skip
NAMES = {"S1RTC": ["vv", "vh"]}


def _member(folder: Path, values: np.ndarray, names: Sequence[str], place: Any) -> bytes:
    """Pack one tile with the zarr library, as the published members are."""
    path = folder / "one.zarr.zip"
    store = ZipStore(path, mode="w")
    group = zarr.create_group(store, zarr_format=2)

    def add(name: str, data: Any, dims: str, **more: Any) -> None:
        array = np.asarray(data)
        made = group.create_array(
            name, shape=array.shape, dtype=array.dtype, chunks=array.shape or "auto",
            compressors=Blosc() if array.ndim else None, fill_value=None,
            attributes={"_ARRAY_DIMENSIONS": dims.split(), **more},
        )  # fmt: skip
        made[...] = array

    add("bands", values[None], "time band y x")
    add("band", np.array(names), "band")
    add("time", np.array([1_586_000_000 * 10**9]), "time", units="nanoseconds since 1970-01-01")
    a = place.transform
    add("x", a.c + a.a * (np.arange(values.shape[-1]) + 0.5), "x")
    add("y", a.f + a.e * (np.arange(values.shape[-2]) + 0.5), "y")
    add("crs", np.int64(place.crs.to_epsg()), "")
    store.close()
    data = path.read_bytes()
    path.unlink()
    return data


def _tar(path: Path, members: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, data in members.items():
            info = tarfile.TarInfo(f"{key}.zarr.zip")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two real tiles in shards of TerraMesh, each as training and held-out location."""
    import rasterio

    root = tmp_path_factory.mktemp("terramesh")
    for product in KEYS.values():
        members = {}
        for place in PLACES:
            path = shared_data / "eo" / "terramesh_examples" / product / f"{place}.tif"
            if path.is_file():  # 637U has no NDVI
                with rasterio.open(path) as file:
                    values = file.read()
                    names = NAMES.get(product, [f"B{i}" for i in range(len(values))])
                    if product.startswith("S2L"):
                        all_ = [f"B{i:02d}" for i in range(1, 9)] + ["B8A", "B09", "B10"]
                        names = [*all_, "B11", "B12"] if len(values) == 13 else \
                            [*all_[:-1], "B11", "B12"]  # fmt: skip
                    elif product == "S2RGB":
                        names = ["R", "G", "B"]
                    members[f"majortom_val_{place}"] = _member(root, values, names, file)
        for split in ("train", "val"):
            _tar(root / split / product / "majortom_shard_000001.tar", members)
    return root


def _data(root: Path | str, names: Mapping[str, str] = KEYS, **more: Any) -> TerraMeshDataModule:
    arguments = {"window": Window(size=120), "global_batch_size": 2, "labels": None, **more}
    data = TerraMeshDataModule(
        root=str(root), modalities=dict(names), loading=Loading(workers=0), **arguments
    )
    data.setup("fit")
    return data


def test_real_tiles_have_the_values_that_other_libraries_read(real: Path) -> None:
    rows = _data(real, labels={"mask": True}).source("val").load(Piece(0, 0, 2), 0).data
    assert rows["id"] == [f"majortom_val_{place}" for place in PLACES]
    mean = {m: np.asarray(rows[m], np.float64).mean((2, 3)) for m in KEYS}
    np.testing.assert_allclose(mean["s2"][0], np.array(S2L2A_433D) - 1000, atol=1e-3)
    np.testing.assert_allclose(mean["s1"], [[-12.0966, -17.9069], [-10.6673, -17.1240]], atol=1e-4)
    assert rows["s1"].dtype == rows["dem"].dtype == torch.float32
    assert rows["s2"].dtype == torch.int16 and rows["lulc"].dtype == torch.uint8
    cirrus = np.median(np.asarray(rows["s2_l1c"])[:, 10], (1, 2))
    assert (abs(cirrus - [16, 18]) < 5).all()  # each location by its own offset
    assert np.asarray(rows["ndvi.present"]).tolist() == [True, False]
    assert not np.asarray(rows["ndvi.valid"])[1].any() and not np.asarray(rows["ndvi"])[1].any()
    for m in set(KEYS) - {"ndvi"}:
        assert np.asarray(rows[f"{m}.present"]).all() and np.asarray(rows[f"{m}.valid"]).all()
    geo = rows["dem.geo"][0]
    assert geo["crs"] == 32718 and geo["a"] == 10
    assert geo["c"] == pytest.approx(717729.835205 + 520) and geo["f"] == pytest.approx(
        5700093.330553 - 520
    )
    for fact in ("crs", "a", "c", "f"):  # known from the products that are there
        assert rows["ndvi.geo"][1][fact] == rows["s2.geo"][1][fact]
    classes = np.asarray(rows["mask"])  # without the class of clouds, counted from 0
    stored = np.asarray(rows["lulc"])[:, 0]
    assert set(np.unique(stored[1])) <= {2, 4, 5, 9} and (classes[stored == 9] == 7).all()


def test_real_tiles_whole_have_the_counts_of_their_classes_and_heights(real: Path) -> None:
    names = {"lulc": "LULC", "dem": "DEM"}
    rows = _data(real, names, window=Window(size=224)).source("val").load(Piece(0, 0, 2), 0).data
    counts = np.bincount(np.asarray(rows["lulc"])[0].ravel(), minlength=10)
    assert counts.tolist() == [0, 3127, 10396, 90, 21213, 11742, 0, 0, 0, 3608]
    heights = np.asarray(rows["dem"])
    assert (heights[0].min(), heights[0].max(), heights[1].max()) == (100, 249, 14)
    assert heights[0].mean() == pytest.approx(135.0411, abs=1e-3)


@pytest.mark.slow
def test_real_tiles_train(real: Path, tmp_path: Path) -> None:
    words = ["fit", "--config=recipes/terramesh_croma.yaml", f"--data.root={real}",
             "--trainer.accelerator=cpu", "--trainer.max_epochs=3", "--callbacks.evaluation=null",
             "--data.global_batch_size=2", f"--run_dir={tmp_path / 'run'}"]  # fmt: skip
    assert main(words) == 0


def _shard(root: Path, name: str, product: str, keys: Sequence[str], split: str = "train") -> None:
    bands = {"S1RTC": 2, "S1GRD": 2, "DEM": 1}[product]
    n = len(keys)
    values = np.stack([np.full((1, bands, 8, 8), -5.0 - i, np.float16) for i in range(n)])
    if product == "DEM":
        values = values.astype("<i2") * 0
        values[:, :, :, 0] = -9999
    zero = np.zeros(n)
    tiles = TileTable(
        ids=[key[-7:] for key in keys], times=np.full((n, 1), np.datetime64("2020-05-01")),
        file_ids=[[""]] * n, lat=zero, lon=zero, crs=np.full(n, 32632), x0=zero, y0=zero,
    )  # fmt: skip
    path = root / split / product / f"{name}.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_release_b(path, product, values, tiles, keys)


SMALL: dict[str, Any] = {"window": Window(size=8, flips=False, quarter_turns=False)}


def test_products_members_and_shards_may_be_missing(tmp_path: Path) -> None:
    _shard(tmp_path, "majortom_shard_000001", "S1RTC", ["a", "b"])
    _shard(tmp_path, "majortom_shard_000001", "DEM", ["b", "c"])
    _shard(tmp_path, "ssl4eos12_shard_000002", "S1GRD", ["d"])
    with tarfile.open(tmp_path / "train/S1RTC/majortom_shard_000001.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("._a.zarr.zip"))  # as tar of macOS adds them
    data = _data(tmp_path, {"s1": "S1RTC", "grd": "S1GRD", "dem": "DEM"}, **SMALL)
    source = data.source("train")
    assert source.sizes == [3, 1]
    rows = source.load(Piece(0, 0, 3), 0).data
    assert rows["id"] == ["a", "b", "c"]
    found = {m: np.asarray(rows[f"{m}.present"]).tolist() for m in ("s1", "grd", "dem")}
    assert found == {
        "s1": [True, True, False], "grd": [False] * 3, "dem": [False, True, True],
    }  # fmt: skip
    assert np.asarray(rows["s1"])[:, 0, 0, 0].tolist() == [-5, -6, 0]
    # heights of 0 are heights, -9999 is a mark
    valid = np.asarray(rows["dem.valid"])
    assert not valid[0].any() and not valid[1, 0].any() and valid[1, 1:].all()
    assert source.load(Piece(1, 0, 1), 0).data["grd.present"].tolist() == [True]


def test_a_damaged_member_costs_its_location_only(tmp_path: Path) -> None:
    _shard(tmp_path, "majortom_shard_000001", "S1RTC", ["a", "b", "c"])
    path = tmp_path / "train" / "S1RTC" / "majortom_shard_000001.tar"
    with tarfile.open(path) as tar:
        info = tar.getmembers()[1]
    raw = bytearray(path.read_bytes())
    raw[info.offset_data : info.offset_data + info.size] = bytes(info.size)
    path.write_bytes(raw)
    data = _data(tmp_path, {"s1": "S1RTC"}, **SMALL)
    rows = data.source("train").load(Piece(0, 0, 3), 0)
    assert list(rows.bad) == [1] and "b.zarr.zip: not a complete zip" in rows.bad[1]
    assert np.asarray(rows.data["s1"])[[0, 2], 0, 0, 0].tolist() == [-5, -7]


def test_what_is_not_terramesh_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown product 'S1RTX'.*S1RTC"):
        TerraMeshDataModule(modalities={"s1": "S1RTX"})
    with pytest.raises(ConfigError, match="call the modality lulc"):
        TerraMeshDataModule(modalities={"mask": "LULC"})
    _shard(tmp_path, "majortom_shard_000001", "S1RTC", ["a", "b"])
    with pytest.raises(DataError, match="no folder 'DEM' in any split; it holds: S1RTC"):
        _data(tmp_path, {"s1": "S1RTC", "dem": "DEM"}, **SMALL)
    (tmp_path / "train" / "S1RTC" / "majortom_shard_000001.tar").write_bytes(b"no tar" * 99)
    with pytest.raises(DataError, match="0001.tar: not a complete tar"):  # no other one is there
        _data(tmp_path, {"s1": "S1RTC"}, **SMALL)


def _only_text(_: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("readme.txt"))
    return out.getvalue()


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda raw: raw[: len(raw) // 2], "not a complete tar, 2 members found"),
    "empty": (lambda raw: b"", "not a complete tar, 0 members found"),
    "zeros": (lambda raw: bytes(len(raw)), "holds no .zarr.zip member, but nothing"),
    "page": (lambda raw: b"<!DOCTYPE html><html>sign in" + b" " * 999, "a page of a web server"),
    "gzip": (gzip.compress, "compressed by gzip, so its members cannot be read where they lie"),
    "text": (_only_text, "holds no .zarr.zip member, but 'readme.txt'"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_counts_as_missing_and_is_named(tmp_path: Path, kind: str) -> None:
    """One such shard ended every run, also with `on_bad_sample: replace`."""
    spoil, reason = DAMAGE[kind]
    for name in ("majortom_shard_000001", "majortom_shard_000002"):
        _shard(tmp_path, name, "S1RTC", ["a", "b"])
        _shard(tmp_path, name, "DEM", ["b", "c"])
    for product, number in (("DEM", 1), ("S1RTC", 2)):
        path = tmp_path / "train" / product / f"majortom_shard_00000{number}.tar"
        path.write_bytes(spoil(path.read_bytes()))
    data = _data(tmp_path, {"s1": "S1RTC", "dem": "DEM"}, **SMALL)
    radar, heights = data.problems[:2]
    assert "S1RTC: 1 of 2 shards cannot be read; their locations lack 's1', and" in radar
    assert "DEM/majortom_shard_000001.tar: " in heights and reason in heights
    source = data.source("train")
    assert source.sizes == [2, 2] and data.identity()["splits"]["train"]["locations"] == 4
    rows = [source.load(Piece(at, 0, 2), 0).data for at in range(2)]
    assert [row["id"] for row in rows] == [["a", "b"], ["b", "c"]]
    present = [[bool(np.asarray(row[f"{m}.present"]).all()) for m in ("s1", "dem")] for row in rows]
    assert present == [[True, False], [False, True]]


def test_a_shard_that_holds_a_key_twice_is_left_out(tmp_path: Path) -> None:
    _shard(tmp_path, "majortom_shard_000001", "S1RTC", ["a", "b"])
    _shard(tmp_path, "majortom_shard_000002", "S1RTC", ["c", "c"])
    data = _data(tmp_path, {"s1": "S1RTC"}, **SMALL)
    assert data.source("train").sizes == [2] and "holds the key 'c' twice" in data.problems[0]


def test_a_shard_whose_first_locations_are_damaged_has_the_size_of_others(tmp_path: Path) -> None:
    for number in (1, 2):
        _shard(tmp_path, f"majortom_shard_00000{number}", "S1RTC", list("abcdef"))
    path = tmp_path / "train" / "S1RTC" / "majortom_shard_000001.tar"
    with tarfile.open(path) as tar:
        infos = tar.getmembers()[:4]
    raw = bytearray(path.read_bytes())
    for info in infos:
        raw[info.offset_data : info.offset_data + info.size] = bytes(info.size)
    path.write_bytes(raw)
    data = _data(tmp_path, {"s1": "S1RTC"}, **SMALL)
    assert data.source("train").sizes == [6, 6]
    assert list(data.source("train").load(Piece(0, 0, 6), 0).bad) == [0, 1, 2, 3]


def test_inspect_and_stats_know_the_folder(tmp_path: Path) -> None:
    for split in ("train", "val"):
        _shard(tmp_path, "majortom_shard_000001", "S1RTC", ["a", "b"], split)
    report = inspect_path(str(tmp_path))
    assert report["data"] == "TerraMeshDataModule" and report["splits"]["val"]["items"] == 2
    assert any(note.startswith("TerraMesh, train: 2 locations") for note in report["notes"])
    assert "2 locations of 'train' are also in 'val', such as a, b" in report["problems"][0]
    output = tmp_path / "stats.yaml"
    assert main(["stats", str(tmp_path), f"--output={output}", "--jobs=0"]) == 0
    assert json.dumps([-5.5, -5.5])[1:-1] in output.read_text()
