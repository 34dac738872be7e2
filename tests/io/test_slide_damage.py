"""Bytes changed at random in a slide end in colours or in one message; bombs take no memory."""

from __future__ import annotations

import random
import resource
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from slide_files import shrink, squares, write_ome, write_tiff

from domainssl.errors import DataError, DomainSSLError
from domainssl.io.slide.by_tifffile import TiffPyramid
from domainssl.io.slide.picture import read_tile_picture
from domainssl.io.slide.pyramid import Slide, SlideReading

_TRIES = 60  # per format
RGB = squares(192, 128)


def _damage(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        # headers lie at both ends of a TIFF file
        at = rng.randrange(len(changed)) if rng.random() < 0.5 else rng.randrange(400)
        at = min(at, len(changed) - 1)
        kind = rng.random()
        if kind < 0.6:
            changed[at] = rng.randrange(256)
        elif kind < 0.8:
            changed[at : at + 4] = b"\xff\xff\xff\x7f"
        elif kind < 0.9:
            del changed[at : at + rng.randrange(1, 9)]
        else:
            del changed[at:]
        if not changed:
            break
    return bytes(changed)


def _write(path: Path) -> Path:
    name = path.name
    if name.endswith((".png", ".jpg")):
        Image.fromarray(RGB).save(path)
    elif name.startswith("planes"):
        planes = np.ascontiguousarray(np.moveaxis(RGB, -1, 0))
        write_ome(path, planes, "CYX", (2,), photometric="minisblack")
    elif name.endswith(".ome.tif"):
        write_ome(path, RGB, "YXS", (2,), photometric="rgb")
    elif name == "strips.tif":
        tifffile.imwrite(path, RGB, photometric="rgb", rowsperstrip=16, compression="lzw")
    else:
        codec = {"jpeg.tif": "jpeg", "jp2.tif": "jpeg2000", "plain.tif": None}.get(name, "zlib")
        write_tiff(path, [RGB, shrink(RGB, 2)], compression=codec)
    return path


@pytest.mark.parametrize(
    "name",
    ["zlib.tif", "jpeg.tif", "jp2.tif", "plain.tif", "strips.tif", "a.ome.tif", "planes.ome.tif",
     "a.png", "a.jpg"],
)  # fmt: skip
def test_random_damage_is_one_message_or_colours(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path / name)
    content, rng = path.read_bytes(), random.Random(name)
    for _ in range(_TRIES):
        path.write_bytes(_damage(content, rng))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                with Slide(path, SlideReading(mpp_um=0.5)) as slide:
                    rgb, valid = slide.read(32, 32, 64, 1.0)
                    small, _, _ = slide.overview(32)
            except DomainSSLError as error:
                assert "\n" not in str(error)
                assert name in str(error)
                continue
        assert (rgb.shape, rgb.dtype) == ((64, 64, 3), np.uint8)
        assert (rgb[~valid] == 255).all()
        assert max(small.shape[:2]) <= 32


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("name", ["zlib.tif", "a.ome.tif"])
def test_slide_that_is_cut_off_never_shows_made_up_colours(
    tmp_path: Path, name: str, share: float
) -> None:
    path = _write(tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    try:
        slide = Slide(path, SlideReading(mpp_um=0.5))
        rgb, valid = slide.read_box((0, 0, 192, 128), (192, 128))
    except DataError as error:
        assert name in str(error)
        return
    assert (rgb[valid] == RGB[valid]).all()
    assert bool(slide.damaged) == (not valid.all())


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _bomb(path: Path, payload: bytes, **tags: Any) -> Path:
    """Replace the first stored tile of an OME-TIFF (which tifffile reads) by other bytes."""
    write_ome(path, RGB, "YXS", (), photometric="rgb", **tags)
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        offsets, counts = page.tags["TileOffsets"], page.tags["TileByteCounts"]
        places, sizes = list(page.dataoffsets), list(page.databytecounts)
    with path.open("r+b") as stream:
        stream.seek(0, 2)
        places[0], sizes[0] = stream.tell(), len(payload)
        stream.write(payload)
    with tifffile.TiffFile(path, mode="r+b") as file:
        page = file.pages[0]
        page.tags[offsets.code].overwrite(places)
        page.tags[counts.code].overwrite(sizes)
    return path


def test_tile_that_unfolds_to_gigabytes_is_damaged(tmp_path: Path) -> None:
    packer = zlib.compressobj(9)
    chunk = bytes(2**20)
    payload = b"".join(packer.compress(chunk) for _ in range(700)) + packer.flush()
    path = _bomb(tmp_path / "bomb.ome.tif", payload)
    before = _peak_mb()
    slide = Slide(path)
    _, valid = slide.read(0, 0, 128, 0.25)
    assert _peak_mb() - before < 200
    assert (~valid).sum() == 64 * 64
    assert [(d.x, d.y) for d in slide.damaged] == [(0, 0)]
    assert "unfolds to more" in slide.damaged[0].reason


@pytest.mark.parametrize("kind", ["jpeg", "jpeg2000", "webp"])
def test_tile_that_states_another_size_is_damaged(tmp_path: Path, kind: str) -> None:
    import imagecodecs

    encode = {"jpeg": imagecodecs.jpeg_encode, "jpeg2000": imagecodecs.jpeg2k_encode,
              "webp": imagecodecs.webp_encode}[kind]  # fmt: skip
    large = np.zeros((2048, 1024, 3), np.uint8)
    path = _bomb(tmp_path / "bomb.ome.tif", encode(large), compression=kind)
    slide = Slide(path)
    _, valid = slide.read(0, 0, 128, 0.25)
    assert (~valid).sum() == 64 * 64
    assert "states 1024 x 2048 pixels" in slide.damaged[0].reason


@pytest.mark.parametrize(
    ("compression", "said"),
    [("zlib", "tiled pyramid: vips tiffsave"), (None, "take 10800000000 bytes, and holds")],
)
def test_pieces_that_are_too_large_are_refused_before_they_are_read(
    tmp_path: Path, compression: Any, said: str
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", rowsperstrip=128, compression=compression)
    with tifffile.TiffFile(path, mode="r+b") as file:
        page = file.pages[0]
        for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            page.tags[tag].overwrite(60_000)
    with pytest.raises(DataError, match=rf"a\.tif.*60000.*{said}"):
        TiffPyramid(str(path))
    with pytest.raises(DataError, match=r"a\.tif"):
        read_tile_picture(path)


def test_entities_of_xml_are_refused(tmp_path: Path) -> None:
    text = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "b">]><OME>&a;</OME>'
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb", description=text, metadata=None)
    with pytest.raises(DataError, match=r"a\.tif.*entities"):
        Slide(tmp_path / "a.tif").read(0, 0, 64, 0.5)


def test_planes_in_other_files_are_never_opened(tmp_path: Path) -> None:
    """A file that OME-XML names is not followed, here or elsewhere."""
    base = np.stack([np.full((64, 64), n, np.uint8) for n in range(3)])
    path = write_ome(tmp_path / "a" / "a.ome.tif", base, "CYX", (), photometric="minisblack")
    with tifffile.TiffFile(path) as file:
        text = file.ome_metadata
    assert text is not None
    named = '<UUID FileName="../secret.tif">urn:uuid:0</UUID></TiffData>'
    with tifffile.TiffFile(path, mode="r+b") as file:
        moved = text.replace("/>\n", ">" + named, 1) if "<TiffData" in text else text
        file.pages[0].tags["ImageDescription"].overwrite(moved)
    tifffile.imwrite(tmp_path / "secret.tif", np.full((64, 64), 99, np.uint8))
    try:
        values, _ = Slide(path).read_channels(0, 0, 64, 0.25)
    except DataError as error:
        assert "a.ome.tif" in str(error)
    else:
        assert not (values == 99).any()


def test_a_header_that_states_more_than_it_has_tiles_for_is_refused(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [RGB])  # OpenSlide: one tile, the rest transparent
    with tifffile.TiffFile(path, mode="r+b") as file:
        page = file.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        page.tags["ImageWidth"].overwrite(20_000)
    with pytest.raises(DataError, match=r"states 20000 x 128 pixels, but has places for 6 of 626"):
        Slide(path).read(0, 0, 64, 0.5)
