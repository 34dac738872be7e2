"""Tissue, the grid over a slide, and regions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from slide_files import damage_tile, squares, write_tiff

from domainssl.errors import ConfigError, DataError
from domainssl.io.slide.grid import plan_grid
from domainssl.io.slide.pyramid import Slide
from domainssl.io.slide.regions import check_regions, read_regions, regions_for
from domainssl.io.slide.tissue import TissueMask, TissueOptions, slide_tissue, tissue

Array = np.ndarray[Any, Any]
GLASS, PINK = (242, 240, 241), (200, 110, 170)


def _glass(height: int = 200, width: int = 300) -> tuple[Array, Array]:
    noise = np.random.default_rng(0).integers(-2, 3, (height, width, 3))
    return (np.array(GLASS) + noise).astype(np.uint8), np.ones((height, width), bool)


@pytest.mark.parametrize("method", ["otsu", "fixed"])
def test_tissue_is_found_and_small_parts_and_holes_are_not(method: Any) -> None:
    rgb, valid = _glass()
    rgb[50:150, 50:200] = PINK
    rgb[90:94, 90:94] = GLASS  # a hole
    rgb[100:130, 120:160] = GLASS  # a lumen
    rgb[10:13, 250:253] = PINK  # a crumb
    options = TissueOptions(method=method, min_part_mm2=0.005, min_hole_mm2=0.002)
    mask = tissue(rgb, valid, options, pixel_mm2=64e-6)
    assert mask[92, 92]
    assert not mask[115, 140]
    assert not mask[11, 251]
    assert abs(mask.sum() - (100 * 150 - 30 * 40)) < 100


def test_blank_slide_has_no_tissue_and_full_slide_has_only_tissue() -> None:
    rgb, valid = _glass()
    assert not tissue(rgb, valid).any()
    full = np.random.default_rng(1).normal(PINK, 25, (*rgb.shape[:2], 3)).clip(0, 255)
    assert tissue(full.astype(np.uint8), valid).mean() > 0.98
    assert not tissue(rgb, np.zeros_like(valid)).any()


@pytest.mark.parametrize("pen", [(20, 160, 60), (30, 60, 220), (15, 15, 20)])
def test_pen_marks_are_no_tissue(tmp_path: Path, pen: tuple[int, int, int]) -> None:
    rgb, _ = _glass(640, 640)
    rgb[64:300, 64:400] = PINK
    rgb[400:600, 100:500] = pen
    slide = Slide(write_tiff(tmp_path / "a.tif", [rgb], mpp=(8.0, 8.0)))
    found = slide_tissue(slide)
    assert found.mask[80:280, 80:380].all()
    assert not found.mask[410:590, 110:490].any()
    assert found.pen_fraction == pytest.approx(200 * 400 / 640**2, rel=0.05)
    kept = slide_tissue(slide, TissueOptions(remove_pen=False))
    assert kept.mask[410:590, 110:490].all()


def test_share_of_tissue_is_exact_for_any_downsample() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((13, 17)) < 0.5
    found = TissueMask(mask=mask, downsample=(6.0, 4.0), pen_fraction=0.0)
    fine = mask.repeat(4, 0).repeat(6, 1)  # level 0
    coords = np.array([[0, 0], [5, 3], [31, 17], [80, 40], [95, 45], [200, 0]])
    expected = [fine[y : y + 11, x : x + 13].sum() / (13 * 11) for x, y in coords]
    assert found.fractions(coords, (13, 11)) == pytest.approx(expected)


def _slide(folder: Path, mpp: tuple[float, float] = (0.5, 0.5)) -> Slide:
    rgb, _ = _glass(700, 1000)
    rgb[128:512, 256:800] = PINK
    return Slide(write_tiff(folder / "s.tif", [rgb], mpp=mpp))


def test_grid_is_row_by_row_with_whole_rows_and_columns(tmp_path: Path) -> None:
    grid = plan_grid(_slide(tmp_path), 64, 1.0, min_tissue=0)
    assert (grid.shape, grid.size_level0, grid.step_level0) == ((5, 7), (128, 128), (128, 128))
    assert len(grid) == 35
    assert grid.coords.dtype == np.int64
    assert (grid.coords == np.stack([grid.columns, grid.rows], -1) * 128).all()
    assert (np.diff(grid.rows * 7 + grid.columns) == 1).all()


def test_grid_keeps_tiles_by_their_share_of_tissue(tmp_path: Path) -> None:
    slide = _slide(tmp_path)
    options = TissueOptions(mpp_um=0.5)
    grid = plan_grid(slide, 64, 1.0, min_tissue=0.2, tissue=options)
    wanted = [[x, y] for y in (128, 256, 384) for x in (256, 384, 512, 640, 768)]
    assert grid.coords.tolist() == wanted
    full = {tuple(p): f for p, f in zip(grid.coords.tolist(), grid.tissue_fraction, strict=True)}
    assert full[(384, 256)] == pytest.approx(1.0)
    assert full[(768, 256)] == pytest.approx(0.25, abs=0.02)
    assert len(plan_grid(slide, 64, 1.0, min_tissue=0.5, tissue=options)) == 12


@pytest.mark.parametrize(("mpp", "overlap"), [((0.5, 0.5), 16), ((0.4, 0.5), 0), ((0.3, 0.3), 7)])
def test_step_is_one_whole_number_per_axis(
    tmp_path: Path, mpp: tuple[float, float], overlap: int
) -> None:
    grid = plan_grid(_slide(tmp_path, mpp), 64, 1.0, overlap, 0.0, partial=True)
    assert grid.size_level0 == tuple(round(64 / m) for m in mpp)
    assert grid.step_level0 == tuple(round((64 - overlap) / m) for m in mpp)
    last = grid.coords.max(0)
    assert (last < (1000, 700)).all()
    assert (last + grid.step_level0 >= (1000, 700)).all()


def test_slide_smaller_than_a_tile_has_none(tmp_path: Path) -> None:
    slide = Slide(write_tiff(tmp_path / "a.tif", [squares(128, 128)]))
    assert len(plan_grid(slide, 256, 0.5)) == 0
    assert len(plan_grid(slide, 256, 0.5, min_tissue=0, partial=True)) == 1


@pytest.mark.parametrize(
    "wrong", [{"size_px": 0}, {"overlap_px": 64}, {"min_tissue": 1.5}, {"mpp_um": 0.0}]
)
def test_impossible_grids_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="tile grid"):
        plan_grid(_slide(tmp_path), **{"size_px": 64, "mpp_um": 1.0, **wrong})


def test_slide_without_resolution_names_the_override(tmp_path: Path) -> None:
    slide = Slide(write_tiff(tmp_path / "a.tif", [squares(512, 512)], mpp=None))
    with pytest.raises(DataError, match="mpp_um"):
        plan_grid(slide, 64, 1.0)


def test_slide_of_which_most_is_damaged_is_refused(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [squares(640, 384)])
    for x in range(0, 448, 64):
        for y in range(0, 384, 64):
            damage_tile(path, x, y)
    with pytest.raises(DataError, match=r"a\.tif: most of the slide.*42 stored tiles.*\(\d+, \d+"):
        plan_grid(Slide(path), 64, 0.5)


def _feature(points: list[tuple[float, float]], name: str | None) -> dict[str, Any]:
    properties = {} if name is None else {"classification": {"name": name}}
    ring = [*points, points[0]]
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"objectType": "annotation", **properties}}  # fmt: skip


def _box(x: float, y: float, w: float, h: float) -> list[tuple[float, float]]:
    return [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]


@pytest.mark.parametrize("form", ["collection", "list"])
def test_regions_of_qupath_restrict_and_label_tiles(tmp_path: Path, form: str) -> None:
    features = [
        _feature(_box(0, 0, 256, 128), "Tumor"), _feature(_box(256, 0, 192, 128), "Stroma"),
        _feature(_box(128, 0, 100, 128), "Ignore*"),
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": [5, 5]}},
    ]  # fmt: skip
    content = features if form == "list" else {"type": "FeatureCollection", "features": features}
    (tmp_path / "s.geojson").write_text(json.dumps(content))
    found = regions_for(str(tmp_path), "/elsewhere/s.tif")
    assert found is not None
    grid = plan_grid(_slide(tmp_path), 64, 1.0, min_tissue=0, regions=read_regions(found))
    assert grid.labels is not None
    assert grid.coords.tolist() == [[0, 0], [256, 0], [384, 0]]
    assert grid.labels.tolist() == ["Tumor", "Stroma", "Stroma"]


def test_regions_that_cross_themselves_are_mended(tmp_path: Path) -> None:
    bow = [(0.0, 0.0), (256.0, 256.0), (256.0, 0.0), (0.0, 256.0)]
    (tmp_path / "s.json").write_text(json.dumps(_feature(bow, None)))
    regions = read_regions(tmp_path / "s.json")
    names, share = regions.under(np.array([[0, 0], [128, 0]]), (256, 256), (1000, 700))
    assert share == pytest.approx([0.5, 0.25])
    assert names.tolist() == ["", ""]


@pytest.mark.parametrize("content", ["[]", "{}", "no", '{"type":"FeatureCollection"}'])
def test_files_without_regions_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "s.geojson").write_text(content)
    with pytest.raises(DataError, match=r"s\.geojson"):
        read_regions(tmp_path / "s.geojson")


def test_regions_of_another_slide_are_refused(tmp_path: Path) -> None:
    (tmp_path / "s.geojson").write_text(json.dumps(_feature(_box(5000, 0, 9, 9), "a")))
    with pytest.raises(DataError, match="outside the slide"):
        plan_grid(_slide(tmp_path), 64, 1.0, regions=read_regions(tmp_path / "s.geojson"))
    Image.fromarray(np.ones((50, 50), np.uint8)).save(tmp_path / "s.png")
    with pytest.raises(DataError, match="same shape"):
        plan_grid(_slide(tmp_path), 64, 1.0, regions=read_regions(tmp_path / "s.png"))


def test_one_file_of_regions_is_that_of_one_slide(tmp_path: Path) -> None:
    (tmp_path / "s.geojson").write_text("{}")
    check_regions(str(tmp_path / "s.geojson"), 1)
    for name, count, what in (("s.geojson", 2, "one file for 2 slides"), ("x", 1, "nothing lies")):
        with pytest.raises(ConfigError, match=f"{what}.*; expected a folder"):
            check_regions(str(tmp_path / name), count)


def test_regions_in_collections_count_and_features_without_a_place_do_not(tmp_path: Path) -> None:
    first, second = _feature(_box(0, 0, 64, 64), "a"), _feature(_box(64, 0, 64, 64), " a ")
    second["geometry"] = {"type": "GeometryCollection", "geometries": [
        {"type": "Point", "coordinates": [1, 1]}, second["geometry"]]}  # fmt: skip
    nowhere = {"type": "Feature", "geometry": None, "properties": {}}
    (tmp_path / "s.geojson").write_text(json.dumps([first, second, nowhere]))
    regions = read_regions(tmp_path / "s.geojson")
    names, share = regions.under(np.array([[0, 0], [64, 0], [128, 0]]), (64, 64), (640, 640))
    assert regions.names == ("a",) and names.tolist() == ["a", "a", ""]
    assert share.tolist() == [1.0, 1.0, 0.0]


def test_regions_in_fractions_are_refused_and_some_outside_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    coords = np.array([[0, 0]])
    (tmp_path / "s.geojson").write_text(json.dumps(_feature(_box(0, 0, 0.4, 0.5), "a")))
    with pytest.raises(DataError, match=r"0\.5 pixels wide, so their coordinates are no level-0"):
        read_regions(tmp_path / "s.geojson").under(coords, (64, 64), (640, 640))
    content = [_feature(_box(0, 0, 64, 64), "a"), _feature(_box(900, 0, 64, 64), "b")]
    (tmp_path / "s.geojson").write_text(json.dumps(content))
    read_regions(tmp_path / "s.geojson").under(coords, (64, 64), (640, 640))
    assert "all regions of b lie outside the slide" in caplog.text


def test_mask_pictures_restrict_and_label_tiles(tmp_path: Path) -> None:
    mask = np.zeros((70, 100), np.uint8)
    mask[:, 26:52], mask[:, 52:80] = 3, 7
    Image.fromarray(mask).save(tmp_path / "m.png")
    regions = read_regions(tmp_path / "m.png", {3: "tumor"})
    grid = plan_grid(_slide(tmp_path), 64, 1.0, min_tissue=0, regions=regions)
    assert grid.labels is not None
    assert sorted(set(zip(grid.columns.tolist(), grid.labels.tolist(), strict=True))) == [
        (2, "tumor"), (3, "tumor"), (4, "7"), (5, "7"),
    ]  # fmt: skip
