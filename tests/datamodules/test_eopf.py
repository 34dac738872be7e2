"""EOPF products and their GeoZarr conversion, as miniatures of the real trees."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eopf_files import L1C, L2A, S1, SHARDED, miniature

from domainssl.datamodules import SentinelCubeDataModule
from domainssl.errors import DataError
from domainssl.inspection.recognise import inspect_path, render
from domainssl.io.raster.bands import open_store
from domainssl.io.raster.grd import read_sigma0
from domainssl.loading.source import Loading
from domainssl.sensors import L1C_BANDS, L2A_BANDS
from domainssl.sources.cube_options import Layer, Mask
from domainssl.sources.dates import Dates
from domainssl.sources.held_out import HeldOut
from domainssl.sources.windows import Window

STILL: dict[str, Any] = {"jitter": False, "flips": False, "quarter_turns": False}
NOTHING_HELD = HeldOut(val_fraction=0)

SHRINK = 30  # 366, 183 and 61 pixels
LEFT, TOP = {L2A: 699960, L1C: 300000}, {L2A: 4700040, L1C: 5000040}


@pytest.fixture(scope="module")
def metadata(shared_data: Path) -> Path:
    return shared_data / "eo" / "eopf_metadata"


def fill_optical(product: str, is_float: bool = False) -> Any:
    """Coordinates as in real products; bands hold DN 0, 1000, 11000 and a code of the place."""

    def fill(name: str, shape: tuple[int, ...]) -> Any:
        folder, _, leaf = name.rpartition("/")
        resolution = re.fullmatch(r"r(\d+)m", folder.rpartition("/")[2])
        step = int(resolution.group(1)) if resolution else None
        if leaf in ("x", "y") and step and len(shape) == 1:
            centres = np.arange(shape[0]) * step + step // 2
            return LEFT[product] + centres if leaf == "x" else TOP[product] - centres
        if leaf == "scl":
            return np.pad(np.full((2, 2), 9, np.uint8), ((0, shape[0] - 2), (0, shape[1] - 2)),
                          constant_values=4)  # fmt: skip
        if (
            not name.startswith("measurements/reflectance")
            or step not in (10, 20, 60)
            or len(shape) != 2
        ):
            return None
        rows, columns = np.indices(shape) * step // 60  # one value per 60 m
        values = 2000 + 61 * rows + columns + 100 * _number(leaf)
        if step == 10:
            values[0, :3] = (0, 1000, 11000)
        if is_float:
            return np.where(values == 0, np.nan, values * 1e-4 - 0.1).astype(np.float32)
        return values.astype(np.uint16)

    return fill


def _number(leaf: str) -> int:
    return L1C_BANDS.index("B8A" if leaf == "b8a" else leaf.upper())


def module(root: Path, layers: dict[str, Layer], **changes: Any) -> SentinelCubeDataModule:
    options = {"window": Window(size=960, unit="m", **STILL),
               "held_out": NOTHING_HELD, "global_batch_size": 1,
               "loading": Loading(workers=0), **changes}  # fmt: skip
    data = SentinelCubeDataModule(root=str(root), modalities=layers, **options)
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def products(metadata: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two optical products, written once."""
    root = tmp_path_factory.mktemp("products")
    for name in (L2A, L1C):
        miniature(metadata / f"{name}.json", root / f"{name}.zarr", SHRINK, fill_optical(name))
    return root


@pytest.mark.parametrize(
    ("product", "bands"), [(L2A, L2A_BANDS), (L1C, L1C_BANDS)], ids=["L2A", "L1C"]
)
def test_numbers_decode_to_missing_zero_and_one(products, product, bands):
    path = f"{product}.zarr"
    data = module(products, {"s2": Layer(bands=bands, path=path, value_unit="reflectance")})
    assert data.sites[0].crs == "EPSG:32632"
    batch = first_corner(data)
    b02 = batch["s2"][0, bands.index("B02"), 0, :3].tolist()
    assert b02 == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)
    assert batch["s2.valid"][0, 0, 0].item() is False
    numbers = module(products, {"s2": Layer(bands=bands, path=path)})
    assert first_corner(numbers)["s2"][0, bands.index("B03"), 0, 2].item() == 10_000.0


def first_corner(data: SentinelCubeDataModule) -> dict[str, Any]:
    """Return the batch whose window begins in the north-west corner of the product."""
    bounds = data.sites[0].bounds
    for batch in data.train_dataloader():
        geo = batch["s2.geo"][0]
        if (geo["c"], geo["f"]) == (bounds.left, bounds.top):
            return batch
    raise AssertionError("no window begins in the corner")


