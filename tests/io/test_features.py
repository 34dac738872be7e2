"""Feature bags of CLAM, TRIDENT and our own, read to the same thing, and laid out on grids."""

from __future__ import annotations

from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from bag_files import CLAM, LATTICE, OTHER, SIZE, TRIDENT, D, clam, feature, trident, write

from domainssl.errors import ConfigError, DataError
from domainssl.io.slide.bag import places_of, spacing_of
from domainssl.io.slide.features import Bag, bag_header, describe_bag, read_bag, to_grid, write_bag


def by_place(bag):
    return {tuple(place): values for place, values in zip(bag.coords.tolist(), bag.features)}


def check(bag, places):
    found = by_place(bag)
    assert found.keys() == set(places)
    assert bag.coords.dtype == np.int64 and bag.features.dtype == np.float32
    for place in places:
        assert found[place] == pytest.approx(feature(*place), abs=0.1)  # float16 in TRIDENT's


def test_clam_and_trident_give_the_same_places_features_and_tile_size(tmp_path):
    ours, theirs = read_bag(clam(tmp_path / "clam")), read_bag(trident(tmp_path / "trident"))
    check(ours, [*LATTICE, *OTHER])
    check(theirs, LATTICE)
    assert ours.patch_size_level0 == theirs.patch_size_level0 == SIZE
    assert (ours.layout, theirs.layout) == ("clam", "trident")
    assert (ours.mpp_um, theirs.mpp_um, theirs.level0_mpp_um) == (None, 0.5, 0.25)
    assert theirs.encoder == "uni_v1" and theirs.dtype == "float16"
    assert theirs.level0_size == (12000, 10000)
    assert theirs.attributes["mpp"] is None and theirs.attributes["more"] == {"a": [1, 2]}


def test_a_grid_has_rows_along_y_and_its_background_is_a_mask(tmp_path):
    grid = to_grid(read_bag(trident(tmp_path)))
    assert grid.features.shape == (D, 4, 5) and grid.occupied.sum() == len(LATTICE)
    assert not grid.occupied[1, 2] and (grid.features[:, 1, 2] == 0).all()
    for x, y in ((1024, 2048), (3072, 2048), (1536, 3584)):
        row, column = (y - 2048) // SIZE, (x - 1024) // SIZE
        assert grid.features[:, row, column] == pytest.approx(feature(x, y), abs=0.1)
    assert (grid.off_lattice, grid.origin, grid.step) == (0, (1024, 2048), SIZE)


def test_tiles_of_a_second_contour_are_off_the_lattice_and_share_cells_by_their_mean(tmp_path):
    grid = to_grid(read_bag(clam(tmp_path)))
    assert grid.off_lattice == len(OTHER) and grid.shared_cells == 0
    near = [(0, 0), (512, 0), (520, 0)]  # the last two fall into one cell
    bag = read_bag(clam(tmp_path / "near", near))
    grid = to_grid(bag)
    assert grid.off_lattice == 0 and grid.counts.tolist() == [[1, 2]]  # 8 of 512 is on the lattice
    assert grid.features[:, 0, 1] == pytest.approx((feature(512, 0) + feature(520, 0)) / 2)
    summed = to_grid(bag, legacy_titan_grid=True)
    assert summed.features.shape == (D, 2, 1)  # x is the first axis
    assert summed.features[:, 1, 0] == pytest.approx(feature(512, 0) + feature(520, 0))


@pytest.mark.parametrize("factor", [1 / 512, 0.25])
def test_coordinates_that_lie_closer_than_tiles_make_no_grid(factor):
    coords = (np.array(LATTICE) * factor).astype(int)
    bag = Bag(slide="a", features=np.ones((len(coords), 4), np.float32), coords=coords,
              patch_size_level0=SIZE)  # fmt: skip
    with pytest.raises(DataError, match=r"a: 19 tiles lie in \d cells of 512 pixels of level 0"):
        to_grid(bag)
    twice = replace(bag, coords=np.array([LATTICE[0]] * len(coords)))  # features of views of a tile
    assert to_grid(twice).counts.tolist() == [[19]]


