"""The verb `tile`: grids, pictures and ids of slides, in pieces."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openslide
import pyarrow.parquet
import pytest
import tifffile
from PIL import Image
from processes import killed
from slide_files import damage_tile, write_ome, write_tiff

from domainssl.cli import main
from domainssl.errors import DataError
from domainssl.inference.slide_inputs import named_slides
from domainssl.inspection.slides import inspect_slides

NAMES = ("miller/A-1.tif", "miller/A-2.tif", "smith/B-1.tif")


def _slide(path: Path, seed: int = 0, **more: Any) -> Path:
    """Pink tissue of 384 x 256 pixels at (128, 64) on glass of 640 x 448."""
    rng = np.random.default_rng(seed)
    rgb = np.full((448, 640, 3), (243, 241, 242)) + rng.integers(-2, 3, (448, 640, 3))
    rgb[64:320, 128:512] = np.array((200, 110, 170)) + rng.integers(-9, 10, (256, 384, 3))
    return write_tiff(path, [rgb.astype(np.uint8)], **more)


@pytest.fixture
def slides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOMAINSSL_CACHE", str(tmp_path / "cache"))
    for seed, name in enumerate(NAMES):
        _slide(tmp_path / "slides" / name, seed)
    return tmp_path / "slides"


def _tile(slides: Path, output: Path, *more: str) -> int:
    words = ["--mpp", "1.0", "--size", "64", "--min_tissue", "0.4", "--jobs", "0", *more]
    return main(["tile", str(slides), "--output", str(output), *words])


def _ids(output: Path) -> list[str]:
    return sorted(path.stem for path in (output / "slides").glob("*.json"))


def test_grid_is_written_as_table_coordinates_and_picture(slides: Path, tmp_path: Path) -> None:
    assert _tile(slides, tmp_path / "out", "--ids", "plain") == 0
    assert _ids(tmp_path / "out") == [n.removesuffix(".tif").replace("/", "__") for n in NAMES]
    key = "miller__A-1"
    table = pyarrow.parquet.read_table(tmp_path / "out" / "tiles" / f"{key}.parquet").to_pydict()
    wanted = [(x, y) for y in (0, 128, 256) for x in (128, 256, 384)]
    assert list(zip(table["x"], table["y"], strict=True)) == wanted
    assert list(zip(table["row"], table["column"], strict=True)) == [
        (y // 128, x // 128) for x, y in wanted
    ]
    assert set(table["slide_id"]) == {key}
    assert set(table["size_level0"]) == {128}
    assert min(table["tissue_fraction"]) >= 0.4
    with h5py.File(tmp_path / "out" / "patches" / f"{key}_patches.h5") as file:
        coords = file["coords"]
        assert coords[:].tolist() == [list(place) for place in wanted]
        facts = dict(coords.attrs)
    assert (facts["patch_size"], facts["patch_size_level0"]) == (64, 128)
    assert (facts["level0_magnification"], facts["target_magnification"]) == (20, 10)
    assert (facts["level0_width"], facts["level0_height"], facts["overlap"]) == (640, 448, 0)
    with Image.open(tmp_path / "out" / "thumbnails" / f"{key}.png") as picture:
        assert picture.size[0] >= 640
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert (np.abs(pixels - (10, 150, 70)).sum(-1) < 20).sum() > 500, "the outline is drawn"


def test_names_are_hashed_and_written_nowhere(slides: Path, tmp_path: Path) -> None:
    table = tmp_path / "ids.csv"
    assert _tile(slides, tmp_path / "out", "--id_table", str(table)) == 0
    for path in (tmp_path / "out").rglob("*"):
        assert not any(word in path.name for word in ("miller", "smith", "A-1", "B-1"))
        if path.is_file():
            content = path.read_bytes()
            assert not any(word in content for word in (b"miller", b"smith"))
    rows = [line.split(",") for line in table.read_text().splitlines()]
    assert sorted(row[0] for row in rows[1:]) == _ids(tmp_path / "out")
    assert {os.path.relpath(row[1], slides) for row in rows[1:]} == set(NAMES)
    assert table.stat().st_mode & 0o077 == 0


def test_what_is_done_is_not_done_again_and_other_options_are_refused(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert _tile(slides, output, "--shard", "1/2") == 0
    assert "missing: 2/2" in capsys.readouterr().out
    first = {key: (output / "slides" / f"{key}.json").stat().st_mtime_ns for key in _ids(output)}
    assert len(first) == 2
    assert _tile(slides, output) == 0
    assert "3 slides with 27 tiles" in capsys.readouterr().out
    assert len(_ids(output)) == 3
    for key, time in first.items():
        assert (output / "slides" / f"{key}.json").stat().st_mtime_ns == time
    assert _tile(slides, output, "--overlap", "8") == 2
    assert "overlap_px differ" in capsys.readouterr().err
    assert _tile(slides, output, "--overlap", "8", "--restart") == 0
    facts = json.loads((output / "slides" / f"{_ids(output)[0]}.json").read_text())
    assert facts["step_level0"] == [112, 112]


@pytest.mark.parametrize("place", [1, 3, 7])  # of tiling.json, then four files per slide
def test_a_killed_call_goes_on_and_leaves_nothing_unfinished(
    slides: Path, tmp_path: Path, place: int
) -> None:
    def call() -> int:
        replace, calls = Path.replace, iter(range(100))

        def die(path: Path, target: Path) -> Path:
            if next(calls) == place:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(path, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", die)
            return _tile(slides, tmp_path / "out")

    assert killed(call)
    assert list((tmp_path / "out").rglob(".*.part-*"))
    assert len(_ids(tmp_path / "out")) == max(0, place - 1) // 4
    assert _tile(slides, tmp_path / "out") == 0
    assert _tile(slides, tmp_path / "whole") == 0
    assert not list((tmp_path / "out").rglob(".*.part-*"))
    names = [path for path in (tmp_path / "whole").rglob("*.*") if path.is_file()]
    assert len(names) == 4 * len(NAMES) + 1 + len(list((tmp_path / "whole").glob(".build*")))
    for path in names:
        if path.suffix != ".h5":  # carries times
            own = tmp_path / "out" / path.relative_to(tmp_path / "whole")
            assert own.read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_two_processes_write_what_one_writes(slides: Path, tmp_path: Path) -> None:
    assert _tile(slides, tmp_path / "one") == 0
    assert _tile(slides, tmp_path / "two", "--jobs", "2") == 0
    assert _ids(tmp_path / "one") == _ids(tmp_path / "two") and len(_ids(tmp_path / "one")) == 3
    for key in _ids(tmp_path / "one"):
        for name in (f"tiles/{key}.parquet", f"slides/{key}.json"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_label_and_macro_images_are_never_read(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels show names: the pages cannot be decoded, and asking OpenSlide for them fails."""
    path = tmp_path / "aperio" / "s.svs"
    path.parent.mkdir()
    rgb = np.full((448, 640, 3), 243, np.uint8)
    rgb[64:320, 128:512] = (200, 110, 170)
    text = "Aperio Image Library v1\n"
    jpeg = {"compression": "jpeg", "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path) as file:
        about = f"{text}640x448 [0,0 640x448] (64x64) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"
        file.write(rgb, tile=(64, 64), description=about, **jpeg)
        file.write(rgb[::4, ::4], description=f"{text}thumbnail", **jpeg)
        for kind, number in (("label", 1), ("macro", 9)):
            picture = np.full((100, 120, 3), (255, 0, 255), np.uint8)
            about = f"{text}{kind} 120x100"
            file.write(picture, description=about, subfiletype=number, rowsperstrip=100, **jpeg)
    with tifffile.TiffFile(path) as tiff:
        places = [(p.dataoffsets[0], p.databytecounts[0]) for p in tiff.pages[2:]]  # type: ignore[index]
    with path.open("r+b") as file:
        for offset, size in places:
            file.seek(offset)
            file.write(b"\0" * size)
    assert "macro" in list(openslide.OpenSlide(path).associated_images)

    def never(slide: object) -> None:
        raise AssertionError("an associated image was asked for")

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(never))
    assert inspect_slides(str(path))["problems"] == []
    assert _tile(path, tmp_path / "out") == 0
    (key,) = _ids(tmp_path / "out")
    drawn = np.asarray(Image.open(tmp_path / "out" / "thumbnails" / f"{key}.png").convert("RGB"))
    assert not (drawn == (255, 0, 255)).all(-1).any()


