"""Tables of slides: which files they name, and the resolution that a row states."""

from __future__ import annotations

from pathlib import Path

import pytest
from slide_files import squares, write_tiff

from domainssl.errors import DataError
from domainssl.inference.slide_inputs import named_slides
from domainssl.inspection.recognise import inspect_path
from domainssl.io.slide.listed import stated_in
from domainssl.io.slide.pyramid import Slide, SlideReading, describe_slide

RGB = squares(256, 192)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two slides that state no resolution, and one of 0.5 um."""
    for name, mpp in (("a", None), ("b/b", None), ("c", (0.5, 0.5))):
        write_tiff(tmp_path / "slides" / f"{name}.tif", [RGB], mpp=mpp)
    return tmp_path / "slides"


@pytest.mark.parametrize(
    "text",
    [
        "wsi,mpp\na.tif,0.25\nb/b.tif,0.5\nc.tif,\n",  # as TRIDENT's list of slides
        "Slide_ID;MPP_um;label\na;0,25;x\nb/b;0,5;y\nc;nan;y\n",
        "id,path,mpp\nfirst,a.tif,0.25\nsecond,b/b.tif,.5\nthird,c.tif,\n",
    ],
)
def test_a_table_names_slides_and_states_the_resolution_of_each(folder: Path, text: str) -> None:
    (folder / "list.csv").write_text(text)
    found = named_slides([str(folder / "list.csv")], "plain")
    assert [slide.mpp_um for slide in found] == [0.25, 0.5, None]
    names = ["first", "second", "third"] if text.startswith("id") else ["a", "b__b", "c"]
    assert [slide.name for slide in found] == names
    facts = [describe_slide(slide.path, mpp_um=slide.mpp_um) for slide in found]
    assert [each.mpp for each in facts] == [(0.25, 0.25), (0.5, 0.5), (0.5, 0.5)]
    assert facts[0].mpp_source == "table of slides" and not any(f.overruled for f in facts)


def test_the_table_in_a_folder_states_resolutions_of_its_slides(folder: Path) -> None:
    for text in ("he,mpp\na.tif,0.25\nb/b.tif,0.4\n", "slide_id,mpp\na,0.25\nb.tif,0.4\nz,1\n"):
        (folder / "manifest.csv").write_text(text)
        found = {slide.name: slide.mpp_um for slide in named_slides([str(folder)], "plain")}
        assert found == {"a": 0.25, "b__b": 0.4, "c": None}
    report = inspect_path(str(folder))
    assert [slide["mpp"] for slide in report["slides"]] == [[0.25] * 2, [0.4] * 2, [0.5] * 2]
    assert report["problems"] == []
    (folder / "manifest.csv").write_text("slide_id,mpp\na,0.25\na.tif,0.4\n")
    with pytest.raises(DataError, match=r"line 3: 0\.4 um per pixel for .*a\.tif, which has 0\.25"):
        named_slides([str(folder)], "plain")


def test_a_column_speaks_of_the_files_of_one_stain(tmp_path: Path) -> None:
    table = "slide_id,he,ihc,mpp,mpp_ihc\ns,he/s.tif,ihc/s.tif,0.25,0.5\n"
    (tmp_path / "manifest.csv").write_text(table)
    he, ihc = (str(tmp_path / stain / "s.tif") for stain in ("he", "ihc"))
    assert stated_in(str(tmp_path), [he, ihc]) == {he: 0.25, ihc: 0.5}


def test_a_resolution_that_contradicts_the_file_counts_and_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "manifest.csv").write_text("wsi,mpp\nc.tif,0.25\n")
    said = "openslide.mpp says 0.5 x 0.5 um per pixel, read with 0.25 x 0.25 um (table of slides)"
    report = inspect_path(str(folder / "manifest.csv"))
    assert report["count"] == 1 and report["slides"][0]["mpp"] == [0.25, 0.25]
    assert report["problems"] == [f"{folder / 'c.tif'}: {said}"]
    Slide(folder / "c.tif", SlideReading(mpp_um=1.0), 0.25).tell_overruled()
    assert said in caplog.text
    assert not describe_slide(folder / "c.tif", mpp_um=0.495).overruled


def test_the_power_of_a_slide_that_states_nothing_else_is_compared(tmp_path: Path) -> None:
    text = "Aperio Image Library v1\n256x192 |AppMag = 40"
    path = write_tiff(tmp_path / "a.svs", [RGB], mpp=None, description=text)
    assert not describe_slide(path, mpp_um=0.23).overruled
    (told,) = describe_slide(path, mpp_um=0.5).overruled
    assert told.startswith("40x usually has 0.25 um per pixel, read with 0.5 um")
    with pytest.raises(DataError, match=r"column `mpp_um` of a table of slides \(manifest\.csv\)"):
        describe_slide(path).resolution()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("wsi,mpp\na.tif,40\n", r"line 2: mpp is '40', expected micrometres per pixel of level 0"),
        ("wsi,mpp\na.tif,20x\n", r"line 2: mpp is '20x'"),
        ("wsi,mpp\na.tif,0.25\na,0.5\n", r"line 3: 'a' stands twice"),
        ("name,mpp\na.tif,0.25\n", r"no column path, wsi, .* only name, mpp"),
        ("wsi,mpp\n,0.25\n", r"line 2: wsi is empty"), ("wsi,mpp\n", "has no row"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_used_say_why(folder: Path, text: str, said: str) -> None:
    (folder / "list.csv").write_text(text)
    with pytest.raises(DataError, match=said):
        named_slides([str(folder / "list.csv")], "plain")


def test_a_slide_of_a_table_that_is_not_there_is_named_when_it_is_read(folder: Path) -> None:
    (folder / "list.csv").write_text("wsi\nlost.svs\n")
    (slide,) = named_slides([str(folder / "list.csv")], "plain")
    with pytest.raises(DataError, match=r"lost\.svs: cannot be opened as a slide \(No such file"):
        Slide(slide.path).facts.resolution()
    assert slide.name == "lost"
