"""BigEarthNet v2, EuroSAT-SAR, DFC2020 and FLAIR-HUB: layouts, classes, splits, missing parts."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from benchmark_files import FLAIR, S2_PATCH, bigearthnet, dfc2020, eurosat, flair_hub, tif

from domainssl.datamodules.bigearthnet import BigEarthNetV2
from domainssl.datamodules.dataset import DatasetClass, DatasetDataModule
from domainssl.datamodules.dfc2020 import DFC2020
from domainssl.datamodules.eurosat_sar import EuroSATPairs, EuroSATSAR
from domainssl.datamodules.flair_hub import FlairHub
from domainssl.errors import ConfigError, DataError
from domainssl.inspection.recognise import inspect_path
from domainssl.loading.plan import Piece
from domainssl.loading.source import Loading

PLACE = "domainssl.datamodules."


def _data(root: Path, name: str, arguments: dict[str, Any] | None = None) -> DatasetDataModule:
    data = DatasetDataModule(
        root=str(root), dataset=DatasetClass(PLACE + name, arguments or {}), global_batch_size=1,
        loading=Loading(workers=0),
    )  # fmt: skip
    data.setup("fit")
    return data


def _first(data: DatasetDataModule, split: str = "train") -> dict[str, Any]:
    rows = data.source(split).load(Piece(0, 0, 1), 0)
    assert not rows.bad
    return {name: np.asarray(value)[0] for name, value in rows.data.items()}


def test_bigearthnet_has_twelve_bands_on_one_grid_and_radar_in_decibels(tmp_path: Path) -> None:
    data = _data(bigearthnet(tmp_path), "bigearthnet.BigEarthNetV2")
    assert len(data.classes or ()) == 19 and data.modalities["s2"].channels[-1] == "B12"
    item = _first(data)
    assert item["id"] == f"{S2_PATCH[:-1]}0"
    assert item["s2"].shape == (12, 120, 120) and item["s1"].dtype == np.float32
    numbers = [101, 102, 103, 104, 105, 106, 107, 108, 180, 109, 111, 112]
    assert item["s2"][:, 7, 7].tolist() == numbers
    assert item["s1"][:, 7, 7].tolist() == [-10.25, -17.75]  # not cut to whole numbers, VV first
    assert np.flatnonzero(item["label_multi"]).tolist() == [4, 17]
    assert item["mask"][[0, 10, 20], 0].tolist() == [-1, 17, 4]
    assert _first(data, "val")["id"] == f"{S2_PATCH[:-1]}1"
    assert len(BigEarthNetV2(str(tmp_path), "test")) == 1
    with pytest.raises(DataError, match="names no patch of the split 'test'"):
        BigEarthNetV2(str(tmp_path), "test", clear_only=True)


def test_eurosat_sar_alone_and_beside_eurosat(tmp_path: Path) -> None:
    radar = eurosat(tmp_path / "sar", is_radar=True)
    data = _data(radar, "eurosat_sar.EuroSATSAR")
    assert sum(data.source("train").sizes) == 12 and sum(data.source("val").sizes) == 4
    item = _first(data, "val")
    assert item["id"] == "AnnualCrop_3" and item["label"] == 0 and (item["s1"] == -5.5).all()
    optical = eurosat(tmp_path / "ms", is_radar=False)
    both = _data(radar, "eurosat_sar.EuroSATPairs", {"optical": str(optical)})
    # EuroSAT stores B8A last
    assert _first(both)["s2"][:, 0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 13, 9, 10, 11, 12]


def test_classes_and_patches_that_eurosat_lacks_are_told(tmp_path: Path) -> None:
    radar = eurosat(tmp_path / "sar", is_radar=True)
    optical = eurosat(tmp_path / "ms", is_radar=False)
    (radar / "SeaLake" / "SeaLake_4.tif").unlink()
    (optical / "AnnualCrop").rename(optical / "annualcrop")
    found = EuroSATPairs(str(radar), str(optical))
    assert [found[i]["id"] for i in range(3)] == ["SeaLake_1", "SeaLake_2", "SeaLake_5"]
    told = "; ".join(found.problems)
    assert "annualcrop: not read, the class is called AnnualCrop" in told
    assert "HerbaceousVegetation: no patch such as" in told and "no folder Forest/" in told
    assert f"{radar}: 10 patches without a partner are left out, such as AnnualCrop/" in told
    assert f"{optical}: 1 patches without a partner are left out, such as SeaLake/SeaLake_4" in told
    data = _data(radar, "eurosat_sar.EuroSATPairs", {"optical": str(optical)})
    assert set(found.problems) < set(data.problems) and f"problem: {data.problems[0]}" in \
        data.describe()  # fmt: skip
    (optical / "SeaLake").rename(optical / "Lake")
    with pytest.raises(DataError, match="no patch has the name .* it holds nothing, that of the"):
        EuroSATPairs(str(radar), str(optical))


def test_tables_that_name_other_patches_are_refused(tmp_path: Path) -> None:
    root = bigearthnet(tmp_path / "ben")
    for sensor in ("S1", "S2"):
        [own] = (root / f"BigEarthNet-{sensor}").iterdir()
        own.rename(own.with_name("of_another_release"))
        with pytest.raises(DataError, match=rf"none of its 1 patches .* is in .*{sensor}: it names "
                           r".*_\d+, there is of_another_release"):  # fmt: skip
            BigEarthNetV2(str(root))
        own.with_name("of_another_release").rename(own)
    (tmp_path / "flair").mkdir()
    root = flair_hub(tmp_path / "flair")
    (root / "GLOBAL_ALL_MTD" / "GLOBAL_SENTINEL2_MTD_DATES.gpkg").unlink()
    told = FlairHub(str(root)).problems
    assert "no GLOBAL_ALL_MTD/GLOBAL_SENTINEL2_MTD_DATES.gpkg, so dates of 's2'" in told[0]
    assert "'s1_asc'" in told[1] and len(told) == 2  # there is no series of the other orbit
    (root / "D012-2019_AERIAL_RGBI").rename(root / "D013-2019_AERIAL_RGBI")
    with pytest.raises(DataError, match=r"none of its 1 patches is there: it names .*, and .* D01"):
        FlairHub(str(root))


def test_dfc2020_has_eight_classes_and_cirrus_of_zero(tmp_path: Path) -> None:
    data = _data(dfc2020(tmp_path), "dfc2020.DFC2020")
    item = _first(data)
    assert item["id"] == "ROIs0000_test_s1_0_p2" and item["label"] == 7
    assert item["mask"][[0, 16, 20], 0].tolist() == [0, -1, 7]
    valid = item["s2.valid"]
    assert not valid[0, 0] and valid[0, 1:].all() and item["s2"][10].max() == 0
    assert _first(data, "val")["id"] == "ROIs0000_validation_s1_0_p32"
    path = tmp_path / "ROIs0000_test" / "dfc_0" / "ROIs0000_test_dfc_0_p2.tif"
    tif(path, np.full((1, 256, 256), 11, np.uint8))
    with pytest.raises(DataError, match="holds the class 11, expected 1 to 10"):
        DFC2020(str(tmp_path))[0]


def test_flair_hub_has_images_series_with_dates_and_missing_sensors(tmp_path: Path) -> None:
    data = _data(flair_hub(tmp_path), "flair_hub.FlairHub", {"cloud_percent": 10})
    item = _first(data)
    assert item["id"] == f"{FLAIR[:-1]}0" and item["aerial"][:, 0, 0].tolist() == [10, 11, 12, 13]
    assert item["s2"].shape == (3, 10, 10, 10) and item["s2"][2, :, 9, 9].tolist() == \
        list(range(120, 130))  # fmt: skip
    days = [str(np.datetime64(int(day), "D")) for day in item["s2.dates"]]
    assert days == ["2019-01-01", "2019-01-02", "2019-01-03"]
    assert not item["s2.valid"][1, :5].any() and item["s2.valid"][1, 5:].all()
    np.testing.assert_allclose(item["s1_asc"][0], -10, rtol=1e-6)
    assert item["s1_asc.dates"].tolist() == [0, 0, 0] and not item["s1_des.present"]
    assert not item["dem.valid"][0, 0] and item["dem"][1, 5, 5] == 250.5
    assert item["mask"][[0, 100], 0].tolist() == [-1, 6] and item["label"] == 6
    held = _first(data, "val")
    present = {name: bool(held[f"{name}.present"]) for name in data.modalities}
    assert [name for name in present if present[name]] == ["aerial"]
    assert FlairHub(str(tmp_path), max_dates=2)[0]["s2_dates"].tolist() == [17897, 17899]


def test_patches_of_two_splits_and_equal_splits_are_told(tmp_path: Path) -> None:
    root = flair_hub(tmp_path)
    rows = (root / "FLAIR-HUB_TRAIN.csv").read_text().splitlines()
    (root / "FLAIR-HUB_VALID.csv").write_text("\n".join([*rows, rows[1]]))
    several, torn = [p for p in _data(root, "flair_hub.FlairHub").problems if "items" in p]
    assert "1 items are there several times in 'val'" in several and FLAIR in several
    assert "1 items of 'train' are also in 'val'" in torn
    splits: dict[str, Any] = {"train": {"split": "train"}, "val": {"split": "train"}}
    data = DatasetDataModule(
        root=str(root), dataset=DatasetClass(PLACE + "flair_hub.FlairHub", splits=splits),
        global_batch_size=1, loading=Loading(workers=0),
    )  # fmt: skip
    data.setup("fit")
    assert "'train' and 'val' are the same items" in data.problems[-1]


@pytest.mark.parametrize("name", ["dfc2020.DFC2020", "eurosat_sar.EuroSATSAR"])
def test_copies_of_training_images_under_other_names_are_told(tmp_path: Path, name: str) -> None:
    if name.startswith("dfc"):
        data = _data(dfc2020(tmp_path), name)
    else:
        data = _data(eurosat(tmp_path, is_radar=True), name)
    assert any("files of 'val' are copies of files of 'train'" in p for p in data.problems)


def test_a_damaged_first_item_is_replaced_and_does_not_end_a_run(tmp_path: Path) -> None:
    """It ended runs where their data are identified, also with `on_bad_sample: replace`."""
    root = eurosat(tmp_path, is_radar=True)
    (root / "AnnualCrop" / "AnnualCrop_1.tif").write_bytes(b"")
    data = _data(root, "eurosat_sar.EuroSATSAR")
    assert data.identity()["first"]["train"] == "unreadable"
    assert list(data.source("train").load(Piece(0, 0, 2), 0).bad) == [0]


@pytest.mark.parametrize("make", [bigearthnet, dfc2020, flair_hub])
def test_inspect_knows_the_folders(make: Callable[[Path], Path], tmp_path: Path) -> None:
    report = inspect_path(str(make(tmp_path)))
    assert report["splits"]["train"]["items"] in (1, 2) and "val" in report["splits"]


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no metadata\.parquet"):
        BigEarthNetV2(str(tmp_path))
    with pytest.raises(DataError, match="none of the ten folders of classes"):
        EuroSATSAR(str(tmp_path))
    with pytest.raises(DataError, match="no patch such as ROIs0000_test_s1_0_p0"):
        DFC2020(str(tmp_path))
    with pytest.raises(DataError, match=r"expected FLAIR-HUB_TRAIN\.csv"):
        FlairHub(str(tmp_path))
    for made in (BigEarthNetV2, EuroSATSAR, DFC2020, FlairHub):
        with pytest.raises(ConfigError, match=r"split 'trian' is not one of train.*Did you mean"):
            made(str(tmp_path), "trian")
    root = bigearthnet(tmp_path / "ben")
    patch = next(root.glob("BigEarthNet-S2/*/*0/*_B02.tif"))
    patch.write_bytes(patch.read_bytes()[:100])
    data = _data(root, "bigearthnet.BigEarthNetV2")
    with pytest.raises(DataError, match=r"_B02\.tif"):
        data.source("train").load(Piece(0, 0, 1), 0)
    patch.unlink()
    tif(patch, np.full((1, 120, 120), 200, np.uint8))
    with pytest.raises(DataError, match=r"_B02\.tif: numbers of one byte, as previews .*digital"):
        BigEarthNetV2(str(root))[0]
    (tmp_path / "FLAIR-HUB_TRAIN.csv").write_text(
        f"patch_id;AERIAL_RGBI\n{FLAIR};../../D012_AERIAL_RGBI/../../../etc/x.tif\n"
    )
    with pytest.raises(DataError, match="points outside"):
        FlairHub(str(tmp_path))[0]
    (tmp_path / "FLAIR-HUB_TRAIN.csv").write_text(f"patch_id;AERIAL_RGBI\n{FLAIR}")
    with pytest.raises(DataError, match=r"TRAIN\.csv, line 2: 1 cells, the header has 2"):
        FlairHub(str(tmp_path))


@pytest.mark.parametrize(
    "row",
    [{"patch_id": "../../x_1_2"}, {"s1_name": None}, {"labels": None}, {"labels": "Pastures"}],
    ids=["climbs", "no radar", "no labels", "a text"],
)
def test_rows_of_bigearthnet_that_name_no_patch_are_refused(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    path = bigearthnet(tmp_path) / "metadata.parquet"
    pandas.read_parquet(path).assign(**row).to_parquet(path)
    with pytest.raises(DataError, match="expected two names of folders and a list of classes"):
        BigEarthNetV2(str(tmp_path))


def test_maps_hold_whole_classes_and_dates_lie_in_tables(tmp_path: Path) -> None:
    root = dfc2020(tmp_path / "dfc")
    path = root / "ROIs0000_test" / "dfc_0" / "ROIs0000_test_dfc_0_p2.tif"
    tif(path, np.full((1, 256, 256), 1.5, np.float32))
    with pytest.raises(DataError, match=r"p2\.tif: holds numbers that are not whole"):
        DFC2020(str(root))[0]
    (tmp_path / "flair").mkdir()
    root = flair_hub(tmp_path / "flair")
    table = root / "GLOBAL_ALL_MTD" / "GLOBAL_SENTINEL2_MTD_DATES.gpkg"
    table.parent.mkdir(exist_ok=True)
    table.unlink(missing_ok=True)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
    with closing(sqlite3.connect(table)) as file:
        file.execute("CREATE TABLE gpkg_contents(table_name)")
        file.execute("INSERT INTO gpkg_contents VALUES ('t')")
        columns = "i AS patch_id, '' AS acquisition_dates"
        file.execute(f"CREATE VIEW t AS {endless} SELECT {columns} FROM n")
        file.commit()
    with pytest.raises(DataError, match=r"DATES\.gpkg: .* 't' is no plain table"):
        FlairHub(str(root))


def test_maps_of_other_numbers_and_areas_without_dates_are_refused(tmp_path: Path) -> None:
    for name in ("ben", "flair"):
        (tmp_path / name).mkdir()
    root = bigearthnet(tmp_path / "ben")
    path = next(root.glob(f"Reference_Maps/*/{S2_PATCH[:-1]}0/*.tif"))
    tif(path, np.full((1, 120, 120), 18, np.uint16))  # numbers of classes instead of codes
    with pytest.raises(DataError, match="holds 18, which is no code of CORINE"):
        BigEarthNetV2(str(root))[0]
    root = flair_hub(tmp_path / "flair")
    path = next(root.glob("*COSIA/*/*.tif"))
    for number, known in ((19, False), (255, True)):
        tif(path, np.full((1, 512, 512), number, np.uint8), 0.2)
        if known:
            assert FlairHub(str(root))[0]["label"] == -1
            continue
        with pytest.raises(DataError, match="holds the class 19, expected 0 to 18, or 255"):
            FlairHub(str(root))[0]
    with closing(sqlite3.connect(next(root.glob("*/*SENTINEL2*.gpkg")))) as file:
        file.execute("UPDATE dates SET patch_id = 'D001-2020_AA-S1-1_0-0'")
        file.commit()
    with pytest.raises(DataError, match="table of dates does not know .*; it has D001-2020_AA-S1"):
        FlairHub(str(root))[0]