def test_slide_that_cannot_be_read_ends_it_or_is_left_out(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _slide(slides / "none.tif", mpp=None)
    assert _tile(slides, tmp_path / "out") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "none.tif" in said
    assert "mpp_um" in said
    assert "--skip_bad" in said
    assert _tile(slides, tmp_path / "out", "--skip_bad") == 0
    assert len(_ids(tmp_path / "out")) == 3
    capsys.readouterr()
    assert _tile(slides / "none.tif", tmp_path / "nothing", "--skip_bad") == 2
    said = " ".join("".join(capsys.readouterr()).split())
    assert "Nothing was made: 1 slide left out" in said and "before you train" not in said
    assert _tile(slides, tmp_path / "other", "--mpp_um", "0.5") == 0
    assert len(_ids(tmp_path / "other")) == 4
    stains = np.full((5, 256, 256), 1000, np.uint16)
    write_ome(tmp_path / "multiplex" / "a.ome.tif", stains, "CYX", photometric="minisblack")
    assert _tile(tmp_path / "multiplex", tmp_path / "no", "--min_tissue", "0") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "a.ome.tif: holds the channels" in said and "expected red, green and blue" in said


def test_regions_restrict_and_label_tiles(slides: Path, tmp_path: Path) -> None:
    ring = [[0, 0], [256, 0], [256, 448], [0, 448], [0, 0]]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"classification": {"name": "Tumor"}},
    }
    (tmp_path / "regions").mkdir()
    (tmp_path / "regions" / "A-1.geojson").write_text(json.dumps([feature]))
    slide = slides / "miller" / "A-1.tif"
    more = ("--regions", str(tmp_path / "regions"), "--ids", "plain")
    assert _tile(slide, tmp_path / "out", *more) == 0
    table = pyarrow.parquet.read_table(tmp_path / "out" / "tiles" / "A-1.parquet").to_pydict()
    assert set(table["x"]) == {128}
    assert set(table["label"]) == {"Tumor"}
    assert _tile(slides, tmp_path / "other", *more) == 2
    own = ("--regions", str(tmp_path / "regions" / "A-1.geojson"))  # named like the slide
    for _ in range(2):
        assert _tile(slide, tmp_path / "hashed", *own) == 0
    for path in (tmp_path / "hashed").rglob("*.*"):
        assert b"A-1" not in path.read_bytes()


