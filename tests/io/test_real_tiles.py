"""What is read from files written with real tiles equals what the plain libraries read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from real_tiles import PLACES, STORED_OFFSET, stored, table, tile, write_real

from domainssl.inspection.recognise import inspect_path
from domainssl.io.ssl4eo.layout import scan
from domainssl.io.ssl4eo.read import read
from domainssl.io.ssl4eo.write import write_release_b

# means of README.md beside the real data, of the stored numbers
L1C = {
    PLACES[0]: "2318.1777 2018.8824 1853.9583 1786.4172 1975.4101 2586.6781 2873.1306 2898.6323 "
    "3130.0229 1879.9616 1016.2055 2686.9605 2074.5462",
    PLACES[1]: "1585.8835 1183.7890 932.9590 727.9527 1039.8385 1876.5435 2208.8216 2201.4860 "
    "2505.2349 850.4750 17.1422 1611.8781 866.6531",
}
L2A = {
    PLACES[0]: "1327.8049 1427.5108 1566.0543 1650.7488 1942.8371 2660.7530 2959.9967 3168.0879 "
    "3213.9526 3244.9601 2882.4745 2298.7407",
    PLACES[1]: "128.8742 153.2518 444.2636 447.6786 899.3687 1868.7121 2173.4021 2413.6076 "
    "2476.7096 2529.3850 1746.0044 1015.1874",
}
L2A_CROP = (
    "1342.0244 1440.6528 1568.7263 1654.3310 1923.2964 2578.6025 2850.1383 3038.0815 "
    "3090.5961 3122.8289 2808.9325 2248.0881"
)
S1 = {PLACES[0]: (-12.4216, -18.2845), PLACES[1]: (-10.0734, -16.9564)}
S1_CROP = {
    PLACES[0]: ((-12.0966, -17.9069), (3.2258, 3.4142)),
    PLACES[1]: ((-10.6673, -17.1240), (2.9986, 2.2840)),
}


def numbers(text: str) -> np.ndarray:
    return np.array([float(part) for part in text.split()])


@pytest.fixture(scope="module", params=["A", "B"])
def root(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared_data: Path
) -> Path:
    folder = tmp_path_factory.mktemp("real")
    products = ("S1GRD", "S2L2A", "S2L1C", "S2RGB")
    write_real(folder, shared_data, request.param, products, ("val",))
    return folder


def read_product(root: Path, product: str):
    catalogue = scan(str(root), "val", {"m": product})
    return read(catalogue.groups[0], "m", [0])


@pytest.mark.parametrize(("product", "means"), [("S2L1C", L1C), ("S2L2A", L2A)])
def test_s2_means_are_the_published_ones_without_offset(root: Path, product: str, means) -> None:
    block = read_product(root, product)
    assert block.values.dtype == np.int16
    for i, place in enumerate(PLACES):
        found = block.values[i, 0].astype(np.float64).mean((1, 2))
        np.testing.assert_allclose(found, numbers(means[place]) - STORED_OFFSET[place], atol=1e-4)


def test_centre_crop_of_s2_has_the_published_means(root: Path) -> None:
    crop = read_product(root, "S2L2A").values[0, 0, :, 52:172, 52:172].astype(np.float64)
    np.testing.assert_allclose(crop.mean((1, 2)), numbers(L2A_CROP) - 1000, atol=1e-4)


def test_s1_means_and_spreads_are_the_published_ones(root: Path) -> None:
    block = read_product(root, "S1GRD")
    assert block.values.dtype == np.float16
    for i, place in enumerate(PLACES):
        image = block.values[i, 0].astype(np.float64)
        np.testing.assert_allclose(image.mean((1, 2)), S1[place], atol=1e-4)
        crop = image[:, 52:172, 52:172]
        mean, std = S1_CROP[place]
        np.testing.assert_allclose(crop.mean((1, 2)), mean, atol=1e-4)
        np.testing.assert_allclose(crop.std((1, 2)), std, atol=1e-4)


def test_rgb_is_read_as_stored(root: Path, shared_data: Path) -> None:
    block = read_product(root, "S2RGB")
    np.testing.assert_array_equal(block.values[1, 0], tile(shared_data, "S2RGB", PLACES[1]))
    assert block.valid.all()


def test_corner_of_the_first_pixel_and_crs_are_those_of_the_tiles(root: Path) -> None:
    block = read_product(root, "S2L2A")
    np.testing.assert_allclose(block.x0, [717729.835205, 549892.697031], atol=1e-6)
    np.testing.assert_allclose(block.y0, [5700093.330553, 6344077.614259], atol=1e-6)
    assert block.crs.tolist() == [32718, 32632]


def test_offset_left_in_a_release_b_file_is_seen_in_b10(tmp_path: Path, shared_data: Path) -> None:
    folder = tmp_path / "train" / "S2L1C"
    folder.mkdir(parents=True)
    mixed = stored(shared_data, "S2L1C", 0)
    mixed[0] += 1000
    keys = ["ssl4eos12_train_seasonal_data_0000000", "ssl4eos12_train_seasonal_data_0000001"]
    path = folder / "ssl4eos12_shard_000001.tar"
    write_release_b(path, "S2L1C", mixed, table(shared_data, "S2L1C"), keys)
    block = read(scan(str(tmp_path), "train", {"m": "S2L1C"}).groups[0], "m", [0])
    assert block.offset.tolist() == [1000, 0]
    np.testing.assert_array_equal(block.values, stored(shared_data, "S2L1C", 0)[:, :1])


def test_inspect_measures_a_real_geotiff(shared_data: Path) -> None:
    folder = shared_data / "eo" / "terramesh_examples" / "S2L1C"
    report = inspect_path(str(folder))
    first, second = report["files"]
    assert first["shape"] == [13, 224, 224] and first["crs"] == "EPSG:32718"
    found = [row["mean"] for row in first["values"]]
    np.testing.assert_allclose(found, numbers(L1C[PLACES[0]]), atol=1e-4)
    assert (first["offset"]["value"], second["offset"]["value"]) == (1000, 0)