def test_a_zero_vector_is_no_background_and_a_feature_that_is_not_finite_is():
    features = np.array([[0.0, 0.0], [np.nan, 1.0], [1.0, 2.0]], np.float32)
    coords = np.array([[0, 0], [10, 0], [20, 0]])
    grid = to_grid(Bag(slide="a", features=features, coords=coords, patch_size_level0=10))
    assert grid.occupied.tolist() == [[True, False, True]] and grid.not_finite == 1
    assert np.isfinite(grid.features).all()


def test_a_bag_without_attributes_is_readable_and_refused_as_a_grid(tmp_path):
    bag = read_bag(write(tmp_path / "bare" / "slide.h5", LATTICE))
    check(bag, LATTICE)
    with pytest.raises(DataError, match=r"slide\.h5.*patch_size"):
        to_grid(bag)
    assert (
        "neighbours lie 512 pixels apart; the size of a tile is not stated, no grid"
        in (describe_bag(bag)[-1])
    )
    grid = to_grid(read_bag(bag.path, patch_size_level0=SIZE))  # as the user says
    assert grid.features.shape == (D, 4, 5) and int(grid.occupied.sum()) == len(LATTICE)


@pytest.mark.parametrize(
    ("coords", "step"),
    [
        (LATTICE, SIZE),
        ([LATTICE[i] for i in (0, 3, 5, 8, 11, 12, 16)], SIZE),  # sparse, on one lattice
        ((*LATTICE, *OTHER), SIZE),  # a second contour on a lattice of its own
        ([(1000, 7)], 1),
        ([(0, 0), (512, 512)], None),
        ([(512 * x, 1024 * y) for x in range(4) for y in range(4)], None),
        ([(0, 0), (300, 0), (700, 0), (1200, 0), (1900, 0), (2300, 0)], None),
    ],
)
def test_places_without_a_size_are_told_by_neighbours_where_they_tell_it(tmp_path, coords, step):
    bag = replace(read_bag(write(tmp_path / "a.h5", LATTICE)), patch_size_level0=None)
    coords = np.array(coords, np.int64)
    bag = replace(bag, coords=coords, features=np.zeros((len(coords), D), np.float32))
    assert spacing_of(coords) == step
    if step is None:
        with pytest.raises(DataError, match=r"do not tell it\. .*slides\.patch_size_level0"):
            places_of(bag)
        return
    places, origin, found = places_of(bag)
    assert (found, places.dtype) == (step, np.float32) and 0 <= places.min() < 1
    np.testing.assert_allclose(places[:, ::-1] * step + origin, coords)


def test_clam_era_coordinates_need_the_downsample_of_their_level(tmp_path):
    facts = {"patch_size": 256, "patch_level": 1, "custom_downsample": 1, "name": "slide"}
    path = write(tmp_path / "features_uni_v1" / "slide.h5", LATTICE, attrs=facts)
    with pytest.raises(DataError, match=r"slide\.h5.*level_downsample"):
        to_grid(read_bag(path))
    assert read_bag(path, level_downsample=2.0).patch_size_level0 == SIZE
    assert to_grid(read_bag(path, level_downsample=2.0005)).features.shape == (D, 4, 5)
    native = write(tmp_path / "b" / "slide.h5", LATTICE, attrs={**facts, "patch_level": 0})
    assert read_bag(native).patch_size_level0 == 256


def test_a_tensor_takes_its_places_from_the_file_beside_it(tmp_path):
    clam(tmp_path)
    values = np.stack([feature(*place) for place in (*LATTICE, *OTHER)])
    (tmp_path / "pt_files").mkdir()
    torch.save(torch.from_numpy(values), tmp_path / "pt_files" / "slide.pt")
    bag = read_bag(tmp_path / "pt_files" / "slide.pt")
    check(bag, [*LATTICE, *OTHER])
    assert bag.patch_size_level0 == SIZE
    torch.save({"a": np.array([{}], object)}, tmp_path / "pt_files" / "slide.pt")
    with pytest.raises(DataError, match="no other object is unpickled"):
        read_bag(tmp_path / "pt_files" / "slide.pt")


