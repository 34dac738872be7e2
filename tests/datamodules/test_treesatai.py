"""TreeSatAI Time Series: its layouts, its real tile, and what the embedded sample must teach."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from phenology_probe import date_features, items, probe, series_features

from domainssl.datamodules import TreeSatAIDataModule
from domainssl.datamodules.samples import treesatai as sample
from domainssl.errors import ConfigError, DataError
from domainssl.evaluation.probes import linear_probe_accuracy
from domainssl.evaluation.raw import band_statistics
from domainssl.io.series.tile import join_days, measured, typical_dates
from domainssl.io.series.treesatai import GENERA, TreeSatCatalogue, read_treesat, scan_treesat
from domainssl.loading.plan import Piece
from domainssl.modality import check_batch, collate
from domainssl.sources.dates import Dates
from domainssl.sources.windows import Window

ALL = ("aerial", "s2", "s1_asc", "s1_des")
BETULA = "Betula_spec._1_15679_WEFL_NLF"


@pytest.fixture(scope="module")
def root() -> Path:
    return sample.sample_root()


@pytest.fixture
def few(root: Path, tmp_path: Path) -> Path:
    """The first four training tiles in a folder of their own."""
    lines = (root / "train.csv").read_text().splitlines()[:5]
    for name in ("aerial", "sentinel-ts"):
        (tmp_path / name).mkdir()
    for line in lines[1:]:
        aerial, series = line.split(",")[:2]
        shutil.copy(root / "aerial" / aerial, tmp_path / "aerial")
        shutil.copy(root / "sentinel-ts" / series, tmp_path / "sentinel-ts")
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def opened(root: Path, **changes: Any) -> TreeSatAIDataModule:
    data = TreeSatAIDataModule(root=str(root), **{"global_batch_size": 4, **changes})
    data.setup("fit")
    return data


def catalogue(root: Path, modalities: tuple[str, ...] = ALL) -> TreeSatCatalogue:
    found = scan_treesat(str(root), "train", modalities)
    assert found is not None
    return found


def test_tiles_of_two_splits_are_told(few: Path) -> None:
    lines = (few / "train.csv").read_text().splitlines()
    (few / "val.csv").write_text("\n".join([*lines[:2], lines[1]]))
    several, torn = opened(few).problems
    assert "1 tiles are there several times in 'val'" in several
    assert "1 tiles of 'train' are also in 'val'" in torn


# The embedded sample -------------------------------------------------------------------------


def test_sample_is_small_balanced_and_laid_out_as_published(root: Path) -> None:
    import h5py
    import rasterio

    files = [p for p in root.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 50e6
    found = catalogue(root)
    assert found.names == GENERA and len(found.tiles) == 96
    dominant = [GENERA[int(np.argmax(tile.shares))] for tile in found.tiles]
    assert sorted(dominant.count(name) for name in sample.KINDS) == [24] * 4
    with h5py.File(root / "sentinel-ts" / found.tiles[0].sentinel) as file:
        assert sorted(file) == [
            "sen-1-asc-data", "sen-1-asc-products", "sen-1-des-data", "sen-1-des-products",
            "sen-2-data", "sen-2-masks", "sen-2-products",
        ]  # fmt: skip
        assert file["sen-2-data"].shape[1:] == (10, 6, 6) and file["sen-2-data"].dtype == "f4"
    with rasterio.open(root / "aerial" / found.tiles[0].aerial) as image:
        assert (image.count, image.height, image.width) == (4, 304, 304)
        assert image.crs.to_epsg() == 25832 and image.res == (0.2, 0.2)


def test_sample_is_the_same_every_time(root: Path, tmp_path: Path) -> None:
    kinds = np.random.default_rng([sample._SEED, 5]).permutation(np.arange(96) % 4)
    for name in ("aerial", "sentinel-ts"):
        (tmp_path / name).mkdir()
    row = sample._tile(tmp_path, "train", kinds, 3)
    again = read_treesat(catalogue(root), catalogue(root).tiles[3], ALL)
    assert catalogue(root).tiles[3].aerial == row[0]
    (tmp_path / "train.csv").write_text(
        ",".join(["aerial_name", "sen_name", "aerial_date", *GENERA])
        + "\n"
        + ",".join(map(str, row))
    )
    made = read_treesat(catalogue(tmp_path), catalogue(tmp_path).tiles[0], ALL)
    assert np.array_equal(made.images["aerial"].values, again.images["aerial"].values)
    for name, series in again.series.items():
        assert np.array_equal(made.series[name].values, series.values, equal_nan=True)


def test_time_matters_in_the_sample(root: Path) -> None:
    data = opened(root, modalities={"s2": "s2"}, dates=Dates(min_valid_fraction=0.9))
    train, held_out = items(data, "train"), items(data, "val")
    dates = [
        probe(train, held_out, lambda x, day=day: date_features(x, "s2", day))
        for day in (120, 140, 275, 295)
    ]
    series = probe(train, held_out, lambda x: series_features(x, "s2"))
    assert max(dates) < 0.5  # a tile is the mean of 36 cells, each with gains of its own
    assert series > max(dates) + 0.3


def test_histograms_of_aerial_bands_do_not_tell_the_genera(root: Path) -> None:
    data = opened(root, modalities={"aerial": "aerial"})
    batch = collate(items(data, "val"))
    raw = band_statistics(batch, data.modalities["aerial"])
    assert linear_probe_accuracy(raw, batch["label"]) < 0.35  # chance is 0.25


def test_batches_mix_lengths_and_hold_what_the_modalities_say(root: Path) -> None:
    data = opened(root, global_batch_size=48)
    batches = list(data.train_dataloader())
    assert [len(batch["id"]) for batch in batches] == [48, 48]
    for batch in batches:
        check_batch(batch, data.modalities, training=True)
        frames = batch["s2.frames"].sum(1)
        assert len(frames.unique()) > 1 and frames.max() == batch["s2"].shape[1]
        padded = ~batch["s2.frames"]
        assert not batch["s2.valid"][padded].any() and not batch["s2"][padded].any()
        assert (batch["s2.dates"][~padded] > 17_000).all()
    absent = torch.cat([~batch["s1_des.present"] for batch in batches])
    assert 0 < absent.sum() < 10  # some tiles were never seen on descending passes


def test_the_dates_drawn_of_one_series_say_nothing_about_those_of_another(root: Path) -> None:
    data = opened(root, dates=Dates(max_dates=8))
    source = data._sources["train"]
    ranks = []  # place of each drawn date among all of its series
    for block in range(24):
        drawn, whole = (
            replace(source, dates=Dates(max_dates=most)).load(Piece(block, 0, 1), 0).data
            for most in (8, None)
        )
        pair = []
        for name in ("s1_asc", "s1_des"):
            days = whole[f"{name}.dates"][0]
            pair.append(torch.isin(days, drawn[f"{name}.dates"][0])[:27].numpy())
        if all(len(place) == 27 for place in pair):  # some were never seen on descending passes
            ranks.append(pair)
    assert len(ranks) > 16
    a, b = (np.concatenate([pair[i] for pair in ranks]) for i in range(2))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.15


def test_modality_sizes_follow_the_footprint() -> None:
    data = TreeSatAIDataModule(root="no/such/folder", window=Window(size=40.0, unit="m"))
    assert {m: x.size[0] for m, x in data.modalities.items()} == {
        "aerial": 200, "s2": 4, "s1_asc": 4, "s1_des": 4,
    }  # fmt: skip
    assert data.context_size == (200, 200)


def test_a_tile_gives_several_windows_and_is_read_once(few: Path, monkeypatch: Any) -> None:
    data = opened(few, window=Window(size=20.0, unit="m"), windows_per_tile=3)
    source = data._sources["train"]
    read = []
    own = type(source.tiles).read
    monkeypatch.setattr(type(source.tiles), "read", lambda s, n: read.append(n) or own(s, n))
    rows = source.load(Piece(1, 0, 3), 0)
    assert read == [1] and rows.count == 3 and len(set(rows.data["id"])) == 3
    corners = {(g["c"], g["f"], g["a"], g["e"]) for g in rows.data["s2.geo"]}
    assert len(corners) > 1
    assert data._sources["predict"].sizes == [1] * 4  # held-out tiles give their middle
    with pytest.raises(ConfigError, match=r"windows_per_tile: got 0, expected at least 1"):
        TreeSatAIDataModule(windows_per_tile=0)


# Labels, layouts, errors ---------------------------------------------------------------------


def test_labels_are_the_largest_genus_and_all_above_the_threshold(few: Path) -> None:
    data = opened(few, label_threshold=0.2)
    batch = next(iter(data.predict_dataloader()))
    for i, tile in enumerate(data.catalogues["train"].tiles):
        shares = np.array(tile.shares)
        assert int(batch["label"][i]) == shares.argmax()
        assert batch["label_multi"][i].tolist() == (shares > 0.2).tolist()
    assert data.label_names == GENERA and data.num_classes == 15


def test_lists_of_file_names_with_labels_in_json_are_read_alike(few: Path) -> None:
    by_table = opened(few)
    tiles = by_table.catalogues["train"].tiles
    labels = {
        tile.aerial: [[GENERA[k], s] for k, s in enumerate(tile.shares) if s] for tile in tiles
    }
    (few / "train.csv").unlink()
    (few / "train_filenames.lst").write_text("\n".join(t.aerial for t in tiles) + "\n")
    (few / "labels").mkdir()
    (few / "labels/TreeSatBA_v9_60m_multi_labels.json").write_text(json.dumps(labels))
    by_list = opened(few).catalogues["train"].tiles
    assert [(t.aerial, t.sentinel, t.shares) for t in by_list] == [
        (t.aerial, t.sentinel, t.shares) for t in tiles
    ]
    labels = {f"x{name}": shares for name, shares in labels.items()}
    (few / "labels/TreeSatBA_v9_60m_multi_labels.json").write_text(json.dumps(labels))
    with pytest.raises(DataError, match=r"names none of the 4 tiles .*: it has 'x.*', the list"):
        opened(few)


def test_tiles_that_lack_a_file_are_left_out_and_counted(few: Path) -> None:
    gone = catalogue(few).tiles[1]
    (few / "sentinel-ts" / gone.sentinel).unlink()
    data = opened(few, global_batch_size=3)
    assert len(data.catalogues["train"].tiles) == 3
    assert any("1 of 4 tiles" in line and gone.id in line for line in data.describe())
    assert len(opened(few, modalities={"aerial": "aerial"}).catalogues["train"].tiles) == 4


def test_a_folder_without_any_complete_tile_is_refused(few: Path) -> None:
    shutil.rmtree(few / "aerial")
    with pytest.raises(DataError, match="none of its 4 tiles has all its files"):
        opened(few)


def test_unreadable_and_misshapen_files_are_named(few: Path) -> None:
    import h5py

    found = catalogue(few)
    path = few / "sentinel-ts" / found.tiles[0].sentinel
    with h5py.File(path, "a") as file:
        names = file["sen-2-products"][:-1]
        del file["sen-2-products"]
        file["sen-2-products"] = names
    with pytest.raises(DataError, match=rf"{path.name}: sen-2-data has the shape"):
        read_treesat(found, found.tiles[0], ALL)
    path.write_bytes(b"not hdf5")
    with pytest.raises(DataError, match=rf"{path.name}: the HDF5 cannot be read"):
        read_treesat(found, found.tiles[0], ALL)
    image = few / "aerial" / found.tiles[0].aerial
    image.write_bytes(b"not a tif")
    with pytest.raises(DataError, match=rf"{image.name}: not recognized as GeoTIFF"):
        read_treesat(found, found.tiles[0], ALL)
    table = few / "train.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:3])[:-30])
    with pytest.raises(DataError, match=r"train.csv, line 3: \d+ cells, the header has 18.*cut"):
        catalogue(few)


def test_a_bad_tile_is_replaced_on_request(few: Path) -> None:
    first = catalogue(few).tiles[0]
    (few / "sentinel-ts" / first.sentinel).write_bytes(b"")
    from domainssl.loading.source import Loading

    data = opened(few, on_bad_sample="replace", loading=Loading(workers=0, max_bad_fraction=0.5))
    batch = next(iter(data.train_dataloader()))
    assert len(batch["id"]) == 4 and first.id not in batch["id"]


def test_misspelled_modalities_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="'s1_dec'.*Did you mean 's1_des'"):
        TreeSatAIDataModule(modalities={"s2": "s2", "s1_des": "s1_dec"})


def test_a_modality_keeps_its_content_under_another_key(few: Path) -> None:
    given = {"global_batch_size": 2, "dates": Dates(max_dates={"optical": 4})}
    renamed = opened(few, modalities={"optical": "s2", "photo": "aerial"}, **given)
    given["dates"] = Dates(max_dates={"s2": 4})
    plain = opened(few, modalities={"s2": "s2", "aerial": "aerial"}, **given)
    ours, theirs = (next(iter(data.train_dataloader())) for data in (renamed, plain))
    assert torch.equal(ours["optical"], theirs["s2"]) and ours["optical"].shape[1] == 4
    assert torch.equal(ours["photo"], theirs["aerial"])
    assert renamed.modalities["photo"].gsd_m == 0.2


# The real tile -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(shared_data: Path) -> Path:
    folder = shared_data / "eo" / "treesatai_ts"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return folder


def test_real_tile_has_the_published_values(real: Path) -> None:
    found = catalogue(real)
    tile = read_treesat(found, found.tiles[0], ALL)
    s2 = tile.series["s2"]
    assert s2.values[0, :, 0, 0].tolist() == [
        2786, 2542, 2460, 2774, 2860, 2827, 2980, 2898, 1996, 1452,
    ]  # fmt: skip
    assert s2.values.mean(dtype=np.float64) == pytest.approx(4222.278653, abs=1e-5)
    clear = s2.cloud.max((1, 2)) == 0
    assert clear.sum() == 38
    assert s2.values[clear].mean((0, 2, 3), dtype=np.float64) == pytest.approx(
        [482.73, 652.61, 589.43, 1058.26, 2142.32, 2509.29, 2737.60, 2803.67, 2028.46, 1197.20],
        abs=0.006,
    )
    year = np.datetime64("2019-01-01", "D").astype(int)
    assert (s2.days[:3] - year + 1).tolist() == [3, 5, 8] and s2.days[-1] - year + 1 == 365
    aerial = tile.images["aerial"]
    assert aerial.values.mean((1, 2)) == pytest.approx(
        [172.9666, 83.2738, 83.1215, 69.7436], abs=1e-4
    )
    assert aerial.crs == 25832 and aerial.corner == pytest.approx((428370.0, 5862962.2))


def test_real_radar_zeros_and_nan_are_not_valid_and_nothing_else_is(real: Path) -> None:
    found = catalogue(real)
    series = read_treesat(found, found.tiles[0], ("s1_asc", "s1_des")).series
    asc, des = series["s1_asc"].values, series["s1_des"].values
    assert (asc == 0).sum() == 9 and not np.isnan(asc).any()
    assert np.flatnonzero((asc == 0).any((1, 2, 3))).tolist() == [7, 8, 40, 47, 54, 58]
    assert np.flatnonzero(np.isnan(des).any((1, 2, 3))).tolist() == [61, 62]
    assert np.isnan(des).sum() == 4 and (des == 0).sum() == 4
    _, valid = measured(asc, "linear")
    assert valid.mean() == pytest.approx(0.997826, abs=1e-6)
    values, valid = measured(des, "linear")
    assert (~valid).sum() == 6 and valid.size == 8460 and np.isfinite(values).all()
    for power, mean in ((asc, (-11.3593, -17.2561)), (des, (-10.3076, -16.4635))):
        for channel in range(2):
            x = power[:, channel]
            positive = x[x > 0]
            alone = np.stack([positive, positive])[None, :, None]  # (1, 2, 1, n)
            db, _ = measured(alone, "linear")
            assert db.mean(dtype=np.float64) == pytest.approx(mean[channel], abs=1e-4)


def test_real_passes_seen_twice_become_one_date(real: Path) -> None:
    found = catalogue(real)
    series = read_treesat(found, found.tiles[0], ("s1_des",)).series["s1_des"]
    values, valid = measured(series.values, "linear")
    joined = join_days(values, valid, series.days, ~valid)
    assert len(series.days) == 235 and len(joined[2]) == 121
    data = opened(real, global_batch_size=1)
    batch = next(iter(data.predict_dataloader()))
    assert batch["s1_des"].shape == (1, 121, 2, 6, 6) and batch["s2"].shape[1] == 146
    assert batch["label"].tolist() == [0]
    assert batch["label_multi"].nonzero()[:, 1].tolist() == [0, 13]  # Betula, Picea
    assert batch["aerial"].shape == (1, 4, 300, 300)
    assert str(batch["aerial.dates"].numpy().astype("datetime64[D]")[0]) == "2019-07-01"


def test_typical_dates_of_the_real_tile_are_those_of_the_reference(real: Path) -> None:
    found = catalogue(real)
    series = read_treesat(found, found.tiles[0], ALL).series
    s2 = series["s2"]
    assert typical_dates(s2.values, s2.cloud > 0, 16, 0).tolist() == [
        8, 15, 22, 34, 41, 52, 62, 71, 75, 81, 94, 105, 110, 120, 131, 138,
    ]  # fmt: skip
    expected = {("s1_asc", 0): [15, 35, 76, 95], ("s1_asc", 3): [15, 35, 76, 98],
                ("s1_des", 0): [41, 87, 145, 209]}  # fmt: skip
    for (name, offset), places in expected.items():
        values = series[name].values
        masked = np.isnan(values).any(1)
        last = typical_dates(values, masked, 4, offset).tolist()
        assert last[-1] == places[-1] and (offset or last == places)


def test_real_tile_aligns_aerial_and_series(real: Path) -> None:
    data = opened(real, global_batch_size=1, window=Window(size=30.0, unit="m"))
    rows = data._sources["train"].load(Piece(0, 0, 1), 2).data
    fine, coarse = rows["aerial.geo"][0], rows["s2.geo"][0]
    assert fine["c"] == pytest.approx(coarse["c"]) and fine["f"] == pytest.approx(coarse["f"])
    assert coarse["a"] == pytest.approx(50 * fine["a"]) and fine["crs"] == 25832
