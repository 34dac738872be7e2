"""PASTIS: windows, crop types, SPOT, its table, and what the embedded sample must teach."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from phenology_probe import date_features, items, probe, series_features

from domainssl.datamodules import PastisDataModule
from domainssl.datamodules.samples import pastis as sample
from domainssl.errors import ConfigError, DataError
from domainssl.io.series.pastis import CLASSES, SPOT_FOLDER, read_pastis, scan_pastis
from domainssl.loading.counts import unit_counts
from domainssl.loading.plan import Piece
from domainssl.loading.source import Loading
from domainssl.modality import check_batch
from domainssl.sources.dates import Dates
from domainssl.sources.windows import Window

ALL = {name: name for name in ("s2", "s1_asc", "s1_des", "spot")}


@pytest.fixture(scope="module")
def root() -> Path:
    return sample.sample_root()


@pytest.fixture
def few(root: Path, tmp_path: Path) -> Path:
    """The first patch of each fold in a folder of their own."""
    table = json.loads((root / "metadata.geojson").read_text())
    table["features"] = table["features"][:5]
    (tmp_path / "metadata.geojson").write_text(json.dumps(table))
    names = [feature["id"] for feature in table["features"]]
    for folder in ("DATA_S2", "DATA_S1A", "DATA_S1D", SPOT_FOLDER, "ANNOTATIONS"):
        (tmp_path / folder).mkdir(parents=True)
        for path in (root / folder).iterdir():
            if path.stem.rsplit("_", 1)[1] in names:
                shutil.copy(path, tmp_path / folder)
    return tmp_path


def opened(root: Path, **changes: Any) -> PastisDataModule:
    given = {"global_batch_size": 4, "modalities": ALL, **changes}
    data = PastisDataModule(root=str(root), **given)
    data.setup("fit")
    return data


def test_sample_is_small_and_laid_out_as_published(root: Path) -> None:
    import rasterio

    assert sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) <= 50e6
    features = json.loads((root / "metadata.geojson").read_text())["features"]
    folds = [feature["properties"]["Fold"] for feature in features]
    assert [folds.count(fold) for fold in range(1, 6)] == [10] * 5
    first = features[0]["properties"]
    s2 = np.load(root / "DATA_S2" / f"S2_{first['ID_PATCH']}.npy")
    assert s2.dtype == np.int16 and s2.shape == (len(first["dates-S2"]), 10, 32, 32)
    assert list(first["dates-S2"])[:2] == ["0", "1"] and first["dates-S2"]["0"] > 20180900
    radar = np.load(root / "DATA_S1A" / f"S1A_{first['ID_PATCH']}.npy")
    assert radar.shape[1] == 3 and np.allclose(radar[:, 2], radar[:, 0] - radar[:, 1])
    target = np.load(root / "ANNOTATIONS" / f"TARGET_{first['ID_PATCH']}.npy")
    assert target.shape == (3, 32, 32) and set(np.unique(target[0])) <= {0, *sample.KINDS, 19}
    spot = root / SPOT_FOLDER / f"SPOT6_RVB_1M00_2019_{first['ID_PATCH']}.tif"
    with rasterio.open(spot) as image:
        assert (image.count, image.height, image.res) == (3, 320, (1.0, 1.0))


def test_time_matters_in_the_sample(root: Path) -> None:
    data = opened(root, modalities={"s1_asc": "s1_asc"}, windows_per_patch=4)
    train, held_out = items(data, "train"), items(data, "val")
    dates = [
        probe(train, held_out, lambda x, day=day: date_features(x, "s1_asc", day))
        for day in (100, 140, 270, 295)
    ]
    series = probe(train, held_out, lambda x: series_features(x, "s1_asc"))
    assert max(dates) < 0.5
    assert series > max(dates) + 0.15


def test_batches_hold_windows_of_all_sensors_and_their_classes(root: Path) -> None:
    data = opened(root, global_batch_size=16, windows_per_patch=2)
    batches = list(data.train_dataloader())
    assert len(batches) == 3
    for batch in batches:
        check_batch(batch, data.modalities, training=True)
        assert batch["s2"].shape[2:] == (10, 16, 16) and batch["spot"].shape == (16, 3, 160, 160)
        assert batch["s1_asc"].shape[2] == 2  # the difference of VV and VH is left out
        assert batch["mask"].shape == (16, 16, 16) and batch["mask"].dtype == torch.int64
        assert set(batch["mask"].unique().tolist()) <= {-1, 0, *sample.KINDS}
    ids = [name for batch in batches for name in batch["id"]]
    assert len(set(ids)) == 48


def test_the_label_is_the_crop_that_covers_most_of_the_window(few: Path) -> None:
    data = opened(few, window=Window(size=320.0, unit="m"), global_batch_size=1)
    for number, patch in enumerate(data.catalogues["train"].patches):
        target = np.load(few / "ANNOTATIONS" / f"TARGET_{patch.id}.npy")[0]
        rows = data._sources["train"].load(Piece(number, 0, 1), 0).data
        counts = [(target == k).sum() for k in range(19)]
        assert int(rows["label"][0]) == 1 + int(np.argmax(counts[1:]))
        assert rows["label_multi"][0].tolist() == [bool(c) for c in counts[1:]]
        assert (rows["mask"][0] == -1).sum() == (target == 19).sum() > 0
    assert data.label_names == CLASSES and data.num_classes == 19


def test_windows_without_a_crop_are_background_and_void_ones_unknown(few: Path) -> None:
    data = opened(few, global_batch_size=1)
    tiles = data._sources["train"].tiles  # type: ignore[attr-defined]
    assert tiles.labels(0, np.zeros((4, 4)))["label"] == 0
    assert tiles.labels(0, np.full((4, 4), 19))["label"] == -1


@pytest.mark.parametrize("epoch", range(3))
def test_windows_of_spot_series_and_classes_are_cut_alike(few: Path, epoch: int) -> None:
    patch = scan_pastis(str(few), (1,), ALL).patches[0]  # type: ignore[union-attr]
    row, column = np.mgrid[:32, :32]
    target = np.stack([(row + column) % 18 + 1] * 3).astype(np.uint8)
    np.save(few / "ANNOTATIONS" / f"TARGET_{patch.id}.npy", target)
    path = few / "DATA_S2" / f"S2_{patch.id}.npy"
    np.save(path, np.broadcast_to(target[0], np.load(path).shape).astype(np.int16))
    import rasterio

    spot = target[0].repeat(10, 0).repeat(10, 1)
    with rasterio.open(few / SPOT_FOLDER / f"SPOT6_RVB_1M00_2019_{patch.id}.tif", "r+") as file:
        file.write(np.stack([spot] * 3))
    data = opened(few, folds={"train": [1]}, global_batch_size=1)
    rows = data._sources["train"].load(Piece(0, 0, 1), epoch).data
    assert torch.equal(rows["s2"][0, 0, 0].long(), rows["mask"][0])
    assert torch.equal(rows["spot"][0, 0, ::10, ::10].long(), rows["mask"][0])


def test_days_and_most_dates(few: Path) -> None:
    whole = opened(few, global_batch_size=1)
    patch = whole.catalogues["train"].patches[0]
    assert patch.days["s2"][0] > 17_700 and list(patch.days["s2"]) == sorted(patch.days["s2"])
    data = opened(few, dates=Dates(max_dates={"s2": 5}), global_batch_size=1)
    rows = data._sources["train"].load(Piece(0, 0, 1), 0).data
    assert rows["s2.dates"].shape == (1, 5) and set(rows["s2.dates"][0].tolist()) <= set(
        patch.days["s2"]
    )
    assert rows["s1_asc.dates"].shape[1] == len(patch.days["s1_asc"])


def test_folds_are_kept_apart() -> None:
    with pytest.raises(ConfigError, match="each in one of them"):
        PastisDataModule(folds={"val": [3]})
    with pytest.raises(ConfigError, match="folds from 1 to 5"):
        PastisDataModule(folds={"train": [0, 1]})


def test_windows_larger_than_a_patch_are_refused(few: Path) -> None:
    with pytest.raises(ConfigError, match=r"32 x 32 px.*takes 64"):
        opened(few, window=Window(size=640.0, unit="m"))


def test_patches_that_lack_a_file_are_left_out_and_counted(few: Path) -> None:
    (few / "DATA_S1D" / "S1D_10000.npy").unlink()
    data = opened(few, global_batch_size=2)
    assert [patch.id for patch in data.catalogues["train"].patches] == ["10001", "10002"]
    assert any("1 of 3 patches have no s1_des" in line for line in data.describe())


def test_a_damaged_first_patch_does_not_end_the_scan(few: Path) -> None:
    first = min((few / "ANNOTATIONS").iterdir())
    for path in few.rglob(f"*_{first.stem.rsplit('_', 1)[1]}.*"):
        path.write_bytes(b"")
    found = scan_pastis(str(few), (1, 2, 3, 4, 5), ["s2"])
    assert found is not None and found.side == 32 and len(found.patches) == 5


def test_arrays_that_contradict_the_table_are_named(few: Path) -> None:
    found = scan_pastis(str(few), (1,), ALL)
    assert found is not None
    path = few / "DATA_S2" / "S2_10000.npy"
    np.save(path, np.load(path)[1:])
    with pytest.raises(DataError, match=r"S2_10000.npy: got the shape .* 'dates-S2'"):
        read_pastis(found, found.patches[0], ALL)


def test_a_table_with_dates_as_text_is_read_alike(few: Path) -> None:
    before = scan_pastis(str(few), (1, 2), ALL)
    table = json.loads((few / "metadata.geojson").read_text())
    for feature in table["features"]:
        for name in ("dates-S2", "dates-S1A", "dates-S1D"):
            feature["properties"][name] = json.dumps(feature["properties"][name])
    (few / "metadata.geojson").write_text(json.dumps(table))
    after = scan_pastis(str(few), (1, 2), ALL)
    assert before is not None and after is not None and before.patches == after.patches


def test_a_table_of_another_kind_is_refused(few: Path) -> None:
    (few / "metadata.geojson").write_text('{"features": [{"properties": {"id": 3}}]}')
    with pytest.raises(DataError, match="ID_PATCH"):
        opened(few)


def test_a_tenth_of_the_crops_are_eight_patches_with_all_of_them() -> None:
    data = PastisDataModule(
        root="sample:crops", windows_per_patch=16, loading=Loading(train_fraction=0.1)
    )
    data.prepare_data()
    data.setup("fit")
    assert {"s2", "s1_asc", "s1_des"} == set(data.modalities)
    counts = unit_counts(data.source("train"), "mask", len(CLASSES))
    assert [counts[kind] for kind in (0, *sample.KINDS)] == [8] * 5 and sum(counts) == 40
    ours, others = (sample.SAMPLES[name] for name in ("crops", "pastis"))
    assert ours.first >= others.first + len(others.folds)