@pytest.mark.parametrize("shape", [(0, D), (0,)])
def test_a_slide_without_tissue_is_an_empty_bag(tmp_path, shape):
    path = tmp_path / "features_uni_v1" / "slide.h5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros(shape, np.float32)
        file["coords"] = np.zeros((0, 2), np.int64)
        file["coords"].attrs.update(TRIDENT)
    bag = read_bag(path)
    assert len(bag) == 0 and bag.features.ndim == 2 and bag.coords.shape == (0, 2)
    with pytest.raises(DataError, match="no tile"):
        to_grid(bag)


def test_one_tile_is_a_bag_and_a_grid(tmp_path):
    bag = read_bag(clam(tmp_path, [(512, 1024)]))
    assert len(bag) == 1 and to_grid(bag).features.shape == (D, 1, 1)


@pytest.mark.parametrize("layout", ["clam", "trident", "zarr"])
@pytest.mark.parametrize("source", [clam, trident])
def test_every_layout_is_written_and_read_back(tmp_path, layout, source):
    bag = read_bag(source(tmp_path / "from"))
    again = read_bag(write_bag(tmp_path / "to", bag, layout))
    assert by_place(again).keys() == by_place(bag).keys()
    for place, values in by_place(bag).items():
        assert by_place(again)[place] == pytest.approx(values, rel=1e-3)
    assert again.patch_size_level0 == SIZE and again.slide == "slide"
    assert to_grid(again).occupied.sum() == to_grid(bag).occupied.sum()
    if layout != "clam":
        assert (again.encoder or "unknown") == (bag.encoder or "unknown")
    assert not list(tmp_path.rglob(".*part*"))


@pytest.mark.parametrize("count", [3, 0])
def test_int8_has_a_scale_per_tile_and_tiles_that_are_not_finite_stay_so(tmp_path, count):
    features = np.array([[1.0, -254.0], [0.0, 0.0], [np.inf, 1.0]], np.float32)[:count]
    coords = np.array([[0, 0], [64, 0], [0, 64]], np.int64)[:count]
    bag = Bag(slide="s", features=features, coords=coords, patch_size_level0=64)
    again = read_bag(write_bag(tmp_path, bag, "zarr", dtype="int8"))
    assert again.dtype == "int8" and again.features.shape == (count, 2)
    if count:
        # steps of 2: 1 is rounded to the even neighbour of 0.5
        assert again.features[:2].tolist() == [[0.0, -254.0], [0.0, 0.0]]
        assert np.isnan(again.features[2]).all()
    with pytest.raises(ConfigError, match="int8: needs a scale per tile, which trident lacks"):
        write_bag(tmp_path, bag, "trident", dtype="int8")


def test_outliers_are_stored_in_float32():
    from domainssl.io.slide.bag_zarr import stored_type

    assert stored_type(np.array([[1000.0]])) == "float16"
    assert stored_type(np.array([[-1000.5]])) == stored_type(np.array([[np.nan]])) == "float32"


@pytest.mark.parametrize("stated", [[512], [512, 512], np.bytes_(b"512"), "512"])
def test_size_of_a_tile_is_read_in_every_form(tmp_path, stated):
    path = write(tmp_path / "a.h5", LATTICE, attrs={**TRIDENT, "patch_size_level0": stated})
    bag = read_bag(path)
    assert (bag.patch_size_level0, bag.step) == (512, 512)
    assert int(to_grid(bag).occupied.sum()) == len(LATTICE)


@pytest.mark.parametrize("downsample", ["abc", [2.0, 2.0, 2.0], [2.0, 4.0], [np.nan, 2.0], 0.5])
def test_a_downsample_that_is_none_is_named(tmp_path, downsample):
    path = write(tmp_path / "a.h5", LATTICE, attrs={**CLAM, "downsample": downsample})
    with pytest.raises(DataError, match=r"a\.h5: 'downsample' is .*, expected a factor of 1"):
        read_bag(path)