def test_bands_of_three_resolutions_lie_on_each_other(products):
    layer = Layer(bands=L2A_BANDS, path=f"{L2A}.zarr", mask=Mask("scl", (9,)))
    data = module(products, {"s2": layer})
    files = data.sites[0].layers["s2"].files[0]
    steps = {band.name: band.grid.step for band in files.bands}
    assert (steps["B02"], steps["B05"], steps["B01"], steps["B09"]) == (10, 20, 20, 60)
    batch = first_corner(data)
    place = 61 * (np.arange(96)[:, None] // 6) + np.arange(96)[None] // 6
    for at, name in enumerate(L2A_BANDS):
        expected = 1000 + place + 100 * L1C_BANDS.index(name)  # the product's offset is off
        assert np.array_equal(batch["s2"][0, at, 6:].numpy(), expected[6:])
    assert not batch["s2.valid"][0, :4, :4].any()  # two by two mask pixels of 20 m
    assert batch["s2.valid"][0, 4:6, 6:].all()
    days = int(np.datetime64("2025-10-08").astype(int))
    assert batch["s2.dates"].tolist() == [days]


def test_products_of_one_tile_are_the_dates_of_a_site(products, tmp_path):
    for date in ("20251008T100041", "20251103T100041"):
        name = L2A.replace("20251008T100041", date)
        copy = Path(shutil.copytree(products / f"{L2A}.zarr", tmp_path / f"{name}.zarr"))
        for path in filter(Path.is_file, copy.rglob("*")):  # the product says its date itself
            if path.name in ("zarr.json", ".zattrs", ".zmetadata"):
                text = path.read_text()
                path.write_text(text.replace("2025-10-08T", f"{date[:4]}-{date[4:6]}-{date[6:8]}T"))
    layer = Layer(bands=("B02", "B03", "B04"), path="S2?_MSIL2A_{date}_N*_R*_{site}_*.zarr")
    data = module(tmp_path, {"s2": layer}, dates=Dates(mode="all"))
    assert [site.name for site in data.sites] == ["T32TQM"]
    batch = next(iter(data.train_dataloader()))
    assert batch["s2"].shape == (1, 2, 3, 96, 96)


def test_the_geozarr_conversion_gives_the_same_numbers(metadata, products, tmp_path):
    miniature(metadata / f"{SHARDED}.json", tmp_path / "converted.zarr", SHRINK,
              fill_optical(L2A, is_float=True))  # fmt: skip
    (tmp_path / "product.zarr").symlink_to(products / f"{L2A}.zarr")
    bands = ("B02", "B05", "B11")
    found = [
        first_corner(module(tmp_path, {"s2": Layer(bands=bands, path=f"{name}.zarr")}))
        for name in ("converted", "product")
    ]
    assert np.allclose(found[0]["s2"], found[1]["s2"], atol=0.01)
    assert np.array_equal(found[0]["s2.valid"], found[1]["s2.valid"])


def fill_radar(name: str, shape: tuple[int, ...]) -> Any:
    if name.endswith("measurements/grd"):
        return np.full(shape, 300, np.uint16)
    if name.endswith("calibration/line"):
        return np.linspace(0, 555, shape[0]).astype(np.uint32)
    if name.endswith("calibration/pixel"):
        return np.linspace(0, 868, shape[0]).astype(np.uint32)
    if name.endswith("calibration/sigma_nought"):
        return np.full(shape, 3000.0, np.float32)
    return None


def test_sentinel_1_grd_is_read_and_inspected_but_refused_as_a_partner(metadata, tmp_path):
    path = miniature(metadata / f"{S1}.json", tmp_path / f"{S1}.zarr", SHRINK, fill_radar)
    values, valid = read_sigma0(open_store(str(path)), "VV", slice(0, 20), slice(10, 40))
    assert values.shape == (20, 30) and valid.all()
    assert np.allclose(values, -20.0)
    with pytest.raises(DataError, match="no polarisation 'HH'; there are V"):
        read_sigma0(open_store(str(path)), "HH", slice(0, 2), slice(0, 2))
    report = inspect_path(str(path))
    assert [layer["bands"] for layer in report["layers"]] == [["VH"], ["VV"]]
    assert report["values"][1]["mean"] == pytest.approx(-20.0)
    assert "radar geometry" in report["notes"][0] and not report["problems"]
    render(report)
    with pytest.raises(DataError, match=r"radar geometry.*Terrain-correct"):
        module(tmp_path, {"s1": Layer(bands=("VV", "VH"), path="{site}.zarr", value_unit="db")})


def test_inspect_understands_products(products):
    report = inspect_path(str(products / f"{L2A}.zarr"))
    fine = next(layer for layer in report["layers"] if layer["pixel"] == 10.0)
    assert fine["bands"] == ["B02", "B03", "B04", "B08"] and fine["crs"] == "EPSG:32632"
    assert (fine["scale"], fine["offset"], fine["nodata"]) == (1e-4, -0.1, [0.0])
    assert fine["first_date"].startswith("2025-10-08") and fine["bounds"][0] == 699960
    b02 = next(row for row in report["values"] if row["band"] == "B02")
    assert b02["max"] == pytest.approx(1.0)
    render(report)
