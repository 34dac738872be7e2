"""Tiles: stains of a place stay together, patients stay in one split, slides count equally."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from slide_files import write_tiff
from tile_files import place_picture, write_tiles

from domainssl.datamodules.tiles import TileDataModule
from domainssl.errors import ConfigError, DataError
from domainssl.io.slide.manifest import WantedTiles, find_tiles
from domainssl.io.slide.pyramid import Slide
from domainssl.loading.plan import Piece
from domainssl.loading.source import Loading
from domainssl.sources.held_out import HeldOut
from domainssl.sources.slide_grids import SlideTiles
from domainssl.sources.tile_options import Stain, TileFiles, TileLabels
from domainssl.sources.windows import Window

NONE = HeldOut(val_fraction=0.0)
PAIR = {"he": Stain(), "ihc": Stain()}


def _data(root: Path, modalities: dict[str, Stain] | None = None, **more: Any) -> TileDataModule:
    arguments: dict[str, Any] = {
        "held_out": NONE,
        "global_batch_size": 1,
        "window": Window(size=8),
        "tiles": TileFiles(ids="plain"),
        "loading": Loading(workers=0),
        **more,
    }
    data = TileDataModule(str(root), modalities or PAIR, **arguments)
    data.setup("fit")
    return data


def _items(data: TileDataModule, epoch: int = 0) -> list[dict[str, Any]]:
    data.epoch = epoch
    return list(data.train_dataloader())


def test_stains_of_a_place_are_cut_flipped_and_turned_together(tmp_path: Path) -> None:
    write_tiles(tmp_path, ["he/s1/0_0.png", "ihc/s1/0_0.png"])
    data, seen = _data(tmp_path), set()
    for epoch in range(24):
        (item,) = _items(data, epoch)
        assert item["he"].shape == (1, 3, 8, 8) and item["he"].dtype == torch.uint8
        assert torch.equal(item["he"][0, :2], item["ihc"][0, :2])  # red the column, green the row
        assert item["he.valid"].all() and item["ihc.present"].all()
        seen.add(tuple(item["he"][0, :2, 0, 0].tolist()))
    assert len(seen) > 12  # drawn anew in every epoch
    held = data.source("predict").load(Piece(0, 0, 1), 3).data["he"][0]
    assert torch.equal(held, torch.from_numpy(place_picture()[4:12, 4:12]).permute(2, 0, 1))


def test_a_stain_that_a_tile_lacks_is_absent(tmp_path: Path) -> None:
    write_tiles(tmp_path, ["he/s1/0_0.png", "he/s1/0_16.png", "ihc/s1/0_16.png"])
    rows = _data(tmp_path).source("train").load(Piece(0, 0, 2), 0).data
    assert rows["id"] == ["s1/0_0", "s1/0_16"]
    assert rows["ihc.present"].tolist() == [False, True] and rows["he.present"].all()
    assert not rows["ihc.valid"][0].any() and (rows["ihc"][0] == 255).all()


def test_a_small_tile_is_padded_in_white_and_the_rest_is_not_valid(tmp_path: Path) -> None:
    write_tiles(tmp_path, ["he/s1/0_0.png"], side=4)
    rows = _data(tmp_path, {"he": Stain()}).source("predict").load(Piece(0, 0, 1), 0).data
    valid = rows["he.valid"][0]
    assert valid.sum() == 16 and valid[2:6, 2:6].all()
    assert (rows["he"][0][:, ~valid] == 255).all() and rows["he"][0, 0, 2, 2:6].tolist() == [
        0, 1, 2, 3,
    ]  # fmt: skip


def test_a_window_may_be_given_in_microns(tmp_path: Path) -> None:
    data = TileDataModule(
        str(tmp_path), PAIR, window=Window(size=56.0, unit="um"), tiles=TileFiles(mpp_um=0.5)
    )
    assert data.context_size == (112, 112) and data.modalities["he"].mpp_um == 0.5
    with pytest.raises(ConfigError, match="no multiple of 0.3"):
        TileDataModule(
            str(tmp_path), PAIR, window=Window(size=100.0, unit="um"), tiles=TileFiles(mpp_um=0.3)
        )


@pytest.mark.parametrize(
    ("names", "slides", "patients"),
    [
        (["he/s1/0_0.png", "he/s2/0_0.png"], ["s1", "s2"], ["s1", "s2"]),
        (["p1/s1/he/0_0.png", "p1/s2/he/0_0.png"], ["p1/s1", "p1/s2"], ["p1", "p1"]),
        (["train/s1/0_0_he.png", "val/s2/0_0_he.png"], ["s1", "s2"], ["s1", "s2"]),
    ],
)
def test_folders_are_read_in_several_orders(
    tmp_path: Path, names: list[str], slides: list[str], patients: list[str]
) -> None:
    write_tiles(tmp_path, names)
    data = _data(tmp_path, {"he": Stain()})
    assert data.found is not None
    assert [each.id for each in data.found.items] == slides
    assert [each.patient for each in data.found.items] == patients
    if names[0].startswith("train"):
        assert {split: len(part) for split, part in data.splits.items()} == {"train": 1, "val": 1}


def test_patterns_find_patient_and_slide_in_a_name(tmp_path: Path) -> None:
    names = ["TCGA-AA-0001-01Z-00-DX1_0_0.png", "TCGA-AA-0001-01Z-00-DX2_0_0.png"]
    write_tiles(tmp_path, names)
    with pytest.raises(DataError, match="lies in no folder of a slide"):
        _data(tmp_path, {"he": Stain(stain="*")})
    files = TileFiles(ids="plain", patient="(TCGA-..-....)", slide="^([^_]+)")
    data = _data(tmp_path, {"he": Stain(stain="*")}, tiles=files)
    assert data.found is not None
    assert [each.id[-3:] for each in data.found.items] == ["DX1", "DX2"]
    assert {each.patient for each in data.found.items} == {"TCGA-AA-0001"}


def _table(root: Path, *rows: str, head: str = "id,patient,slide,split,he,ihc,label") -> None:
    (root / "manifest.csv").write_text("\n".join((head, *rows)) + "\n")


def test_a_table_gives_splits_labels_and_missing_stains(tmp_path: Path) -> None:
    write_tiles(tmp_path, ["a.png", "b.png", "c.png"])
    _table(tmp_path, "t1,p1,s1,train,a.png,b.png,normal", "t2,p2,s2,val,c.png,,tumour")
    data = _data(tmp_path)
    assert data.label_names == ("normal", "tumour") and data.num_classes == 2
    rows = data.source("val").load(Piece(0, 0, 1), 0).data
    assert rows["id"] == ["t2"] and rows["label"].tolist() == [1]
    assert rows["ihc.present"].tolist() == [False]
    with pytest.raises(ConfigError, match="'normal'.* List all of normal, tumour"):
        _data(tmp_path, labels=TileLabels(classes=("tumour",)))


def test_mistakes_in_a_table_are_told(tmp_path: Path) -> None:
    write_tiles(tmp_path, ["a.png", "b.png"])
    _table(tmp_path, "t1,p1,s1,train,a.png,,x", "t2,p1,s2,val,b.png,,y")
    with pytest.raises(DataError, match=r"1 patient\(s\) appear in two splits: p1 \(train, val\)"):
        _data(tmp_path)
    _table(tmp_path, "t1,p1,s1,train,a.png,,x", "t2,p2,s1,train,b.png,,y")
    with pytest.raises(DataError, match="line 3: the slide 's1' has the patient 'p2' here"):
        _data(tmp_path)
    _table(tmp_path, "t1,p1,s1,train,a.png,,x", "t1,p1,s1,train,b.png,,y")
    with pytest.raises(DataError, match="line 3: the id 't1' stands twice"):
        _data(tmp_path)
    _table(tmp_path, "t1,p1,s1,train,gone.png,,x")
    with pytest.raises(
        DataError, match=r"1 files that it names are not there, such as .*gone\.png"
    ):
        _data(tmp_path)
    _table(tmp_path, "t1,p1,s1,train,a.png,,x", "t2,p2,s2,val,./a.png,,y")
    with pytest.raises(DataError, match="is a picture of s1 and of s2, .*splits train and val"):
        _data(tmp_path)
    _table(tmp_path, "t1,p1,s1,train,a.png,,x", "t2,P1,s2,val,b.png,,y",
           head="ID,Patient,Slide,Split,he,ihc,Label")  # fmt: skip
    data = _data(tmp_path)
    assert data.label_names == ("x", "y") and list(data.splits) == ["train", "val"]
    assert "'P1' and 'p1' count as two patients" in " ".join(data.problems) or \
        "'p1' and 'P1' count as two patients" in " ".join(data.problems)  # fmt: skip
    with pytest.raises(DataError, match=r"no column 'lable', .*Did you mean 'Label'.*labels\.col"):
        _data(tmp_path, labels=TileLabels(column="lable"))
    _table(tmp_path, "a.png", head="H&E")
    with pytest.raises(DataError, match=r"no column 'he' .*modalities\.he\.stain"):
        _data(tmp_path)


def test_held_out_slides_take_their_patient_along(tmp_path: Path) -> None:
    write_tiles(tmp_path, [f"he/p{p}/s{s}/0_0.png" for p in (1, 2) for s in (1, 2)])
    stain = {"he": Stain()}
    data = _data(tmp_path, stain, held_out=HeldOut(slides=("p1/s1", "p1/s2")))
    assert [each.patient for each in data.splits["val"]] == ["p1", "p1"]
    with pytest.raises(ConfigError, match="p1/s2 belong to patients whose other slides"):
        _data(tmp_path, stain, held_out=HeldOut(slides=("p1/s1",)))
    with pytest.raises(ConfigError, match=r"no slide 'p1/s9' among 4\. Did you mean"):
        _data(tmp_path, stain, held_out=HeldOut(slides=("p1/s9",)))
    with pytest.raises(ConfigError, match="no patient 'p3'"):
        _data(tmp_path, stain, held_out=HeldOut(patients=("p3",)))


def test_large_slides_do_not_outweigh_small_ones(tmp_path: Path) -> None:
    write_tiles(tmp_path, [f"he/s{s}/0_{y}.png" for s, n in ((1, 150), (2, 10)) for y in range(n)])
    data = _data(tmp_path, {"he": Stain()}, tiles=TileFiles(ids="plain", per_slide=20))
    chosen = []
    for epoch in range(2):
        ids = [item["id"][0] for item in _items(data, epoch)]
        assert len(ids) == len(set(ids)) == 30
        assert sum(name.startswith("s2") for name in ids) == 10
        chosen.append({name for name in ids if name.startswith("s1")})
    assert chosen[0] != chosen[1]
    held = data.source("predict").load(Piece(0, 0, 20), 0).data["index"]
    assert np.diff(held).tolist() == [7, 8] * 9 + [7]  # evenly spread
    assert data.source("train").sizes == [30]
    whole = _data(tmp_path, {"he": Stain()})
    assert whole.source("train").sizes == [64, 64, 32]  # blocks of a slide, small ones together
    again = pickle.loads(pickle.dumps(whole.source("train")))
    rows = again.load(Piece(2, 0, 32), 0).data
    assert rows["index"].tolist() == list(range(128, 160))


def test_a_damaged_picture_can_be_replaced(tmp_path: Path) -> None:
    write_tiles(tmp_path, [f"he/s1/0_{n}.png" for n in range(4)])
    (tmp_path / "he/s1/0_2.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(DataError, match=r"0_2\.png.*on_bad_sample: replace"):
        _items(_data(tmp_path, {"he": Stain()}))
    loading = Loading(workers=0, max_bad_fraction=0.5)
    more: dict[str, Any] = {"on_bad_sample": "replace", "loading": loading}
    ids = [item["id"][0] for item in _items(_data(tmp_path, {"he": Stain()}, **more))]
    assert len(ids) == 4 and "s1/0_2" not in ids


def test_stains_of_another_size_are_refused(tmp_path: Path) -> None:
    write_tiles(tmp_path, ["he/s1/0_0.png"])
    (tmp_path / "ihc/s1").mkdir(parents=True)
    Image.new("RGB", (20, 16)).save(tmp_path / "ihc/s1/0_0.png")
    with pytest.raises(DataError, match="he 16 x 16, ihc 16 x 20 rows x columns"):
        _items(_data(tmp_path))


def test_hashed_ids_and_identity_name_neither_patient_nor_path(tmp_path: Path) -> None:
    root = tmp_path / "clinic"
    write_tiles(root, ["he/anna/0_0.png", "he/bert/0_0.png"])
    table = tmp_path / "ids.csv"
    data = _data(root, {"he": Stain()}, tiles=TileFiles(id_table=str(table)))
    ids = [item["id"][0] for item in _items(data)]
    assert all(len(name) == 16 and name.isalnum() for name in ids)
    told = json.dumps(data.identity())
    assert "anna" not in told and "clinic" not in told
    assert str(root) in data.withheld
    assert "anna" in table.read_text() and table.stat().st_mode & 0o077 == 0


def test_the_sample_is_described_and_says_its_classes(cache_folder: Path) -> None:
    data = TileDataModule(window=Window(size=64), tiles=TileFiles(mpp_um=1.0))
    data.setup("fit")
    text = "\n".join(data.describe())
    assert "480 tiles of 120 slides of 80 patients in sample:tiles (manifest)" in text
    assert "ihc: 3 channels red green blue (rgb8), 64 x 64 px of 1 um, of 474 tiles" in text
    assert data.label_names == ("glands", "keratin", "mucin", "nests")
    with pytest.raises(ConfigError, match=r"sample:tiles, sample:slide .* mean 'tiles'"):
        TileDataModule("sample:tile", {"he": Stain()}).setup("fit")


def _slide_data(root: str, **more: Any) -> TileDataModule:
    arguments: dict[str, Any] = {
        "window": Window(size=64),
        "tiles": TileFiles(mpp_um=1.0, ids="plain"),
        "held_out": NONE,
        "loading": Loading(workers=0),
        **more,
    }
    data = TileDataModule(root, PAIR, **arguments)
    data.setup("fit")
    return data


@pytest.mark.parametrize(
    ("side", "tile", "layout"),
    [(2064, (256, 256), "slides"), (2064, None, "folder"), (512, (256, 256), "folder")],
)
def test_a_tiff_of_one_level_is_a_slide_by_its_size_and_tiling(
    tmp_path: Path, side: int, tile: tuple[int, int] | None, layout: str
) -> None:
    (tmp_path / "p1").mkdir()
    pixels = np.full((side, side, 3), 250, np.uint8)
    pixels[:600, :600] = (170, 60, 140)
    size = {"resolution": (10_000, 10_000), "resolutionunit": "CENTIMETER", "compression": "zlib"}
    tifffile.imwrite(tmp_path / "p1" / "a.tif", pixels, tile=tile, photometric="rgb", **size)
    found = find_tiles(str(tmp_path), WantedTiles(stains={"he": "*"}))
    assert found.layout == layout and len(found.items) == 1


def test_pipes_and_lost_links_are_passed_over_in_folders_and_named_in_tables(
    tmp_path: Path,
) -> None:
    write_tiles(tmp_path, ["he/p1/0_0.png"])
    os.mkfifo(tmp_path / "he" / "p1" / "0_8.png")
    (tmp_path / "he" / "p1" / "8_0.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "he" / "p1" / "8_8.png").symlink_to(tmp_path / "he" / "p1" / "0_0.png")
    (tmp_path / "he" / "p1" / "._0_0.png").write_bytes(b"\0\5\x16\7")
    found = find_tiles(str(tmp_path), WantedTiles(stains={"he": "he"}))
    assert found.items[0].names == ["p1/0_0", "p1/8_8"]
    for name in ("0_8", "8_0"):
        (tmp_path / "manifest.csv").write_text(f"id,slide,he\na,p1,he/p1/{name}.png\n")
        with pytest.raises(DataError, match=rf"1 files that it names are not there.*{name}"):
            find_tiles(str(tmp_path), WantedTiles(stains={"he": "he"}))


def test_tiles_are_cut_out_of_slides_where_tissue_is(cache_folder: Path) -> None:
    data = _slide_data("sample:slide")
    assert data.found is not None and data.found.layout == "slides"
    (slide,) = data.found.items
    assert slide.id == "phantom" and 40 < len(slide) < 70  # of 12 x 8
    root = Path(data._root())
    whole = {s: tifffile.imread(root / s / "phantom.tif", key=0).astype(float) for s in PAIR}
    rows = data.source("predict").load(Piece(0, 0, len(slide)), 0).data
    for tile in (0, 20, 39):
        x, y = slide.corners[tile].tolist()
        assert rows["id"][tile] == f"phantom/{x}_{y}" and x % 128 == y % 128 == 0
        for stain in PAIR:  # 64 px at 1 um are 128 px of level 0
            part = whole[stain][y : y + 128, x : x + 128].reshape(64, 2, 64, 2, 3).mean((1, 3))
            assert np.abs(rows[stain][tile].permute(1, 2, 0).numpy() - part).max() <= 1
    assert rows["he.valid"].all() and (rows["he"].float().mean((1, 2, 3)) < 235).all()
    again = pickle.loads(pickle.dumps(data.source("train")))
    assert torch.equal(
        again.load(Piece(0, 0, 4), 1).data["ihc"],
        data.source("train").load(Piece(0, 0, 4), 1).data["ihc"],
    )


def test_a_slide_has_one_file_per_stain_and_labels_of_its_own(
    tmp_path: Path, cache_folder: Path
) -> None:
    root = Path(_slide_data("sample:slide")._root())
    for stain in PAIR:
        (tmp_path / f"s1_{stain}.tif").symlink_to(root / stain / "phantom.tif")
    (tmp_path / "s2_he.tif").symlink_to(root / "he" / "phantom.tif")
    _table(tmp_path, "s1,p1,,train,s1_he.tif,s1_ihc.tif,tumour", "s2,p2,,val,s2_he.tif,,stroma")
    data = _slide_data(str(tmp_path), slides=SlideTiles(size_px=128, min_tissue=0.9))
    assert data.found is not None
    assert [each.labels[0] for each in data.found.items] == ["tumour", "stroma"]
    rows = data.source("val").load(Piece(0, 0, 2), 0).data
    assert rows["label"].tolist() == [0, 0] and not rows["ihc.present"].any()
    with pytest.raises(DataError, match=r"not one tile is left\. Lower .*min_tissue"):
        _slide_data(str(tmp_path), slides=SlideTiles(size_px=600, min_tissue=1.0))
    _table(tmp_path, "t1,p1,s1,train,s1_he.tif,,", "t2,p1,s1,train,s1_ihc.tif,,")
    with pytest.raises(DataError, match="2 files are of the slide 's1': t1, t2"):
        _slide_data(str(tmp_path))


def _small_slide(path: Path) -> None:
    pixels = np.full((384, 384, 3), 245, np.uint8)
    pixels[64:320, 64:320] = (190, 90, 170)
    write_tiff(path, [pixels], compression=None)


def test_slides_that_cannot_be_read_are_left_out_and_named(
    tmp_path: Path, cache_folder: Path
) -> None:
    for name in ("b", "c"):
        _small_slide(tmp_path / f"{name}.tif")
    (tmp_path / "a.tif").write_bytes(b"")  # the first one tells nothing of the layout
    (tmp_path / "d.svs").write_bytes(b"no slide")
    write_tiff(tmp_path / "e.tif", [np.full((64, 64, 3), 9, np.uint8)], mpp=None)
    more = {"window": Window(size=64), "tiles": TileFiles(mpp_um=0.5, ids="plain")}
    data = _data(tmp_path, {"he": Stain(stain="*")}, **more)
    assert data.found is not None and [each.id for each in data.found.items] == ["b", "c"]
    assert [text.split(": ")[0][-5:] for text in data.problems] == ["a.tif", "d.svs", "e.tif"]
    assert "an empty file" in data.problems[0] and "slides.reading.mpp_um" in data.problems[2]
    assert all(text.endswith("The slide is left out.") for text in data.problems)
    assert sum(len(item["id"]) for item in _items(data)) == 32
    for name in "bc":
        (tmp_path / f"{name}.tif").write_bytes(b"II*\0")
    with pytest.raises(DataError, match=r"a\.tif: an empty file.* No slide of 5 is left"):
        _data(tmp_path, {"he": Stain(stain="*")}, **more)


def test_a_stain_that_cannot_be_read_is_left_out_and_the_others_stay(
    tmp_path: Path, cache_folder: Path
) -> None:
    for name in ("he/x.tif", "ihc/x.tif", "he/y.tif", "ihc/z.tif"):
        _small_slide(tmp_path / name)
    (tmp_path / "ihc" / "y.tif").write_bytes(b"no slide")
    (tmp_path / "he" / "z.tif").write_bytes(b"")
    data = _data(
        tmp_path, window=Window(size=64), tiles=TileFiles(mpp_um=0.5, ids="plain", layout="slides")
    )
    assert data.found is not None and data.found.layout == "slides"
    assert {e.id: list(e.slides) for e in data.found.items} == {
        "x": ["he", "ihc"], "y": ["he"], "z": ["ihc"],
    }  # fmt: skip
    assert "The stain 'ihc' of the slide 'y' is left out." in data.problems[0]
    assert sum(not item["ihc.present"] for item in _items(data)) == 16


def test_a_table_states_the_resolution_of_slides_and_a_later_start_opens_none(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.full((640, 640, 3), 245, np.uint8)
    pixels[64:576, 64:576] = (190, 90, 170)
    for name, mpp in (("he", None), ("ihc", (0.5, 0.5)), ("other", None)):
        write_tiff(tmp_path / f"{name}.tif", [pixels], mpp=mpp, compression=None)
    rows = ("s,p1,train,he.tif,ihc.tif,0.25,0.25", "t,p2,val,other.tif,,0.5,")
    (tmp_path / "manifest.csv").write_text(
        "\n".join(["id,patient,split,he,ihc,MPP,mpp_ihc", *rows])
    )
    tiles = TileFiles(mpp_um=0.5, ids="plain", layout="slides")
    more = {"window": Window(size=64), "tiles": tiles}
    data = _data(tmp_path, **more)
    assert data.found is not None
    first, second = data.found.items
    assert (first.mpp_um, second.mpp_um) == ({"he": 0.25, "ihc": 0.25}, {"he": 0.5})
    assert np.diff(np.unique(first.corners)).min() == 128  # of level 0, 64 of the tile
    assert np.diff(np.unique(second.corners)).min() == 64
    (told,) = data.problems
    assert "ihc.tif: openslide.mpp says 0.5 x 0.5 um per pixel, read with 0.25" in told
    rows = data.source("train").load(Piece(0, 0, 1), 0)
    assert not rows.bad and rows.data["ihc.valid"].all()
    with monkeypatch.context() as patched:
        patched.setattr(Slide, "_open", lambda self: pytest.fail(f"{self.path} is opened"))
        again = _data(tmp_path, **more)
    assert again.problems == data.problems
    (tmp_path / "list.csv").write_text("WSI,MPP\nhe,0.25\nother.tif,0.5\n")  # as of TRIDENT
    listed = {**more, "tiles": replace(tiles, manifest="list.csv")}
    found = _data(tmp_path, {"he": Stain(stain="*")}, **listed).found
    assert found is not None
    assert [(each.id, each.mpp_um["he"]) for each in found.items] == [("he", 0.25), ("other", 0.5)]
    (tmp_path / "manifest.csv").write_text("id,patient,he,mpp\ns,p1,he.tif,25\n")
    with pytest.raises(DataError, match=r"manifest\.csv, line 2: mpp is '25', expected micromet"):
        _data(tmp_path, {"he": Stain()}, **more)


def test_pictures_of_another_resolution_by_the_table_are_told(tmp_path: Path) -> None:
    write_tiles(tmp_path, ["he/s/0_0.png", "he/t/0_0.png"])
    rows = "a,p1,s,he/s/0_0.png,0.25\nb,p2,t,he/t/0_0.png,0.5\n"
    (tmp_path / "manifest.csv").write_text(f"id,patient,slide,he,mpp\n{rows}")
    data = _data(tmp_path, {"he": Stain()}, window=Window(size=16), tiles=TileFiles(ids="plain"))
    (told,) = data.problems
    assert told.startswith("s: the table says 0.25 um per pixel of its tiles, data.init_args.tiles")


def test_whole_slides_beside_pictures_ask_which_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"no slide")
    write_tiles(tmp_path, ["s/0_0.png"])
    wanted = WantedTiles(stains={"he": "*"})
    with pytest.raises(ConfigError, match=r"layout: .*a\.svs, and pictures, such as .*0_0\.png"):
        find_tiles(str(tmp_path), wanted)
    assert find_tiles(str(tmp_path), wanted, layout="folder").items[0].id == "s"
    (tmp_path / "he").mkdir()
    (tmp_path / "a.svs").rename(tmp_path / "he" / "a.svs")  # the picture is of no stain then
    assert find_tiles(str(tmp_path), WantedTiles(stains={"he": "he"})).layout == "slides"