@pytest.mark.parametrize(
    "value", [np.uint64(2**63 + 5), np.int64(-(2**62)), np.float64(1e300)], ids=str
)
def test_places_that_no_slide_has_are_refused(tmp_path, value):
    coords = np.array(LATTICE).astype(value.dtype)
    coords[0, 0] = value
    path = write(tmp_path / "a.h5", LATTICE, attrs=TRIDENT)
    with h5py.File(path, "a") as file:
        del file["coords"]
        file["coords"] = coords
    with pytest.raises(DataError, match=r"a\.h5: 'coords' reaches from"):
        read_bag(path)


@pytest.mark.parametrize("layout", ["clam", "trident"])
def test_a_slide_of_a_long_name_is_written(tmp_path, layout):
    bag = Bag(slide="s" * 240, features=np.ones((2, 4), np.float32), coords=np.eye(2, dtype=int))
    found = read_bag(write_bag(tmp_path, bag, layout))
    assert (found.slide, found.features.sum()) == ("s" * 240, 8)


def test_a_negative_overlap_makes_no_grid(tmp_path):
    bag = read_bag(write(tmp_path / "a.h5", LATTICE, attrs={**TRIDENT, "overlap": -16}))
    with pytest.raises(DataError, match="overlap by -32; expected 0 or more"):
        to_grid(bag)


def test_what_is_no_bag_is_refused_with_its_name(tmp_path):
    other = write(tmp_path / "patches" / "a.h5", LATTICE, attrs=CLAM, features=False)
    with pytest.raises(DataError, match=r"a\.h5: places of tiles without features"):
        read_bag(other)
    vector = tmp_path / "slide_features" / "b.h5"
    vector.parent.mkdir()
    with h5py.File(vector, "w") as file:
        file["features"] = np.zeros(D, np.float32)
    with pytest.raises(DataError, match=r"b\.h5: one vector of 8 features"):
        read_bag(vector)
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["features"], file["coords"] = np.zeros((3, D)), np.zeros((2, 2), int)
    with pytest.raises(DataError, match=r"c\.h5: features of 3 tiles and coordinates of 2"):
        read_bag(tmp_path / "c.h5")
    mixed = clam(tmp_path / "mixed")
    write(tmp_path / "mixed" / "patches" / "slide.h5", LATTICE[:4], attrs=CLAM, features=False)
    with pytest.raises(DataError, match="another tiling"):
        read_bag(mixed)
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["features"] = h5py.ExternalLink(str(other), "coords")
    with pytest.raises(DataError, match=r"d\.h5: 'features' is a link"):
        read_bag(tmp_path / "d.h5")
    with h5py.File(tmp_path / "e.h5", "w") as file:  # 8 TB that were never written
        file.create_dataset("features", (2**30, 2**11), np.float32, chunks=(1, 8))
    with pytest.raises(DataError, match=r"e\.h5: 'features' has"):
        read_bag(tmp_path / "e.h5")
    with pytest.raises(ConfigError, match="Did you mean 'trident'"):
        write_bag(tmp_path, read_bag(trident(tmp_path)), "tridnet")


def test_coordinates_that_are_far_apart_make_no_grid():
    coords = np.array([[0, 0], [2**40, 2**40]])
    bag = Bag(slide="a", features=np.zeros((2, 4), np.float32), coords=coords, patch_size_level0=64)
    with pytest.raises(DataError, match="GB"):
        to_grid(bag)


def test_places_beyond_the_slide_make_no_grid(tmp_path):
    facts = {**TRIDENT, "level0_width": 4096, "level0_height": 8192}
    swapped = [(y, x) for x, y in LATTICE]
    bag = read_bag(write(tmp_path / "a.h5", [(y, 2 * x) for y, x in swapped], attrs=facts))
    assert to_grid(bag).occupied.any()
    with pytest.raises(DataError, match=r"slide has 7000 x 4000 pixels .*seem to be swapped"):
        to_grid(replace(bag, level0_size=(7000, 4000)))
    with pytest.raises(DataError, match="may be of another level"):
        to_grid(replace(bag, level0_size=(1000, 1000)), legacy_titan_grid=True)
    with pytest.raises(DataError, match="x -512 and y 0 of 512 pixels lies beyond the upper"):
        to_grid(replace(bag, coords=bag.coords - bag.coords.min(0) - [SIZE, 0]))
    with pytest.raises(DataError, match="all 19 tiles lie at x 0 and y 0"):
        to_grid(replace(bag, coords=bag.coords * 0))


