"""Tile pictures in every mode become RGB uint8 on white."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from domainssl.errors import DataError
from domainssl.io.slide import picture
from domainssl.io.slide.picture import picture_facts, read_label_picture, read_tile_picture

Array = np.ndarray[Any, Any]
QUARTERS = np.array([[(200, 60, 80), (90, 40, 160)], [(230, 200, 210), (20, 120, 60)]], np.uint8)
RGB = QUARTERS.repeat(24, 0).repeat(32, 1)  # 48 x 64
GREY = RGB[..., 0]
ALPHA = np.full((48, 64), 255, np.uint8)
ALPHA[24:, 32:] = 0
SHOWN = np.where(ALPHA[..., None] == 255, RGB, 255)


def _palette() -> Image.Image:
    found = Image.new("P", (64, 48))
    found.putpalette([*QUARTERS[0, 0], *QUARTERS[0, 1], *QUARTERS[1, 0], 0, 0, 0])
    found.putdata(np.arange(4).reshape(2, 2).repeat(24, 0).repeat(32, 1).ravel().tolist())
    return found


def _write(path: Path, name: str) -> None:
    import tifffile

    hidden = RGB * (ALPHA[..., None] == 255)
    plain: dict[str, Any] = {"metadata": None, "software": False}
    if name == "rgba.png":
        Image.fromarray(np.dstack([hidden, ALPHA])).save(path)
    elif name == "palette.png":
        _palette().save(path, transparency=3)
    elif name == "grey_alpha.png":
        Image.fromarray(np.dstack([hidden[..., 0], ALPHA])).save(path)
    elif name == "key.png":  # one colour stands for nothing
        Image.fromarray(RGB).save(path, transparency=tuple(map(int, QUARTERS[1, 1])))
    elif name == "rgba.tif":
        tifffile.imwrite(path, np.dstack([hidden, ALPHA]), photometric="rgb", extrasamples=[2],
                         **plain)  # fmt: skip
    elif name == "premultiplied.tif":
        tifffile.imwrite(path, np.dstack([hidden, ALPHA]), photometric="rgb", extrasamples=[1],
                         **plain)  # fmt: skip
    elif name == "grey.png":
        Image.fromarray(GREY).save(path)
    elif name == "grey16.png":
        Image.fromarray(GREY.astype(np.uint16) * 257).save(path)
    elif name == "grey16.tif":
        tifffile.imwrite(path, GREY.astype(np.uint16) * 257, photometric="minisblack", **plain)
    elif name == "white_is_zero.tif":
        tifffile.imwrite(path, 255 - GREY, photometric="miniswhite", **plain)
    elif name == "rgb16.tif":
        tifffile.imwrite(path, RGB.astype(np.uint16) * 257, photometric="rgb", **plain)
    elif name == "planes.tif":
        tifffile.imwrite(path, np.ascontiguousarray(RGB.transpose(2, 0, 1)), photometric="rgb",
                         planarconfig="separate", **plain)  # fmt: skip
    elif name == "lzw.tif":
        Image.fromarray(RGB).save(path, compression="tiff_lzw")
    elif name == "palette.tif":
        _palette().convert("RGB").quantize(4).save(path)
    elif name == "rgb.bmp":
        Image.fromarray(RGB).save(path)
    else:
        Image.fromarray(RGB).save(path, lossless=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rgba.png", SHOWN), ("palette.png", SHOWN), ("key.png", SHOWN), ("rgba.tif", SHOWN),
        ("premultiplied.tif", SHOWN), ("grey_alpha.png", np.repeat(SHOWN[..., :1], 3, -1)),
        ("grey.png", np.repeat(GREY[..., None], 3, -1)),
        ("grey16.png", np.repeat(GREY[..., None], 3, -1)),
        ("grey16.tif", np.repeat(GREY[..., None], 3, -1)),
        ("white_is_zero.tif", np.repeat(GREY[..., None], 3, -1)),
        ("rgb16.tif", RGB), ("planes.tif", RGB), ("lzw.tif", RGB), ("rgb.bmp", RGB),
        ("rgb.webp", RGB),
    ],
)  # fmt: skip
def test_every_mode_is_read_as_it_is_shown(tmp_path: Path, name: str, expected: Array) -> None:
    _write(tmp_path / name, name)
    rgb, valid = read_tile_picture(tmp_path / name)
    assert (rgb.dtype, rgb.shape) == (np.uint8, (48, 64, 3))
    assert np.abs(rgb.astype(int) - expected).max() <= 1
    has_hole = "alpha" in name or expected is SHOWN
    assert valid.mean() == (0.75 if has_hole else 1.0)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_rotation_of_exif_is_applied(tmp_path: Path, name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / name
    Image.fromarray(RGB).save(path, quality=97, subsampling=0, exif=exif)
    turned = {
        2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, -1), 7: RGB[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(RGB),
    }[orientation]  # fmt: skip
    rgb, _ = read_tile_picture(path)
    assert picture_facts(path).size == rgb.shape[1::-1]
    assert np.abs(rgb[4::8, 4::8].astype(int) - turned[4::8, 4::8]).max() <= 3


@pytest.mark.parametrize("bits", [4, 6, 10, 12, 14])
def test_numbers_of_fewer_bits_are_scaled(tmp_path: Path, bits: int) -> None:
    import tifffile

    path, most = tmp_path / "a.tif", 2**bits - 1
    stored = (RGB.astype(np.uint32) * most // 255).astype(np.uint8 if bits < 8 else np.uint16)
    tifffile.imwrite(path, stored, photometric="rgb", bitspersample=bits, metadata=None)
    rgb, _ = read_tile_picture(path)
    assert np.abs(rgb.astype(float) - stored * (255 / most)).max() <= 0.5


def test_grey_with_transparency_is_laid_on_white(tmp_path: Path) -> None:
    """As a TIFF of two channels, and as 16 bit with one number that stands for nothing."""
    import tifffile

    expected = np.repeat(SHOWN[..., :1], 3, -1)
    tifffile.imwrite(tmp_path / "a.tif", np.dstack([GREY, ALPHA]), photometric="minisblack",
                     planarconfig="contig", extrasamples=[2], metadata=None)  # fmt: skip
    picture = Image.fromarray(GREY.astype(np.uint16) * 257)
    picture.save(tmp_path / "a.png", transparency=int(QUARTERS[1, 1, 0]) * 257)
    for name in ("a.tif", "a.png"):
        rgb, valid = read_tile_picture(tmp_path / name)
        assert (rgb == expected).all()
        assert valid.mean() == 0.75


def test_cmyk_is_converted(tmp_path: Path) -> None:
    Image.fromarray(RGB).convert("CMYK").save(tmp_path / "a.jpg", quality=97)
    rgb, _ = read_tile_picture(tmp_path / "a.jpg")
    assert np.abs(rgb.reshape(-1, 3).mean(0) - RGB.reshape(-1, 3).mean(0)).max() < 3


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_damage_is_one_message_that_names_the_file(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=name) as caught:
        read_tile_picture(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"P6\n1 1\n255\n000", b"\x89PNG", b"GIF89a"])
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png"):
        read_tile_picture(tmp_path / "a.png")


def test_size_is_judged_before_pixels_are_made(tmp_path: Path, monkeypatch: Any) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    monkeypatch.setattr(picture, "_MOST_PIXELS", 1000)
    with pytest.raises(DataError, match="64 x 48 pixels"):
        read_tile_picture(tmp_path / "a.png")


def test_floats_are_no_colours(tmp_path: Path) -> None:
    import tifffile

    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 8), np.float32))
    with pytest.raises(DataError, match=r"a\.tif.*float32"):
        read_tile_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["m.png", "m16.png", "p.png", "m.tif"])
def test_labels_are_the_stored_numbers(tmp_path: Path, name: str) -> None:
    labels = np.arange(4, dtype=np.uint8).reshape(2, 2).repeat(24, 0).repeat(32, 1)
    if name == "p.png":
        _palette().save(tmp_path / name)
    else:
        Image.fromarray(labels.astype(np.uint16) if "16" in name else labels).save(tmp_path / name)
    assert (read_label_picture(tmp_path / name) == labels).all()
