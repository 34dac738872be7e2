"""Sentinel-2 products in `.SAFE` folders and zips: values, dates, masks, and hostile ones."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safe_files import LEFT, ORDER, TOP, stored, write_safe, zipped

from domainssl.backbones.vit import ViTBackbone
from domainssl.datamodules.cubes import SentinelCubeDataModule
from domainssl.errors import DataError
from domainssl.inference.inputs import is_raster
from domainssl.inference.run import embed
from domainssl.inference.scenes import SceneOptions, open_scene
from domainssl.inspection.recognise import inspect_path
from domainssl.io.raster.geozarr import VectorStore
from domainssl.io.raster.safe import describe_safe, is_safe
from domainssl.io.raster.sites import find_files
from domainssl.loading.plan import Piece
from domainssl.loading.source import Loading
from domainssl.sources.cube_options import Layer, Mask
from domainssl.sources.windows import Window

L2A = tuple(band for band in ORDER if band != "B10")


def _source(root: Path | str, **layer: Any) -> Any:
    data = SentinelCubeDataModule(
        root=str(root),
        modalities={"s2": Layer(**{"path": ".", "bands": L2A, "mask": Mask(), **layer})},
        global_batch_size=1,
        window=Window(size=120, flips=False, quarter_turns=False, jitter=False),
        loading=Loading(workers=0),
    )
    data.setup("fit")
    return data.source("train")


def test_windows_of_folders_and_zips_hold_the_numbers_without_offset(tmp_path: Path) -> None:
    old = write_safe(tmp_path, date="20210105", baseline="02.14")
    new = zipped(write_safe(tmp_path, date="20220301", baseline="04.00"))
    assert is_safe(str(old)) and is_safe(str(new)) and not is_safe(str(tmp_path))
    source = _source(tmp_path)
    assert [site.name for site in source.sites] == ["T32TQM"]  # the products are its two dates
    layer = source.sites[0].layers["s2"]
    assert [str(t) for t in layer.times] == ["2021-01-05T10:00:31", "2022-03-01T10:00:31"]
    seen = {}
    for epoch in range(8):
        rows = source.load(Piece(0, 0, 1), epoch).data
        seen[str(np.datetime64(int(rows["s2.dates"][0]), "D")).replace("-", "")] = rows
    assert sorted(seen) == ["20210105", "20220301"]
    for date, rows in seen.items():
        values, valid = np.asarray(rows["s2"])[0], np.asarray(rows["s2.valid"])[0]
        # 0 in the first row of each band, of 60 m at most; clouds in the last 6 rows of 20 m
        assert valid[6:108].all() and not valid[:6].any() and not valid[108:].any()
        for number, band in enumerate(L2A):
            expected = stored(band, date).astype(np.float64)
            expected = expected.repeat(120 // len(expected), 0).repeat(120 // len(expected), 1)
            expected -= 1000 if date == "20220301" else 0
            assert np.array_equal(values[number, 6:108], expected[6:108]), band
        geo = rows["s2.geo"][0]
        assert (geo["crs"], geo["c"], geo["f"]) == ("EPSG:32632", LEFT, TOP)


def test_level_1c_has_cirrus_and_no_classification(tmp_path: Path) -> None:
    path = write_safe(tmp_path, level="1C", baseline="05.10")
    file = describe_safe(str(path), ("B10", "B8A"))
    assert [(b.grid.step, b.offset, b.scale) for b in file.bands] == [
        (60, -1000, 1),
        (20, -1000, 1),
    ]
    assert file.stored_unit("baseline", 0) == file.stored_unit("dn+1000", 0) == "dn"
    with pytest.raises(DataError, match="level 1C none"):
        describe_safe(str(path), ("B02",), mask="scl")
    with pytest.raises(DataError, match=r"no band 'B13'; there are: B01"):
        describe_safe(str(path), ("B13",))


def test_embedding_reads_a_product_as_a_scene(tmp_path: Path) -> None:
    facts = {
        "kind": "image", "channels": L2A, "value_unit": "dn", "size": (16, 16), "gsd_m": 10.0,
        "mean": (2000.0,) * 12, "std": (1500.0,) * 12,
    }  # fmt: skip
    backbone = ViTBackbone({"s2": facts}, {"width": 12, "depth": 1, "heads": 2}, patch_size=8)
    path = zipped(write_safe(tmp_path))
    scene = open_scene(str(path), backbone, SceneOptions(mask="scl"))
    assert scene.name.startswith("S2A_MSIL2A_20220301") and scene.name.endswith("T124512")
    part = scene.parts["s2"]
    assert part.target.stored_unit == "auto" and part.file.mask is not None
    assert (scene.bounds.width, scene.crs) == (1200, "EPSG:32632")


def test_a_zip_without_a_folder_and_an_embedding_of_it(tmp_path: Path) -> None:
    root = write_safe(tmp_path)
    path = tmp_path / f"{root.stem}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(root).as_posix())
    facts = {
        "kind": "image", "channels": L2A, "value_unit": "dn", "size": (16, 16), "gsd_m": 10.0,
        "mean": (2000.0,) * 12, "std": (1500.0,) * 12,
    }  # fmt: skip
    backbone = ViTBackbone({"s2": facts}, {"width": 12, "depth": 1, "heads": 2}, patch_size=8)
    for source in (path, root):
        embed(backbone.eval(), source, tmp_path / f"{source.suffix[1:]}.zarr", mask="scl")
    stores = [VectorStore(tmp_path / f"{name}.zarr") for name in ("zip", "SAFE")]
    found = [store.read([slice(0, 15), slice(0, 15)]) for store in stores]
    assert np.array_equal(*found, equal_nan=True)
    assert np.isnan(found[0][0, -1]).all() and np.isfinite(found[0][:, 2, 2]).all()


def test_inspect_knows_products(tmp_path: Path) -> None:
    path = write_safe(tmp_path)
    for place in (path, tmp_path):
        report = inspect_path(str(place))
        found = report["splits"]["train"]["modalities"]["s2"]
        assert found["channels"] == list(L2A) and found["dates"][0] == "2022-03-01"


@pytest.mark.parametrize("is_zip", [False, True])
def test_products_behind_urls_are_those_of_the_folder(tmp_path: Path, is_zip: bool) -> None:
    import fsspec

    local = write_safe(tmp_path, date="20220301", baseline="04.00")
    if is_zip:
        local = zipped(local)
    memory = fsspec.filesystem("memory")
    memory.put(str(local), f"/safe{is_zip}/{local.name}", recursive=True)
    root = f"memory://safe{is_zip}"
    url = f"{root}/{local.name}"
    assert is_safe(url) and is_raster(url)
    ours, theirs = (_source(place).load(Piece(0, 0, 1), 0).data for place in (root, tmp_path))
    for name in ("s2", "s2.valid", "s2.dates"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    for place in (url, root):
        assert inspect_path(place)["splits"]["train"]["modalities"]["s2"]["channels"] == list(L2A)
    memory.rm(f"/safe{is_zip}", recursive=True)


def test_what_of_products_behind_urls_is_not_read_is_said(tmp_path: Path) -> None:
    import fsspec

    local = zipped(write_safe(tmp_path), zipfile.ZIP_DEFLATED)
    memory = fsspec.filesystem("memory")
    memory.put(str(local), f"/deflated/{local.name}")
    with pytest.raises(DataError, match="is deflated.*Download the zip, or put the unpacked"):
        _source("memory://deflated").load(Piece(0, 0, 1), 0)
    memory.rm("/deflated", recursive=True)
    with pytest.raises(DataError, match="no such file"):
        describe_safe(f"memory://none/{local.name}", ["B02"])


def test_a_zipped_zarr_product_of_the_same_name_is_no_safe(tmp_path: Path) -> None:
    path = tmp_path / "S2A_MSIL2A_20220301T100031_N0400_R122_T32TQM_x.zarr.zip"
    path.write_bytes(b"PK")
    assert not is_safe(str(path))


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_products_of_two_levels_are_refused_and_two_processings_told(tmp_path, caplog) -> None:
    write_safe(tmp_path, baseline="03.01")
    write_safe(tmp_path, baseline="04.00")
    layer = _source(tmp_path).sites[0].layers["s2"]
    assert len(layer.times) == 1 and "are one acquisition in two processings" in caplog.text
    write_safe(tmp_path, level="1C", date="20220401")
    with pytest.raises(DataError, match=r"level 1C .* and 2A .* would be mixed: .*MSIL1C.*MSIL2A"):
        _source(tmp_path, mask=None)


def test_a_product_is_known_by_its_metadata_and_one_that_lacks_a_band_said(tmp_path) -> None:
    product = write_safe(tmp_path)
    product.rename(product.with_suffix(""))  # as some tools unpack them
    assert list(find_files(str(tmp_path), ".", "")) == ["T32TQM"]
    product.with_suffix("").rename(tmp_path / "march.SAFE")
    assert list(find_files(str(tmp_path), ".", "")) == ["march"]
    [band] = tmp_path.rglob("*_B03_10m.jp2")
    band.unlink()
    with pytest.raises(DataError, match=r"no band 'B03'.*this one is incomplete; get it again"):
        describe_safe(str(tmp_path / "march.SAFE"), ("B02", "B03"))
    (tmp_path / "march.SAFE" / "MTD_MSIL2A.xml").unlink()
    with pytest.raises(DataError, match=r"march\.SAFE: a folder or zip in SAFE that is no product"):
        find_files(str(tmp_path), ".", "")


def test_hostile_and_damaged_products_are_refused(tmp_path: Path) -> None:
    def made(name: str, **more: Any) -> Path:
        return write_safe(tmp_path / name, **more)

    def refused(path: Path, match: str) -> None:
        with pytest.raises(DataError, match=match):
            file = describe_safe(str(path), ("B02",))
            from domainssl.io.raster.safe import read_safe

            read_safe(str(path), file.bands[0], slice(0, 4), slice(0, 4))

    entity = made("entity")
    _edit(entity / "MTD_MSIL2A.xml", "<n1:Level", '<!DOCTYPE x [<!ENTITY a "b">]><n1:Level')
    refused(entity, "declares entities")
    torn = made("torn")
    _edit(torn / "MTD_MSIL2A.xml", "</n1:General_Info>", "")
    refused(torn, "MTD_MSIL2A.xml: the metadata cannot be read")
    bare = made("bare")
    _edit(bare / "MTD_MSIL2A.xml", "BOA_ADD_OFFSET", "OTHER")
    refused(bare, "list no offsets")
    partly = made("partly")
    whole = '<BOA_ADD_OFFSET band_id="1">-1000</BOA_ADD_OFFSET>'
    _edit(partly / "MTD_MSIL2A.xml", whole, "")
    refused(partly, "list offsets of B01, .*, none of B02")
    huge = made("huge")
    [tile] = huge.glob("GRANULE/*/MTD_TL.xml")
    _edit(tile, "<NROWS>120<", "<NROWS>1200000<")
    refused(huge, "speaks of 1200000 x 120 pixels")
    grown = made("grown")
    [tile] = grown.glob("GRANULE/*/MTD_TL.xml")
    _edit(tile, "<NROWS>120<", "<NROWS>240<")
    refused(grown, "but the metadata say")
    other = made("other")
    [image] = other.glob("GRANULE/*/IMG_DATA/R10m/*_B02_10m.jp2")
    image.write_text('<VRTDataset rasterXSize="1" rasterYSize="1"></VRTDataset>')
    refused(other, "does not begin as JPEG 2000")
    cut = made("cut")
    [image] = cut.glob("GRANULE/*/IMG_DATA/R10m/*_B02_10m.jp2")
    image.write_bytes(image.read_bytes()[:200])
    refused(cut, "the JPEG 2000 image cannot be read")
    climbing = zipped(made("climbing"))
    with zipfile.ZipFile(climbing, "a") as archive:
        archive.writestr("../../outside.xml", "x")
    refused(climbing, "points outside the archive")
    climbing.write_bytes(climbing.read_bytes()[:500])
    refused(climbing, "not a complete zip")
    empty = tmp_path / "S2A_MSIL2A_20220301T100031_N0400_R122_T32TQM_20220301T124512.SAFE"
    empty.mkdir()
    refused(empty, "0 files MTD_MSIL1C.xml or MTD_MSIL2A.xml, expected one")
