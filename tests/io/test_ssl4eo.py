"""Pairing, dates, masks and offsets of SSL4EO-S12 files the tests write."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
from ssl4eo_files import DATES, SIDE, pattern, tile_table, write_split

from domainssl.errors import DataError
from domainssl.io.ssl4eo.labels import labels
from domainssl.io.ssl4eo.layout import Catalogue, scan
from domainssl.io.ssl4eo.read import Block, check_same, read
from domainssl.io.ssl4eo.write import write_release_a, write_release_b

PAIR = {"s1": "S1GRD", "s2": "S2L2A"}
IDS = [[0, 1, 2], [3, 4]]


@pytest.fixture(scope="module", params=["A", "B"])
def catalogue(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Catalogue:
    root = tmp_path_factory.mktemp("split")
    write_split(root, "train", IDS, request.param)
    return scan(str(root), "train", PAIR)


def write_one(
    root: Path, product: str, values: np.ndarray, cloud: np.ndarray | None = None
) -> Path:
    """Write one release-A training file."""
    folder = root / "train" / product
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ssl4eos12_train_seasonal_data_000001.zarr.zip"
    tiles = tile_table(list(range(len(values))), s1=product == "S1GRD")
    write_release_a(path, product, values, tiles, cloud)
    return path


def read_one(root: Path, product: str, dates: list[int], **options: object) -> Block:
    group = scan(str(root), "train", {"m": product}).groups[0]
    return read(group, "m", dates, **options)


def test_scan_counts_locations_dates_and_size(catalogue: Catalogue) -> None:
    assert [group.count for group in catalogue.groups] == [3, 2]
    assert (catalogue.count, catalogue.dates, catalogue.size) == (5, DATES, (SIDE, SIDE))


def test_read_returns_the_dates_asked_for_in_that_order(catalogue: Catalogue) -> None:
    block = read(catalogue.groups[1], "s2", [2, 0])
    np.testing.assert_array_equal(block.values[:, :, 3], pattern(IDS[1])[:, [2, 0]])
    assert block.values.dtype == np.int16
    start = np.datetime64("2020-01-05").astype(int)
    assert block.dates.tolist() == [[start + 160, start]] * 2


def test_read_of_a_slice_returns_those_locations(catalogue: Catalogue) -> None:
    block = read(catalogue.groups[0], "s1", [1], slice(1, 3))
    np.testing.assert_array_equal(block.values[:, 0, 1], pattern([1, 2])[:, 1] / 4)
    assert len(block.ids) == 2


def test_one_date_decodes_no_more_than_its_chunks(catalogue: Catalogue) -> None:
    block = read(catalogue.groups[0], "s2", [3])
    assert block.bytes_decoded == block.bytes_needed == 3 * SIDE * SIDE * (12 * 2 + 1)


def test_a_location_out_of_a_release_a_chunk_counts_as_amplification(tmp_path: Path) -> None:
    write_split(tmp_path, "train", [[0, 1, 2, 3]])
    group = scan(str(tmp_path), "train", PAIR).groups[0]
    block = read(group, "s2", [0], slice(2, 3))
    assert block.bytes_decoded == 4 * block.bytes_needed


def test_products_of_a_group_hold_the_same_locations(catalogue: Catalogue) -> None:
    group = catalogue.groups[0]
    blocks = {name: read(group, name, [0]) for name in PAIR}
    check_same(blocks)
    assert blocks["s1"].location_ids == ["0000000", "0000001", "0000002"]


def test_groups_and_catalogues_are_pickled_small(catalogue: Catalogue) -> None:
    read(catalogue.groups[0], "s2", [0])  # an open handle must not travel
    again = pickle.loads(pickle.dumps(catalogue))
    assert again == catalogue
    assert len(pickle.dumps(catalogue.groups[0])) < 2000


def _sum(group, queue) -> None:
    queue.put(int(read(group, "s2", [1]).values.astype(np.int64).sum()))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_read_after_the_parent_has(catalogue: Catalogue, method: str) -> None:
    group = catalogue.groups[0]
    expected = int(read(group, "s2", [1]).values.astype(np.int64).sum())
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=_sum, args=(group, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join(600)
    assert results == [expected, expected]


@pytest.mark.parametrize("release", ["A", "B"])
def test_urls_are_read_like_folders(tmp_path: Path, release: str) -> None:
    import fsspec

    write_split(tmp_path, "train", IDS[:1], release)
    files = fsspec.filesystem("memory")
    files.put(str(tmp_path), f"/ssl4eo_{release}", recursive=True)
    near = scan(str(tmp_path), "train", PAIR).groups[0]
    far = scan(f"memory://ssl4eo_{release}", "train", PAIR).groups[0]
    for name in PAIR:
        there, here = read(far, name, [1, 2]), read(near, name, [1, 2])
        np.testing.assert_array_equal(there.values, here.values)
        assert there.ids == here.ids
    files.rm(f"/ssl4eo_{release}", recursive=True)


def test_split_folder_itself_can_be_the_root(tmp_path: Path) -> None:
    write_split(tmp_path, "train", IDS)
    assert scan(str(tmp_path / "train"), "train", PAIR).count == 5


def test_list_of_a_split_chooses_its_files(tmp_path: Path) -> None:
    write_split(tmp_path, "train", IDS)
    (tmp_path / "splits").mkdir()
    name = "ssl4eos12_train_seasonal_data_000002.zarr.zip"
    (tmp_path / "splits" / "ssl4eos12_train.txt").write_text(f"{name}\n")
    assert [g.key for g in scan(str(tmp_path), "train", PAIR).groups] == [name[:-9]]


# ------------------------------------------------------------------------- order of S1 dates


def write_s1(path: Path, release: str, swapped: bool) -> np.ndarray:
    """Write two locations whose second has its S1A dates before its S1B dates, as published."""
    path.parent.mkdir(parents=True)
    tiles = tile_table([0, 1], s1=True)
    values = (pattern([0, 1]) / 4).astype(np.float16)[:, :, None].repeat(2, 2)
    if swapped:
        stored = [1, 3, 0, 2]
        names = [tiles.file_ids[1][i] for i in stored]
        marked = [n.replace("S1B", "S1A") if i < 2 else n for i, n in enumerate(names)]
        tiles.file_ids = [tiles.file_ids[0], marked]
        shuffled = values.copy()
        shuffled[1] = values[1, stored]
    else:
        shuffled = values
    if release == "A":
        write_release_a(path, "S1GRD", shuffled, tiles)
    else:
        write_release_b(path, "S1GRD", shuffled, tiles, ["a_0000000", "a_0000001"])
    return values


@pytest.mark.parametrize(
    ("release", "name"),
    [("A", "ssl4eos12_train_seasonal_data_000001.zarr.zip"), ("B", "ssl4eos12_shard_000001.tar")],
)
def test_s1_dates_are_put_in_order_by_product_name(tmp_path: Path, release: str, name: str) -> None:
    values = write_s1(tmp_path / "train" / "S1GRD" / name, release, swapped=True)
    block = read_one(tmp_path, "S1GRD", [0, 1, 2, 3])
    np.testing.assert_array_equal(block.values, values)
    assert (np.diff(block.dates, axis=1) > 0).all()
    assert block.reordered.tolist() == [False, True]


def test_one_date_of_swapped_s1_decodes_the_blocks_it_lies_in(tmp_path: Path) -> None:
    name = "ssl4eos12_train_seasonal_data_000001.zarr.zip"
    values = write_s1(tmp_path / "train" / "S1GRD" / name, "A", swapped=True)
    block = read_one(tmp_path, "S1GRD", [1])
    np.testing.assert_array_equal(block.values, values[:, 1:2])
    assert block.bytes_decoded == 2 * block.bytes_needed


def test_s1_order_can_be_left_as_stored(tmp_path: Path) -> None:
    name = "ssl4eos12_train_seasonal_data_000001.zarr.zip"
    values = write_s1(tmp_path / "train" / "S1GRD" / name, "A", swapped=True)
    block = read_one(tmp_path, "S1GRD", [0], fix_s1_order=False)
    np.testing.assert_array_equal(block.values[1, 0], values[1, 1])


# ------------------------------------------------------------------------- offset and masks


def s2_values(bands: int, level: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(level, level + 900, (2, DATES, bands, SIDE, SIDE)).astype("<i2")


@pytest.mark.parametrize(("level", "offset"), [(1100, 1000), (30, 0)])
def test_l2a_of_release_a_carries_the_offset_unless_too_dark(
    tmp_path: Path, level: int, offset: int
) -> None:
    stored = s2_values(12, level)
    write_one(tmp_path, "S2L2A", stored)
    block = read_one(tmp_path, "S2L2A", [0])
    assert block.offset.tolist() == [offset] * 2
    np.testing.assert_array_equal(block.values, stored[:, :1] - offset)


@pytest.mark.parametrize(("cirrus", "offset"), [(1020, 1000), (20, 0), (700, 0)])
def test_l1c_offset_is_judged_by_b10(tmp_path: Path, cirrus: int, offset: int) -> None:
    stored = s2_values(13, 1500)
    stored[:, :, 10] = cirrus
    write_one(tmp_path, "S2L1C", stored)
    assert read_one(tmp_path, "S2L1C", [0]).offset.tolist() == [offset] * 2


def test_given_offset_wins_over_the_verdict(tmp_path: Path) -> None:
    stored = s2_values(12, 30)
    write_one(tmp_path, "S2L2A", stored)
    block = read_one(tmp_path, "S2L2A", [0], dn_offset=1000)
    np.testing.assert_array_equal(block.values, stored[:, :1] - 1000)


def test_stored_zero_stays_no_data_when_the_offset_goes(tmp_path: Path) -> None:
    stored = s2_values(12, 1100)
    stored[0, 0, :, :4] = 0
    write_one(tmp_path, "S2L2A", stored)
    block = read_one(tmp_path, "S2L2A", [0])
    assert (block.values[0, 0, :, :4] == 0).all()
    assert not block.valid[0, 0, :4].any() and block.valid[0, 0, 4:].all()


@pytest.mark.parametrize(("mask_clouds", "expected"), [(False, 0b0111111), (True, 0b0000111)])
def test_cloud_mask_becomes_validity(tmp_path: Path, mask_clouds: bool, expected: int) -> None:
    cloud = np.zeros((2, DATES, SIDE, SIDE), np.uint8)
    cloud[0, 0, 0, :7] = range(7)
    write_one(tmp_path, "S2L2A", s2_values(12, 1100), cloud)
    block = read_one(tmp_path, "S2L2A", [0], mask_clouds=mask_clouds)
    assert block.valid[0, 0, 0, :7].tolist() == [bool(expected >> i & 1) for i in range(7)]
    assert block.valid[1].all()


def test_nan_and_infinite_s1_become_invalid_and_finite(tmp_path: Path) -> None:
    values = np.full((1, DATES, 2, SIDE, SIDE), -10, np.float16)
    values[0, 0, 0, 0, 0], values[0, 0, 1, 1, 1] = np.nan, -np.inf
    write_one(tmp_path, "S1GRD", values)
    block = read_one(tmp_path, "S1GRD", [0])
    assert np.argwhere(~block.valid[0, 0]).tolist() == [[0, 0], [1, 1]]
    assert np.isfinite(block.values).all()


@pytest.mark.parametrize("product", ["S1GRD", "S2L2A", "S2RGB"])
@pytest.mark.parametrize("mask_clouds", [False, True])
def test_parts_are_what_a_whole_read_holds_there(
    tmp_path: Path, product: str, mask_clouds: bool
) -> None:
    rng = np.random.default_rng(1)
    shape = (3, DATES, {"S1GRD": 2, "S2L2A": 12, "S2RGB": 3}[product], SIDE, SIDE)
    if product == "S1GRD":
        values = rng.normal(-12, 4, shape).astype(np.float16)
        values[rng.random(shape) < 0.02] = np.nan
        values[rng.random(shape) < 0.02] = -np.inf
    else:
        dtype = np.uint8 if product == "S2RGB" else np.int16
        values = rng.integers(0, 256, shape).astype(dtype)
        values[1:] += dtype(0 if product == "S2RGB" else 1100)
    values[:, :, :, 3:9, 5:20] = 0
    cloud = rng.integers(0, 7, (3, DATES, SIDE, SIDE)).astype(np.uint8)
    write_one(tmp_path, product, values, None if product == "S1GRD" else cloud)
    whole = read_one(tmp_path, product, [2, 0], mask_clouds=mask_clouds)
    block = read_one(tmp_path, product, [2, 0], mask_clouds=mask_clouds, in_parts=True)
    assert block.offset.tolist() == whole.offset.tolist()
    assert product != "S2L2A" or block.offset.tolist() == [0, 1000, 1000]
    rows, columns = slice(2, 31), slice(7, 36)
    for i, offset in enumerate(whole.offset):
        found, valid = block.part(i, rows, columns)
        expected = whole.values[i, :, :, rows, columns]
        np.testing.assert_array_equal(valid, whole.valid[i, :, rows, columns])
        np.testing.assert_array_equal(np.where(found == 0, found, found - offset), expected)
        assert not valid.all() and valid.any()


def test_labels_are_found_beside_the_data(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    text = "sample,label,name,relief\n0000001,1,crops,0.5\n0000002,0,water,0.25\n"
    (tmp_path / "labels" / "val.csv").write_text(text)
    found = labels(str(tmp_path), "val")
    assert found is not None and found.names == ("water", "crops")
    keys, ids = ["a", "b", "0000001"], ["0000002", "0000009", "0000002"]
    assert found.of(keys, ids).tolist() == [0, -1, 1]  # what a tar calls a location counts first
    assert found.factors["relief"]["0000001"] == 0.5
    assert labels(str(tmp_path), "train") is None
    for row, what in (("0000001,0,water,0.5", "'0000001' is 1"), ("3,1,woods,0", "1 is 'crops'")):
        (tmp_path / "labels" / "val.csv").write_text(f"{text}{row}\n")
        with pytest.raises(DataError, match=f"line 4: cannot be read \\({what} in a line above"):
            labels(str(tmp_path), "val")