def test_names_in_brackets_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s" / "one [bold]a.tif"
    write_tiff(path, [np.full((128, 128, 3), 242, np.uint8)])
    assert _tile(path, tmp_path / "out", "--ids", "plain", "--mpp", "0.5") == 0
    assert "1 slide without a tile" in capsys.readouterr().out
    damage_tile(path, 64, 64)
    assert _tile(path, tmp_path / "other", "--ids", "plain", "--mpp", "0.5") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "look at the pictures: one [bold]a" in said
    assert "one [bold]a: 1 stored tiles cannot be read" in said
    path.rename(path.with_name("b\udcff.tif"))  # a byte that is no UTF-8
    assert _tile(path.parent, tmp_path / "bytes", "--ids", "plain", "--mpp", "0.5") == 0
    assert "look at the pictures: b%FF" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "bytes" / "tiles" / "b%FF.parquet").is_file()


def test_damaged_tiles_are_told_and_the_rest_is_kept(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage_tile(slides / "smith" / "B-1.tif", 200, 130)
    assert _tile(slides, tmp_path / "out", "--ids", "plain") == 0
    assert "smith__B-1: 1 stored tiles cannot be read" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "slides" / "smith__B-1.json").read_text())
    assert facts["damaged"] == [[0, 192, 128]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/nowhere.svs"], "nothing lies there"), (["{}"], "holds no slides"),
        (["{}", "--ids=plain"], "Pictures of tiles are read by a DataModule"),
        (["{}", "--regions", "/nowhere"], "regions /nowhere: nothing lies there"),
    ],
)  # fmt: skip
def test_mistakes_are_told(
    tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    words = [word.format(tmp_path / "empty") for word in words]
    if "--regions" in words:
        _slide(tmp_path / "empty" / "a.tif")
    if "--ids=plain" in words:
        (tmp_path / "empty" / "0_0.PNG").touch()
    assert main(["tile", *words, "--output", str(tmp_path / "out")]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_predict_says_how_pictures_are_read_where_slides_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "0_0.png").touch()
    with pytest.raises(DataError, match="Pictures of tiles are read by a DataModule"):
        named_slides([str(tmp_path)], "plain")