def test_tiles_that_were_shrunk_after_reading_are_larger_on_the_slide(tmp_path):
    facts = {"patch_size": 256, "patch_level": 1, "custom_downsample": 2}
    path = write(tmp_path / "a.h5", LATTICE, attrs=facts)
    assert read_bag(path, level_downsample=4.0).patch_size_level0 == 2048
    path = write(tmp_path / "b.h5", LATTICE, attrs={**facts, "patch_level": 0})
    assert read_bag(path).patch_size_level0 == 512
    path = write(tmp_path / "c.h5", LATTICE, attrs={**facts, "custom_downsample": -1})
    with pytest.raises(DataError, match="'custom_downsample' is -1, expected 1 or more"):
        read_bag(path, level_downsample=1.0)


@pytest.mark.parametrize("layout", ["clam", "trident"])
def test_no_path_of_a_machine_is_written_into_a_bag(tmp_path, layout):
    bag = read_bag(trident(tmp_path / "in"))
    write_bag(tmp_path / "named_like_a_patient", bag, layout)
    files = [*(tmp_path / "named_like_a_patient").rglob("*.h5")]
    assert len(files) == 2
    assert not any(b"named_like_a_patient" in path.read_bytes() for path in files)


@pytest.mark.parametrize("layout", ["trident", "zarr"])
def test_tiles_of_pixels_that_are_not_square_lie_in_neighbouring_cells(tmp_path, layout):
    flat = read_bag(trident(tmp_path / "flat"))
    high = [(x, 2 * y) for x, y in flat.coords.tolist()]
    facts = {**TRIDENT, "patch_size_level0_y": 2 * SIZE}  # as `tile` writes it
    path = write(tmp_path / "high" / "slide.h5", high, attrs=facts)
    bag = replace(read_bag(path), features=flat.features)
    assert (bag.patch_size_level0, bag.aspect) == (SIZE, 2.0)
    bag = read_bag(write_bag(tmp_path / "out", bag, layout))
    for legacy in (False, True):
        found, wanted = (to_grid(b, legacy_titan_grid=legacy) for b in (bag, flat))
        np.testing.assert_array_equal(found.features, wanted.features)
        assert found.origin == (wanted.origin[0], 2 * wanted.origin[1])
    np.testing.assert_array_equal(places_of(bag)[0], places_of(flat)[0])
    with pytest.raises(DataError, match="2 times as high as wide at level 0"):
        write_bag(tmp_path / "clam", bag, "clam")


def test_a_batch_of_one_slide_is_the_slide_and_of_several_is_refused(tmp_path):
    flat = read_bag(write(tmp_path / "a.h5", LATTICE, attrs=TRIDENT))
    for count in (1, 2):
        with h5py.File(tmp_path / "b.h5", "w") as file:
            file["features"] = np.stack([flat.features] * count)
            file["coords"] = np.stack([flat.coords] * count)
        torch.save(torch.from_numpy(np.stack([flat.features] * count)), tmp_path / "c.pt")
        if count == 1:
            tiles, header = bag_header(tmp_path / "b.h5")
            assert (tiles, header.dim, len(header)) == (*flat.features.shape, 0)
            bag = read_bag(tmp_path / "b.h5")
            np.testing.assert_array_equal(bag.features, flat.features)
            np.testing.assert_array_equal(bag.coords, flat.coords)
            assert read_bag(tmp_path / "c.pt").features.shape == flat.features.shape
    with pytest.raises(
        DataError, match=r"'features' has the shape \(2, 19, 8\), expected those of"
    ):
        read_bag(tmp_path / "b.h5")
    with pytest.raises(DataError, match=r"holds \(2, 19, 8\), expected one tensor"):
        read_bag(tmp_path / "c.pt")
