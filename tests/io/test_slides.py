"""Slides: resolution, levels, places, edges, damage, colours."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from slide_files import damage_tile, shrink, squares, write_ome, write_tiff

from domainssl.errors import ConfigError, DataError
from domainssl.io.slide.facts import level_factors
from domainssl.io.slide.pyramid import Slide, SlideReading, describe_slide, list_slides

Array = np.ndarray[Any, Any]


def _mean(rgb: Array) -> Array:
    return rgb.reshape(-1, 3).astype(float).mean(0)


@pytest.mark.parametrize("unit", ["CENTIMETER", "INCH"])
def test_resolution_is_read_per_centimetre_and_per_inch(tmp_path: Path, unit: str) -> None:
    rgb = squares(512, 384)
    path = write_tiff(tmp_path / "a.tif", [rgb], unit=unit)
    with Slide(path) as slide:
        assert slide.facts.mpp == pytest.approx((0.5, 0.5))
        tile, valid = slide.read(192, 64, 32, 1.0)
    assert valid.all()
    assert np.abs(_mean(tile) - _mean(rgb[64:128, 192:256])).max() < 0.6


@pytest.mark.parametrize(
    ("mpp", "unit"),
    [
        ((0.5, 0.5), "NONE"), (None, "INCH"), ((352.8, 352.8), "INCH"), ((1e4, 1e4), "CENTIMETER"),
        ((0.025, 0.025), "CENTIMETER"), ((0.5, 12.0), "CENTIMETER"),
    ],
)  # fmt: skip
def test_resolution_that_does_not_count_names_its_override(
    tmp_path: Path, mpp: tuple[float, float] | None, unit: str
) -> None:
    rgb = squares(512, 384)
    path = write_tiff(tmp_path / "a.tif", [rgb], mpp=mpp, unit=unit)
    slide = Slide(path)
    assert slide.facts.mpp is None
    with pytest.raises(DataError, match=r"a\.tif.*mpp_um"):
        slide.read(0, 0, 32, 1.0)
    tile, _ = Slide(path, SlideReading(mpp_um=0.5)).read(320, 256, 32, 1.0)
    assert np.abs(_mean(tile) - _mean(rgb[256:320, 320:384])).max() < 0.6


@pytest.mark.parametrize("tile", [(64, 64), None])
@pytest.mark.parametrize(("unit", "pixels"), [("micron", 2.0), ("\\u00B5m", 2.0), ("mm", 2000.0)])
def test_the_unit_that_imagej_states_beside_its_resolution_counts(
    tmp_path: Path, unit: str, pixels: float, tile: Any
) -> None:
    tifffile = pytest.importorskip("tifffile")
    for name, text in (("a.tif", f"ImageJ=1.53t\nunit={unit}\n"), ("b.tif", f"unit={unit}\n")):
        tifffile.imwrite(tmp_path / name, squares(128, 128), tile=tile, photometric="rgb",
                         resolution=(pixels, 2 * pixels), resolutionunit=1, description=text,
                         metadata=None)  # fmt: skip
    assert Slide(tmp_path / "a.tif").facts.mpp == pytest.approx((0.5, 0.25))
    assert Slide(tmp_path / "b.tif").facts.mpp is None  # of another program


@pytest.mark.parametrize("value", [0.0, -1.0, 352.8, float("nan"), True])
def test_override_is_held_to_the_same_range(value: float) -> None:
    with pytest.raises(ConfigError, match=r"mpp_um.*0\.05 and 10"):
        SlideReading(mpp_um=value)


def test_pixels_that_are_not_square_are_resampled_per_axis(tmp_path: Path) -> None:
    rgb = squares(512, 512)
    path = write_tiff(tmp_path / "a.tif", [rgb], mpp=(0.5, 0.25))
    slide = Slide(path)
    assert any("square" in text for text in slide.facts.warnings)
    tile, valid = slide.read(0, 0, 64, 1.0)  # 128 columns, 256 rows of level 0
    assert valid.all()
    assert np.flatnonzero(np.diff(tile[8, :, 0].astype(int))).tolist() == [31]
    assert np.flatnonzero(np.diff(tile[:, 8, 1].astype(int))).tolist() == [15, 31, 47]


def test_levels_whose_last_pixel_is_cut_off_do_not_drift() -> None:
    assert level_factors(((4443, 3567), (2221, 1783))) == ((1, 1), (2, 2))
    assert level_factors(((1003, 701), (250, 175), (62, 43))) == ((1, 1), (4, 4), (16, 16))
    assert level_factors(((1000, 800), (400, 320)))[1] == (2.5, 2.5)


@pytest.mark.parametrize(("target", "factor"), [(0.5, 1), (1.0, 2), (2.0, 4), (1.3, 2.6)])
def test_edges_are_white_and_not_valid_and_squares_lie_where_they_belong(
    tmp_path: Path, target: float, factor: float
) -> None:
    rgb = squares(1003, 701)
    path = write_tiff(tmp_path / "odd.tif", [rgb, shrink(rgb, 4), shrink(rgb, 16)])
    side = round(64 * factor)
    with Slide(path) as slide:
        for x, y in ((0, 0), (512, 256), (896 // side * side, 640 // side * side)):
            tile, valid = slide.read(x, y, 64, target)
            inside = rgb[y : y + side, x : x + side]
            assert np.abs(tile[valid].astype(float).mean(0) - _mean(inside)).max() < 1.5
            assert abs(valid.mean() - inside[..., 0].size / side**2) < 0.03
            assert (tile[~valid] == 255).all()
        nothing, valid = slide.read(2000, 2000, 64, target)
    assert (nothing == 255).all()
    assert not valid.any()


def test_tile_that_starts_before_the_slide_is_white_there(tmp_path: Path) -> None:
    rgb = squares(256, 256)
    tile, valid = Slide(write_tiff(tmp_path / "a.tif", [rgb])).read(-32, -16, 64, 0.5)
    assert (tile[:16] == 255).all()
    assert (tile[:, :32] == 255).all()
    assert not valid[:16].any()
    assert not valid[:, :32].any()
    assert (tile[16:, 32:] == rgb[:48, :32]).all()


def test_nothing_is_enlarged_unless_asked_for(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [squares(256, 256)])
    with pytest.raises(DataError, match="allow_upsample"):
        Slide(path).read(0, 0, 64, 0.25)
    tile, _ = Slide(path, SlideReading(allow_upsample=True)).read(0, 0, 64, 0.25)
    assert np.abs(tile.astype(int) - squares(32, 32)[0, 0]).max() == 0


@pytest.mark.parametrize("unit", ["µm", "mm", "nm"])
def test_ome_levels_and_resolution_are_found(tmp_path: Path, unit: str) -> None:
    rgb, size = squares(768, 512), {"µm": 0.25, "mm": 0.00025, "nm": 250.0}[unit]
    stated = {f"PhysicalSize{a}{u}": v for a in "XY" for u, v in (("", size), ("Unit", unit))}
    path = write_ome(tmp_path / "a.ome.tif", rgb, "YXS", metadata=stated, photometric="rgb")
    with Slide(path) as slide:
        facts = slide.facts
        assert (facts.backend, facts.mpp) == ("tifffile", pytest.approx((0.25, 0.25)))
        assert facts.levels == ((768, 512), (384, 256), (192, 128))
        tile, valid = slide.read(640, 384, 64, 0.5)
    assert valid.all()
    assert np.abs(_mean(tile) - _mean(rgb[384:512, 640:768])).max() < 0.6


def test_levels_in_subifds_are_found_without_ome(tmp_path: Path) -> None:
    rgb = squares(512, 384)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        shared = {"photometric": "rgb", "tile": (64, 64), "metadata": None}
        writer.write(rgb, subifds=1, resolution=(2e4, 2e4), resolutionunit=3, **shared)
        writer.write(shrink(rgb, 2), subfiletype=1, **shared)
    facts = describe_slide(tmp_path / "a.tif")
    assert (facts.backend, facts.levels) == ("tifffile", ((512, 384), (256, 192)))
    assert facts.mpp == pytest.approx((0.5, 0.5))


def test_colours_as_planes_are_the_same_colours(tmp_path: Path) -> None:
    rgb = squares(768, 512)
    planes = np.ascontiguousarray(np.moveaxis(rgb, -1, 0))
    named = {"Channel": {"Name": ["Red", "Green", "Blue"]}}
    path = write_ome(
        tmp_path / "a.ome.tif", planes, "CYX", metadata=named, photometric="minisblack"
    )
    tile, _ = Slide(path).read(256, 128, 64, 0.5)
    assert np.abs(_mean(tile) - _mean(rgb[128:256, 256:384])).max() < 0.6


@pytest.mark.parametrize("count", [2, 3, 5])
def test_multiplex_is_no_rgb_and_names_its_channels(tmp_path: Path, count: int) -> None:
    names = ["DAPI", "CD3", "CD8", "CD20", "panCK"][:count]
    values = np.stack([np.full((256, 256), 1000 * (n + 1), np.uint16) for n in range(count)])
    path = write_ome(
        tmp_path / "m.ome.tif", values, "CYX", metadata={"Channel": {"Name": names}},
        photometric="minisblack",
    )  # fmt: skip
    slide = Slide(path)
    assert slide.facts.channels == tuple(names)
    assert slide.facts.dtype == "uint16"
    with pytest.raises(DataError, match=r"m\.ome\.tif.*DAPI"):
        slide.read(0, 0, 64, 0.25)
    stored, valid = slide.read_channels(0, 0, 64, 0.5)
    assert valid.all()
    assert stored.reshape(-1, count).mean(0).tolist() == [1000 * (n + 1) for n in range(count)]


def test_channels_without_ome_are_no_colours_of_the_first_one(tmp_path: Path) -> None:
    """OpenSlide opens the first of them as a grey slide without an error."""
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for n in range(4):
            writer.write(np.full((128, 128), 900 * n, np.uint16), tile=(64, 64), metadata=None)
    with pytest.raises(DataError, match=r"a\.tif"):
        Slide(tmp_path / "a.tif", SlideReading(mpp_um=0.5)).read(0, 0, 64, 0.5)


@pytest.mark.parametrize("tile", [(64, 64), None])
def test_a_fourth_channel_that_is_not_said_to_be_alpha_hides_nothing(
    tmp_path: Path, tile: tuple[int, int] | None
) -> None:
    path = tmp_path / "a.tif"
    pixels = np.dstack([np.full((128, 128, 3), 90, np.uint8), np.zeros((128, 128), np.uint8)])
    tifffile.imwrite(path, pixels, photometric="rgb", extrasamples=["unspecified"], tile=tile,
                     resolution=(20000, 20000), resolutionunit=3, metadata=None)  # fmt: skip
    with Slide(path) as slide:
        values, valid = slide.read(0, 0, 64, 0.5)
        assert valid.all() and (values == 90).all()
        assert "not said to be alpha" in slide.facts.warnings[0]


def test_sixteen_bit_colours_are_scaled(tmp_path: Path) -> None:
    rgb = squares(256, 128)
    path = write_tiff(tmp_path / "a.tif", [rgb.astype(np.uint16) * 257])
    tile, _ = Slide(path).read(64, 0, 64, 0.5)
    assert (tile == rgb[:64, 64:128]).all()


@pytest.mark.parametrize("name", ["damaged.tif", "damaged.ome.tif"])
def test_damaged_tile_is_named_and_the_rest_is_read(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    rgb, path = squares(640, 384), tmp_path / name
    if "ome" in name:
        write_ome(path, rgb, "YXS", (), photometric="rgb")
    else:
        write_tiff(path, [rgb], mpp=(0.25, 0.25))
    damage_tile(path, 320, 128)
    with Slide(path) as slide, caplog.at_level(logging.WARNING):
        tile, valid = slide.read(320, 128, 64, 0.25)
        assert not valid.any()
        assert (tile == 255).all()
        seen = 0
        for x in range(0, 640, 64):
            for y in range(0, 384, 64):
                tile, valid = slide.read(x, y, 64, 0.25)
                seen += bool(valid.all()) and bool((tile == rgb[y : y + 64, x : x + 64]).all())
        whole, valid = slide.read(256, 64, 192, 0.25)
    assert seen == 59
    assert [(d.x, d.y) for d in slide.damaged] == [(320, 128)]
    assert "320, 128" in caplog.text
    assert (~valid).sum() == 64 * 64
    assert (whole[valid] == rgb[64:256, 256:448][valid]).all()


def test_slide_that_is_mostly_damaged_is_given_up(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [squares(640, 640)])
    for y in range(0, 640, 64):
        for x in range(0, 640, 64):
            damage_tile(path, x, y)
    slide = Slide(path)
    with pytest.raises(DataError, match=r"a\.tif: 64 stored tiles.*\(0, 0\)"):
        for at in range(100):
            slide.read(at % 10 * 64, at // 10 * 64, 64, 0.5)


def test_slide_with_many_damaged_tiles_among_more_good_ones_is_read(tmp_path: Path) -> None:
    """One read of 1,024 stored tiles that meets 70 damaged ones is no reason to give up."""
    rgb = squares(2048, 2048, cell=256)
    path = write_tiff(tmp_path / "a.tif", [rgb])
    damaged = [(x, y) for y in range(0, 640, 64) for x in range(0, 448, 64)]
    for x, y in damaged:
        damage_tile(path, x, y)
    with Slide(path) as slide:
        picture, valid, _ = slide.overview(512)
        last, seen = slide.read(1984, 1984, 64, 0.5)
    assert len(slide.damaged) == len(damaged) == 70
    assert (~valid).sum() == 70 * 16 * 16
    assert (picture[valid] == shrink(rgb, 4)[valid]).all()
    assert seen.all()
    assert (last == rgb[1984:, 1984:]).all()


@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
def test_orientation_of_a_slide_turns_no_stored_tile(tmp_path: Path, orientation: int) -> None:
    """OpenSlide turns every tile within itself."""
    rgb = squares(192, 128, cell=16)
    tag = [(274, 3, 1, orientation, True)]
    path = write_tiff(tmp_path / "a.tif", [rgb], extratags=tag)
    with Slide(path) as slide:
        tile, _ = slide.read(64, 64, 64, 0.5)
        assert slide.facts.warnings[-1].startswith(f"orientation {orientation} is not applied")
    assert (tile == rgb[64:128, 64:128]).all()


@pytest.mark.parametrize("compression", ["webp", "jpeg2000", "lzma"])
def test_compressions_that_openslide_lacks_are_read(tmp_path: Path, compression: str) -> None:
    rgb = squares(256, 128)
    path = write_tiff(tmp_path / "a.tif", [rgb], compression=compression)
    with Slide(path) as slide:
        tile, valid = slide.read(64, 0, 128, 0.5)
        assert slide.facts.backend == "tifffile"
    assert valid.all()
    assert np.abs(tile.astype(int) - rgb[:128, 64:192]).max() <= 1


def test_compression_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [squares(128, 128)], compression="png")
    with pytest.raises(DataError, match=r"a\.tif: compression PNG is not read"):
        describe_slide(path)


def test_large_parts_are_read_in_bounded_pieces(tmp_path: Path, monkeypatch: Any) -> None:
    from domainssl.io.slide import pyramid

    rgb = squares(640, 384)
    path = write_tiff(tmp_path / "a.tif", [rgb])
    whole, _ = Slide(path).read_box((0, 0, 640, 384), (160, 96))
    monkeypatch.setattr(pyramid, "_MOST_READ", 5000)
    parts, valid = Slide(path).read_box((0, 0, 640, 384), (160, 96))
    assert valid.all()
    assert (whole == parts).all()
    assert (whole == shrink(rgb, 4)).all()


@pytest.mark.parametrize(
    "layout",
    [
        {}, {"rowsperstrip": 96}, {"rowsperstrip": 97}, {"byteorder": ">"},
        {"compression": "zlib", "rowsperstrip": 16},
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_rows_that_are_stored_whole_are_read_a_few_at_a_time(
    tmp_path: Path, monkeypatch: Any, layout: dict[str, Any], dtype: str
) -> None:
    from domainssl.io.slide import pyramid, tiff_pages

    rgb = squares(640, 384)
    pixels = rgb if dtype == "uint8" else rgb.astype(np.uint16) * 257
    more = {"resolution": (20_000, 20_000), "resolutionunit": 3, "photometric": "rgb", **layout}
    tifffile.imwrite(tmp_path / "a.tif", pixels, **more)
    monkeypatch.setattr(tiff_pages, "_PIECE", 640 * 3 * 40)
    monkeypatch.setattr(pyramid, "_MOST_READ", 5000)
    read: list[int] = []
    plain = pyramid.TiffPyramid._decode
    monkeypatch.setattr(
        pyramid.TiffPyramid, "_decode", lambda *a: (read.append(a[-1]), plain(*a))[1]
    )
    slide = Slide(tmp_path / "a.tif")
    found, valid = slide.read_box((0, 0, 640, 384), (160, 96))
    assert valid.all() and (found == shrink(rgb, 4)).all()
    assert slide.facts.tile_size[1] <= 40 and len(read) == len(set(read))  # none is read twice
    tile, _ = slide.read(300, 200, 64, 0.5)
    assert (tile == rgb[200:264, 300:364]).all()


def test_the_cost_of_a_large_slide_of_one_level_is_told_and_paid_once(
    tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    from domainssl.io.slide import facts, pyramid

    path = write_tiff(tmp_path / "a.tif", [squares(1024, 768)])
    plain, _, _ = Slide(path).overview(64)
    assert not Slide(path).facts.cost and not caplog.text
    monkeypatch.setattr(facts, "_LARGE", 2**16)
    monkeypatch.setattr(pyramid, "_MOST_KEPT", 256)
    with Slide(path) as slide:
        fine, seen, _ = slide.overview(256)
        monkeypatch.setattr(Slide, "read_box", lambda *a: pytest.fail("it is read again"))
        coarse, valid, down = slide.overview(100, 4.0)
    assert fine.shape == (192, 256, 3) and seen.all() and valid.all()
    assert coarse.shape == (75, 100, 3) and down == (10.24, 10.24)
    assert np.abs(_mean(coarse) - _mean(plain)).max() < 1
    assert caplog.text.count("has one level of 1024 x 768 pixels: the search for tissue and") == 1
    assert "vips tiffsave" in caplog.text


def test_objective_power_is_used_only_on_request(tmp_path: Path) -> None:
    text = "Aperio Image Library v1\r\n512x384 [0,0 512x384] (64x64) |AppMag = 20"
    path = write_tiff(tmp_path / "a.svs", [squares(512, 384)], mpp=None, description=text)
    with pytest.raises(DataError, match=r"mpp_from: objective_power"):
        describe_slide(path).resolution()
    facts = describe_slide(path, SlideReading(mpp_from="objective_power"))
    assert (facts.mpp, facts.mpp_source) == ((0.5, 0.5), "objective_power")


def test_slides_travel_to_other_processes_without_their_handle(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [squares(256, 256)])
    slide = Slide(path)
    first, _ = slide.read(0, 0, 64, 0.5)
    again, _ = pickle.loads(pickle.dumps(slide)).read(0, 0, 64, 0.5)
    assert (first == again).all()


def test_no_other_file_is_opened(tmp_path: Path) -> None:
    """OME-XML may name other files, and the index of MIRAX names those with pixels."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "Slidedat.ini").write_text("[DATAFILE]\nFILE_COUNT = 1\nFILE_0 = ../x.dat\n")
    (tmp_path / "a.mrxs").write_bytes(b"\xff\xd8\xff")
    from domainssl.io.slide.by_openslide import OpenSlidePyramid

    with pytest.raises(DataError, match=r"'\.\./x\.dat', expected a file beside it"):
        OpenSlidePyramid(str(tmp_path / "a.mrxs"))


def test_the_index_of_a_slide_without_its_files_is_no_picture_of_it(tmp_path: Path) -> None:
    Image.fromarray(squares(128, 64)).save(tmp_path / "a.mrxs", "JPEG")  # as MIRAX has it
    with pytest.raises(DataError, match=r"a\.mrxs: the folder beside it with Slidedat\.ini is not"):
        describe_slide(tmp_path / "a.mrxs")
    (tmp_path / "b.svs").write_text("<!DOCTYPE html><title>Log in</title>")
    with pytest.raises(DataError, match=r"b\.svs: no slide\. It holds a page of a web server"):
        describe_slide(tmp_path / "b.svs")


def test_folders_are_listed_without_hidden_files_and_dead_links(tmp_path: Path) -> None:
    write_tiff(tmp_path / "b" / "x.tif", [squares(64, 64)])
    (tmp_path / "._x.svs").write_bytes(b"")
    (tmp_path / "dead.svs").symlink_to("nowhere")
    assert list_slides(tmp_path) == [str(tmp_path / "b" / "x.tif")]
    with pytest.raises(DataError, match="a link to a file that is not there"):
        describe_slide(tmp_path / "dead.svs")
