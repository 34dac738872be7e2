"""Slides with feature bags: regions and samples, splits by patient, what files and tables say."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from bag_files import LATTICE, SIZE, TRIDENT, write

from domainssl.cli.run.record import _tested_line
from domainssl.datamodules.slides import SlideFeatureDataModule
from domainssl.errors import ConfigError, DataError
from domainssl.io.ids import ids_of
from domainssl.io.slide.features import Bag, read_bag, to_grid, write_bag
from domainssl.loading.plan import Piece
from domainssl.sources.held_out import HeldOut
from domainssl.sources.slide_options import SlideFiles, SlideLabels, SlideWindow, TileFeatures
from domainssl.sources.slides import batch_of_grid

D, STEP = 4, 100
NAME = "tile_features"


def bag(slide, cells, seed=0):
    """Features that tell their cell: row, column, and two random numbers."""
    rng = np.random.default_rng(seed)
    places = np.array(cells)
    values = np.concatenate([places, rng.normal(size=(len(places), 2))], 1)
    return Bag(
        slide=slide,
        features=values.astype(np.float32),
        coords=places[:, ::-1] * STEP + 1000,
        patch_size_level0=STEP,
        patch_size=50,
        mpp_um=0.5,
        encoder="uni_v1",
    )


def block(rows, columns):
    return [(r, c) for r in range(rows) for c in range(columns)]


def slides(root, names=("a", "b", "c", "d"), cells=None, rows=None):
    for i, name in enumerate(names):
        write_bag(root, bag(name, cells or block(8, 6), i), "zarr", dtype="float32")
    if rows is not None:
        with open(root / "manifest.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    return root


def data(root, **arguments):
    given = {"modalities": {NAME: TileFeatures(dim=D)}, "global_batch_size": 2, **arguments}
    given.setdefault("slides", SlideFiles(ids="plain"))
    module = SlideFeatureDataModule(root=str(root), **given)
    module.setup("fit")
    return module


def train(module, epoch=0):
    module.epoch = epoch
    return list(module.train_dataloader())


def test_a_region_holds_its_cells_row_by_row_and_says_where_it_lies(tmp_path):
    module = data(slides(tmp_path), window=SlideWindow(size=(3, 4)))
    (batch, *_) = train(module)
    assert batch[NAME].shape == (2, 12, D) and batch[f"{NAME}.valid"].all()
    for values, geo in zip(batch[NAME], batch[f"{NAME}.geo"], strict=True):
        rows, columns = values[:, 0].view(3, 4), values[:, 1].view(3, 4)
        assert (rows.diff(dim=0) == 1).all() and (columns.diff(dim=1) == 1).all()
        x, y = geo["origin"]
        assert (y - 1000, x - 1000) == (STEP * int(rows[0, 0]), STEP * int(columns[0, 0]))
    places = batch[f"{NAME}.coords"][0].view(3, 4, 2)
    assert places[2, 3].tolist() == [2.0, 3.0]


def test_background_and_what_lies_beyond_a_slide_are_not_valid(tmp_path):
    cells = [(r, c) for r, c in block(3, 3) if (r, c) != (1, 1)]
    module = data(slides(tmp_path, cells=cells), window=SlideWindow(size=5))
    (batch, *_) = train(module)
    valid = batch[f"{NAME}.valid"][0].view(5, 5)
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[1:4, 1:4] = True
    expected[2, 2] = False
    assert torch.equal(valid, expected)
    assert (batch[NAME][0][~valid.flatten()] == 0).all()
    assert batch[f"{NAME}.geo"][0]["origin"] == [1000 - STEP, 1000 - STEP]


def test_held_out_slides_show_their_densest_region_every_time(tmp_path):
    sparse = [(r, c) for r, c in block(8, 6) if r >= 4 or (r + c) % 2]
    module = data(slides(tmp_path, cells=sparse), window=SlideWindow(size=4))
    (first,), (second,) = list(module.val_dataloader()), list(module.val_dataloader())
    assert torch.equal(first[NAME], second[NAME]) and first[f"{NAME}.valid"].all()
    assert first[NAME][0, 0, 0] == 4


def test_samples_of_tiles_are_drawn_anew_per_epoch_without_repetition(tmp_path):
    module = data(slides(tmp_path), window=SlideWindow(mode="bag", tokens=10, per_slide=2))
    assert module.modalities[NAME].size == (10,)
    first, again, other = train(module), train(module), train(module, 1)
    assert all(torch.equal(a[NAME], b[NAME]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][NAME], other[0][NAME])
    for batch in first:
        for values, places in zip(batch[NAME], batch[f"{NAME}.coords"], strict=True):
            assert torch.equal(values[:, :2], places) and len(places.unique(dim=0)) == 10


@pytest.mark.parametrize("fill", ["mask", "repeat"])
def test_a_bag_of_few_tiles_is_filled_as_asked(tmp_path, fill):
    window = SlideWindow(mode="bag", tokens=8, fill=fill)
    module = data(slides(tmp_path, cells=block(1, 3)), window=window)
    valid = train(module)[0][f"{NAME}.valid"]
    assert valid.sum(1).tolist() == ([3, 3] if fill == "mask" else [8, 8])


def test_slides_of_a_patient_stay_together_and_labels_follow_the_table(tmp_path):
    rows = [
        {"slide_id": f"{name}.svs", "case_id": patient, "label": label}
        for name, patient, label in zip("abcdef", "ppqqrr", "xyxyxy", strict=True)
    ]
    module = data(slides(tmp_path, "abcdef", rows=rows), held_out=HeldOut(patients=("q",)))
    assert module.label_names == ("x", "y") and module.num_classes == 2
    assert [s.id for s in module.splits["val"]] == ["c", "d"]
    (held,) = list(module.val_dataloader())
    assert held["id"] == ["c", "d"] and held["label"].tolist() == [0, 1]
    torn = [{**row, "split": "train" if row["slide_id"] == "a.svs" else "val"} for row in rows]
    with pytest.raises(DataError, match=r"1 patient\(s\) appear in two splits: p"):
        data(slides(tmp_path / "torn", "abcdef", rows=torn))


def test_columns_in_other_letter_case_count_and_what_they_lack_is_told(tmp_path):
    rows = [
        {"Slide ID": f"{name}.SVS", "Patient": patient, "Label": label}
        for name, patient, label in zip("abcd", "pPqq", "xyxy", strict=True)
    ]
    module = data(slides(tmp_path / "a", rows=rows), held_out=HeldOut(patients=("q",)))
    assert module.label_names == ("x", "y") and [s.id for s in module.splits["val"]] == ["c", "d"]
    assert "'p' and 'P' count as two patients" in module.problems[0]
    rows = [{"slide_id": name, "subject": "s", "grade": "1"} for name in "abcd"]
    root = slides(tmp_path / "b", rows=rows)
    assert "Rename 'subject' to it" in data(root).problems[0]
    with pytest.raises(DataError, match="column is 'grad', but no slide has a class there"):
        data(root, labels=SlideLabels(column="grad"))
    nothing = replace(bag("a", block(2, 2)), features=np.full((4, D), np.nan, np.float32))
    write_bag(root, nothing, "zarr", dtype="float32")
    with pytest.raises(DataError, match="none of its 4 tiles has finite features"):
        data(root, slides=SlideFiles(ids="plain")).source("train").load(Piece(0, 0, 1), 0)


def test_features_named_with_the_ending_of_the_slide_are_found_by_the_table(tmp_path):
    names = ("s0.tif", "s1.tif", "s2.tif", "s3.tif")  # as `tile --ids plain` names them
    rows = [{"slide_id": n, "case_id": n[:2], "label": "xyxy"[i]} for i, n in enumerate(names)]
    module = data(slides(tmp_path, names, rows=rows), held_out=HeldOut(patients=("s3",)))
    assert module.problems == [] and [s.id for s in module.splits["val"]] == ["s3.tif"]


def test_a_table_of_slides_finds_features_that_are_named_by_keyed_hashes(tmp_path, monkeypatch):
    monkeypatch.setenv("DOMAINSSL_ID_KEY", "0123456789abcdef")
    files = ["TCGA-AA-0001-01.svs", "TCGA-AA-0001-02.svs", "TCGA-BB-0002-01.svs", "x/c.tif"]
    names = ids_of(files, "hashed")
    said = ["TCGA-AA-0001-01", "TCGA-AA-0001-02.svs", "TCGA-BB-0002-01", "x/c.tif"]
    rows = [{"slide_id": n, "label": "xyxy"[i]} for i, n in enumerate(said)]
    module = data(slides(tmp_path, names, rows=rows), held_out=HeldOut(patients=("TCGA-BB-0002",)))
    assert module.problems == [] and [s.id for s in module.splits["val"]] == [names[2]]
    assert [s.patient for s in sorted(module.splits["train"], key=lambda s: names.index(s.id))] == [
        "TCGA-AA-0001", "TCGA-AA-0001", "x/c.tif",
    ]  # fmt: skip
    (tmp_path / "manifest.csv").unlink()
    (tmp_path / "splits_0.csv").write_text(",train,val\n0,TCGA-AA-0001-01,TCGA-BB-0002-01\n")
    module = data(tmp_path, slides=SlideFiles(ids="plain", splits="splits_0.csv"))
    assert [s.id for s in module.splits["val"]] == [names[2]]


@pytest.mark.parametrize("kind", ["columns", "bool"])
def test_splits_of_clam_say_which_slide_is_where(tmp_path, kind):
    slides(tmp_path, cells=block(2, 2))
    texts = {
        "columns": ",train,val,test\n0,a,b.svs,c\n1,gone,,\n",
        "bool": ",train,val,test\na,True,False,False\nb,False,True,False\nc,False,False,True\n"
        "gone,True,False,False\n",
    }
    (tmp_path / "splits_0.csv").write_text(texts[kind])
    module = data(tmp_path, slides=SlideFiles(ids="plain", splits="splits_0.csv"))
    assert {k: [s.id for s in v] for k, v in module.splits.items()} == {
        "train": ["a"], "val": ["b"], "test": ["c"],
    }  # fmt: skip
    assert module.problems == [
        "1 slides of splits_0.csv have no features and are left out: gone",
        "1 slides are not in splits_0.csv and are left out: d",
    ]


@pytest.mark.parametrize(("label", "split"), [("y", "test"), ("", "val")])
def test_a_test_takes_the_test_split_unless_it_lacks_labels(tmp_path, label, split):
    table = [("a", "train", "x"), ("b", "val", "y"), ("c", "val", "x"), ("d", "test", label)]
    rows = [{"slide_id": n, "case_id": n, "split": s, "label": k} for n, s, k in table]
    module = data(slides(tmp_path, cells=block(2, 2), rows=rows))
    assert module.tested_split == split
    [batch] = module.test_dataloader()
    assert batch["id"] == {"test": ["d"], "val": ["b", "c"]}[split]
    assert (
        _tested_line(module)
        == {
            "test": "the 1 items of the test split",
            "val": "val, the held-out items that fit validates on: the 1 of test have no labels",
        }[split]
    )
    [batch] = module.val_dataloader()
    assert batch["id"] == ["b", "c"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train,val\na,b\nb,c\n", "'b' is in val and in train|'b' is in train and in val"),
        ("slide,label\na,1\n", "no column train, val or test, only slide, label"),
        (None, "there is no file"),
    ],
)
def test_other_files_of_splits_are_refused(tmp_path, text, reason):
    slides(tmp_path, cells=block(2, 2))
    if text is not None:
        (tmp_path / "s.csv").write_text(text)
    with pytest.raises((ConfigError, DataError), match=reason):
        data(tmp_path, slides=SlideFiles(splits="s.csv"))


def test_named_slides_are_held_out(tmp_path):
    slides(tmp_path, cells=block(2, 2))
    module = data(tmp_path, held_out=HeldOut(slides=("b", "d")))
    assert {k: [s.id for s in v] for k, v in module.splits.items()} == {
        "train": ["a", "c"], "val": ["b", "d"],
    }  # fmt: skip
    with pytest.raises(ConfigError, match="held_out.slides: no slide 'e' among 4"):
        data(tmp_path, held_out=HeldOut(slides=("e",)))


def test_patients_are_read_from_names(tmp_path):
    names = ("TCGA-AA-0001-01Z-00-DX1", "TCGA-AA-0001-01Z-00-DX2", "TCGA-AA-0002-01Z-00-DX1")
    module = data(slides(tmp_path, names), window=SlideWindow(size=2))
    assert {s.patient for s in module.found.items} == {"TCGA-AA-0001", "TCGA-AA-0002"}
    files = SlideFiles(patient=r"-(\d{4})-", ids="plain")
    assert {s.patient for s in data(tmp_path, slides=files).found.items} == {"0001", "0002"}
    with pytest.raises(ConfigError, match=r"slides\.patient.*finds no group"):
        data(tmp_path, slides=SlideFiles(patient="x(y)"))


def test_ids_tell_nothing_about_names_and_no_record_holds_paths(tmp_path):
    module = data(slides(tmp_path), slides=SlideFiles(), window=SlideWindow(size=2))
    ids = [item for batch in train(module) for item in batch["id"]]
    assert all(len(item) == 16 and int(item, 16) >= 0 for item in ids)
    assert str(tmp_path) in module.withheld and str(tmp_path) not in str(module.identity())


def test_what_is_missing_or_without_tissue_is_left_out_and_said(tmp_path):
    rows = [{"slide_id": name, "patient_id": name} for name in ("a", "b", "z")]
    slides(tmp_path, ("a", "b", "c", "d"), rows=rows)
    module = data(tmp_path, window=SlideWindow(size=2))
    assert module.problems == [
        "1 slides of manifest.csv have no features and are left out: z",
        "2 slides are not in manifest.csv and are left out: c, d",
    ]
    assert any("problem: 1 slides" in line for line in module.describe())
    empty = tmp_path / "empty"
    slides(empty)
    write_bag(empty, Bag(slide="e", features=np.zeros((0, D), np.float32), coords=np.zeros((0, 2))),
              "zarr")  # fmt: skip
    assert data(empty, window=SlideWindow(size=2)).problems == [
        "e: no tile (a slide without tissue)"
    ]


def test_files_of_another_encoder_or_resolution_are_refused(tmp_path):
    slides(tmp_path)
    with pytest.raises(DataError, match=r"4 features per tile, the configuration says 5.*dim to 4"):
        data(tmp_path, modalities={NAME: TileFeatures(dim=5)})
    for wrong in ({"encoder": "uni_v2"}, {"mpp_um": 0.25}):
        with pytest.raises(DataError, match=rf"{next(iter(wrong))} is .* the configuration says"):
            data(tmp_path, modalities={NAME: TileFeatures(dim=D, **wrong)})
    train(data(tmp_path, modalities={NAME: TileFeatures(dim=D, mpp_um=0.52)}))


def test_bags_of_another_encoder_or_resolution_among_others_are_left_out_or_told(tmp_path):
    slides(tmp_path, ("a", "b", "c", "d", "e"))
    for name, other in (("d", {"encoder": "conch"}), ("e", {"mpp_um": 1.0})):
        write_bag(tmp_path, replace(bag(name, block(8, 6)), **other), "zarr")
    encoders, sizes = data(tmp_path).problems
    assert (
        "features of 2 encoders of one width, which do not compare: uni_v1 (4 slides), " in encoders
    )
    assert "tiles of 2 resolutions: 0.5 um (4 slides), 1 um (1 slide). Set data.init_args" in sizes
    wanted = {NAME: TileFeatures(dim=D, encoder="uni_v1", mpp_um=0.5)}
    module = data(tmp_path, modalities=wanted)
    assert [slide.id for slide in module.found.items] == ["a", "b", "c"]
    assert [text.partition(": ")[2] for text in module.problems] == [
        "encoder is 'conch', the configuration says 'uni_v1'. The slide is left out.",
        "mpp_um is 1, the configuration says 0.5. The slide is left out.",
    ]


def test_the_resolution_of_tiles_follows_from_that_of_the_slide_in_the_table(tmp_path):
    for name in ("a", "b", "c"):
        places = {**TRIDENT, "target_magnification": "None", "level0_magnification": "None"}
        write(tmp_path / f"{name}.h5", LATTICE, attrs=places)
    table = "wsi,MPP\na.svs,0.25\nx/b.svs,0.5\nc.svs,0.22\n"  # tiles of 256 are 512 of level 0
    (tmp_path / "b.h5").rename(tmp_path / "x__b.h5")
    (tmp_path / "manifest.csv").write_text(table)
    module = data(tmp_path, modalities={NAME: TileFeatures(dim=8, mpp_um=0.5)})
    assert [slide.id for slide in module.found.items] == ["a", "c"]
    assert (
        "x__b.h5: mpp_um is 1 by the table of slides, the configuration says 0.5"
        in (module.problems[0])
    )


def test_bags_without_places_are_refused_with_the_file_that_lacks_them(tmp_path):
    for name in "ab":
        write(tmp_path / "h5_files" / f"{name}.h5", LATTICE)
    with pytest.raises(DataError, match=r"none of 2 slides is left.*patch_size.*patches"):
        data(tmp_path, modalities={NAME: TileFeatures(dim=8)}, global_batch_size=1)
    stated = SlideFiles(ids="plain", patch_size_level0=SIZE // 2)
    for files, step in ((SlideFiles(ids="plain"), SIZE), (stated, SIZE // 2)):  # neighbours tell it
        window = SlideWindow(mode="bag", tokens=len(LATTICE))
        module = data(
            tmp_path,
            modalities={NAME: TileFeatures(dim=8)},
            global_batch_size=1,
            window=window,
            slides=files,
        )
        [batch] = train(module)
        (x, y), found = batch[f"{NAME}.geo"][0].values()
        places = (batch[f"{NAME}.coords"][0] * found + torch.tensor([y, x])).flip(1).long()
        assert found == step and {*map(tuple, places.tolist())} == set(LATTICE)
    grid = data(tmp_path, modalities={NAME: TileFeatures(dim=8)}, slides=stated,
                window=SlideWindow(size=4), global_batch_size=1)  # fmt: skip
    assert train(grid)[0][f"{NAME}.geo"][0]["step"] == SIZE // 2
    with pytest.raises(ConfigError, match=r"slides\.patch_size_level0: got 0, expected 1 or more"):
        SlideFiles(patch_size_level0=0)


def test_both_layouts_of_the_sample_give_the_same_items(sample_root):
    found = []
    for root in ("sample:bags", "sample:bags_clam"):
        module = SlideFeatureDataModule(root=root, window=SlideWindow(size=6), global_batch_size=4)
        module.prepare_data()
        module.setup("fit")
        found.append(next(iter(module.train_dataloader())))
    ours, theirs = found
    assert ours["id"] == theirs["id"] and torch.equal(ours["label"], theirs["label"])
    torch.testing.assert_close(ours[NAME], theirs[NAME])
    assert ours[f"{NAME}.geo"] == theirs[f"{NAME}.geo"]


def test_a_whole_slide_is_a_batch_of_its_tiles(tmp_path):
    grid = to_grid(read_bag(write_bag(tmp_path, bag("a", [(0, 0), (2, 1)]), "zarr")))
    batch = batch_of_grid(grid)
    assert batch[NAME].shape == (1, 2, D)
    assert batch[f"{NAME}.coords"].tolist() == [[[0.0, 0.0], [2.0, 1.0]]]
    assert batch[NAME][0, :, :2].tolist() == [[0.0, 0.0], [2.0, 1.0]]


ODD = {  # bag -> what is said of it
    "shape": r"'coords' has the shape \(19, 3\)",
    "size": "tiles of 0 pixels overlap by 0",
    "tiling": "this is a file of the tiling step",
    "empty": "an empty file; the copy was lost",
    "page": r"no HDF5\. It holds a page of a web server",
    "other": "Name that of the features",
    "numpy": r"cannot be read \(UnpicklingError\).* Tensors alone are read",
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_bags_among_others_are_left_out_at_the_start(tmp_path, kind):
    for name in "ab":
        write(tmp_path / f"{name}.h5", LATTICE, attrs=TRIDENT)
    path = tmp_path / "x.h5"
    places = np.array(LATTICE)
    with h5py.File(path, "w") as file:
        file["features" if kind != "other" else "feats"] = np.ones((len(LATTICE), 8), np.float32)
        file["coords"] = places if kind != "shape" else np.pad(places, ((0, 0), (0, 1)))
        file["coords"].attrs.update({**TRIDENT, "patch_size_level0": 0 if kind == "size" else SIZE})
        if kind == "tiling":
            del file["features"]
    if kind in ("empty", "page"):
        path.write_text({"empty": "", "page": "<html>404</html>"}[kind])
    if kind == "numpy":
        path.unlink()
        torch.save(np.zeros((4, 8)), tmp_path / "x.pt")
    module = data(tmp_path, modalities={NAME: TileFeatures(dim=8)})
    (told,) = module.problems
    assert re.search(rf"x\.(h5|pt).*{ODD[kind]}.* The slide is left out\.", told)
    assert "\x1b" not in told and [slide.id for slide in module.found.items] == ["a", "b"]


def test_folders_and_tables_without_what_is_needed_say_what_they_hold(tmp_path):
    (tmp_path / "a.npy").touch()
    with pytest.raises(DataError, match=r"expected \.h5, .*It holds a\.npy\."):
        data(tmp_path)
    slides(tmp_path / "b", ("a",))
    for text, said in (
        ("slide_id\n", "has no row"),
        ("slide_id\nA\n", "such as 'A', has features"),
    ):
        (tmp_path / "b" / "manifest.csv").write_text(text)
        with pytest.raises(DataError, match=said):
            data(tmp_path / "b")
    (tmp_path / "b" / "manifest.csv").write_bytes("slide_id\n\xe4\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"no UTF-8 \(byte 9\)\. Save it as UTF-8"):
        data(tmp_path / "b")
    write(tmp_path / "c" / "a.h5", LATTICE)
    torch.save(torch.ones(2, 8), tmp_path / "c" / "a.pt")
    with pytest.raises(DataError, match=r"a\.h5 and a\.pt are both of the slide 'a'"):
        data(tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (np.nan, "10 of 19 tiles have features not finite"),
        (0, "10 of 19 tiles have nothing but zeros"), (3e9, "features reach 3e"),
        (None, "all 19 tiles have the same features"),
    ],
)  # fmt: skip
def test_features_that_no_encoder_writes_are_told_once(tmp_path, caplog, change, said):
    for name in "abcdef":
        made = bag(name, [(r, c) for r in range(1) for c in range(19)])
        values = np.ones_like(made.features) if change is None else made.features + 1
        if change is not None:
            values[::2] = change
        write_bag(tmp_path, replace(made, features=values), "trident")
    module = data(tmp_path, window=SlideWindow(size=2), held_out=HeldOut(val_fraction=0))
    train(module), train(module, 1)
    assert caplog.text.count(said) == 3 and "Further slides are not named" in caplog.text


def test_whole_numbers_among_fractions_are_told(tmp_path):
    for name, dtype in (("a", "float32"), ("b", "float16"), ("c", "int8")):
        write(tmp_path / f"{name}.h5", LATTICE, dtype, TRIDENT)
    (told,) = data(tmp_path, modalities={NAME: TileFeatures(dim=8)}).problems
    assert "c.h5: features of int8, as of 1 slide of 3; the others are fractions" in told


def test_choices_that_cannot_be_used_are_said(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'grid'"):
        SlideWindow(mode="gird")
    with pytest.raises(ConfigError, match=r"modalities: missing.*tile_features"):
        SlideFeatureDataModule(root=str(tmp_path))
    with pytest.raises(ConfigError, match=r"sample:bag'.*Did you mean 'bags'"):
        SlideFeatureDataModule(root="sample:bag", modalities={NAME: TileFeatures(dim=D)}).setup()
    assert math.prod(SlideWindow(size=5).shape) == 25 and TRIDENT["patch_size"] == 256


def test_bags_that_cannot_be_read_are_left_out_and_named(tmp_path):
    slides(tmp_path)
    (tmp_path / "b.zarr" / "features" / "zarr.json").write_text("{")
    write_bag(
        tmp_path, replace(bag("e", block(2, 2)), features=np.ones((4, 7), np.float32)), "zarr"
    )
    module = data(tmp_path)
    assert [s.id for s in module.found.items] == ["a", "c", "d"] and len(train(module)) == 1
    assert "b.zarr" in module.problems[0] and "The slide is left out." in module.problems[0]
    assert "e.zarr: 7 features per tile, the configuration says 4" in module.problems[1]
    job = tmp_path / "job"
    for name in "abc":
        write(job / "h5_files" / f"{name}.h5", LATTICE)
        write(job / "p" / f"{name}.h5", LATTICE, attrs=TRIDENT, features=False)
    (job / "p" / "a.h5").unlink()
    (job / "h5_files" / "b.h5").write_bytes(b"")
    given = {"modalities": {NAME: TileFeatures(dim=8)}, "global_batch_size": 1}
    module = data(job, slides=SlideFiles(patches="p"), held_out=HeldOut(val_fraction=0), **given)
    assert [s.id for s in module.found.items] == ["c"] and len(train(module)) == 1
    assert "a.h5 does not exist; expected the file of the tiling step" in module.problems[0]
    (job / "h5_files" / "c.h5").write_bytes(b"no HDF5")
    with pytest.raises(DataError, match=r"none of 3 slides is left\. .*a\.h5 does not exist"):
        data(job, slides=SlideFiles(patches="p"), **given)
    (job / "q").mkdir()
    with pytest.raises(DataError, match=r"neither a\.h5 nor a_patches\.h5, nor those of any of 3"):
        data(job, slides=SlideFiles(patches="q"), **given)
