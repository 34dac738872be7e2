"""The embedded sample is release A in small, and its classes hide from plain statistics."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from domainssl.datamodules import SSL4EOS12DataModule
from domainssl.datamodules.samples import ssl4eo as sample
from domainssl.datamodules.samples.ssl4eo_objects import draw_objects
from domainssl.datamodules.samples.ssl4eo_scene import COVERS
from domainssl.errors import ConfigError
from domainssl.evaluation.factors import explained_variance
from domainssl.evaluation.probes import linear_probe_accuracy
from domainssl.evaluation.raw import PERCENTILES
from domainssl.io.ssl4eo.labels import labels
from domainssl.io.ssl4eo.layout import scan
from domainssl.io.ssl4eo.read import read

CLEAR = {"s1": 0.45, "s2": 0.8}  # radar has two bands only
PAIR = {"s1": "S1GRD", "s2": "S2L2A"}


@pytest.fixture(scope="module")
def blocks(sample_root: Path) -> dict:
    """Each split's arrays at all dates, and its labels."""
    out = {}
    for split in ("train", "val"):
        groups = scan(str(sample_root), split, PAIR).groups
        found = labels(str(sample_root), split)
        parts = {m: [read(g, m, [0, 1, 2, 3]) for g in groups] for m in PAIR}
        out[split] = {m: np.concatenate([b.values for b in p]) for m, p in parts.items()}
        out[split]["blocks"] = parts
        keys = [i for b in parts["s2"] for i in b.ids]
        out[split]["label"] = found.of(keys, [i for b in parts["s2"] for i in b.location_ids])
    return out


def statistics(values: np.ndarray) -> np.ndarray:
    """Per-band mean, spread and five percentiles, (n, T, 7 C)."""
    x = values[..., ::2, ::2].astype(np.float32)
    percentiles = np.percentile(x, PERCENTILES, axis=(-1, -2))
    return np.concatenate([x.mean((-1, -2)), x.std((-1, -2)), *percentiles], -1)


def probe(train: tuple, held_out: tuple, per_class: int = 10, draws: int = 5) -> float:
    scores = []
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        index = np.concatenate(
            [rng.permutation(np.flatnonzero(train[1] == k))[:per_class] for k in range(len(COVERS))]
        )
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(train[0][index], train[1][index])
        scores.append(model.score(*held_out))
    return float(np.mean(scores))


def test_sample_fits_its_budget_and_is_laid_out_like_release_a(sample_root: Path) -> None:
    size = sum(p.stat().st_size for p in sample_root.rglob("*") if p.is_file())
    assert size <= 160e6
    names = sorted(p.relative_to(sample_root).as_posix() for p in sample_root.rglob("*.zarr.zip"))
    assert len(names) == 15
    assert names[0] == "train/LULC/ssl4eos12_train_seasonal_data_000001.zarr.zip"
    listed = (sample_root / "splits" / "ssl4eos12_val.txt").read_text().split()
    assert listed == [f"ssl4eos12_val_seasonal_data_{i:06d}.zarr.zip" for i in (1, 2)]


def test_sample_holds_balanced_classes_in_both_splits(blocks: dict) -> None:
    assert np.bincount(blocks["train"]["label"]).tolist() == [24] * 4
    assert np.bincount(blocks["val"]["label"]).tolist() == [16] * 4


def test_sample_opens_in_xarray_as_published(sample_root: Path) -> None:
    xarray = pytest.importorskip("xarray")
    from zarr.storage import ZipStore

    path = next((sample_root / "val" / "S2L2A").iterdir())
    cube = xarray.open_zarr(ZipStore(path, mode="r"), chunks=None)
    assert dict(cube.sizes) == {"sample": 32, "time": 4, "band": 12, "y": 132, "x": 132}
    assert cube["bands"].dtype == np.int16 and cube["bands"].encoding["chunks"][1] == 1
    assert cube["time_"].dtype.kind == "M" and cube["file_id"].dtype == "<U38"
    assert cube["cloud_mask"].attrs["cloud_classes"][6] == "no data"
    assert int(cube["bands"].min()) >= 0


def test_sample_carries_the_offset_and_the_swapped_s1_dates(blocks: dict) -> None:
    for split in ("train", "val"):
        parts = blocks[split]["blocks"]
        assert all((block.offset == 1000).all() for block in parts["s2"])
        assert [bool(block.reordered.any()) for block in parts["s1"]][:2] == [False, True]
        assert all((np.diff(block.dates, axis=1) > 0).all() for block in parts["s1"])


def test_sample_reflectances_are_physical(blocks: dict) -> None:
    values = blocks["train"]["s2"]
    assert values.min() >= 0 and values.max() <= 12_000
    assert 800 < values[:, :, 1].mean() < 1300 and 2500 < values[:, :, 7].mean() < 4000


def test_cover_map_agrees_with_the_dominant_label(sample_root: Path) -> None:
    found = labels(str(sample_root), "val")
    with np.load(sample_root / "labels" / "val_cover.npz") as file:
        for key, cover in zip(file["sample"], file["cover"], strict=True):
            assert np.bincount(cover.reshape(-1), minlength=4).argmax() == found.label[str(key)]


def test_same_locations_are_drawn_every_time_and_for_every_product() -> None:
    classes = np.zeros(96, int)
    first = sample.draw_place("train", classes, ("S2L2A",), 3)
    second = sample.draw_place("train", classes, tuple(sample.PRODUCTS), 3)
    np.testing.assert_array_equal(first.values["S2L2A"], second.values["S2L2A"])
    assert second.values["S2L1C"].shape == (4, 13, 132, 132)
    assert np.median(second.values["S2L1C"][:, 10]) < 1100  # cirrus plus the offset


@pytest.mark.parametrize("modalities", [("s1",), ("s2",), ("s1", "s2")], ids="+".join)
def test_band_statistics_do_not_tell_the_classes(blocks: dict, modalities) -> None:
    def items(split: str) -> tuple[np.ndarray, np.ndarray]:
        x = np.concatenate([statistics(blocks[split][m]) for m in modalities], -1)
        return x.reshape(-1, x.shape[-1]), blocks[split]["label"].repeat(4)

    assert probe(items("train"), items("val")) < 0.35  # chance is 0.25


@pytest.fixture(scope="module")
def factors() -> sample.Factors:
    return sample.factors("val")


def test_factors_are_those_of_the_table(sample_root: Path, factors: sample.Factors) -> None:
    with open(sample_root / "labels" / "val.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["sample"] for row in rows] == factors.ids
    assert [int(row["label"]) for row in rows] == factors.label.tolist()
    for name, values in factors.shared.items():
        np.testing.assert_allclose([float(row[name]) for row in rows], values, atol=1e-5)


def test_own_factors_reach_one_sensor_alone(blocks: dict, factors: sample.Factors) -> None:
    levels = {m: np.median(blocks["val"][m].astype(np.float32), (1, 3, 4)) for m in PAIR}
    means = {"s1": torch.from_numpy(levels["s1"]), "s2": torch.from_numpy(levels["s2"]).log()}
    own = {"s1": factors.radar, "s2": factors.optical}
    for sensor, other in (("s1", "s2"), ("s2", "s1")):
        for name, values in own[sensor].items():
            factor = torch.from_numpy(values)
            assert explained_variance(means[sensor], factor) > 0.1, name
            assert explained_variance(means[other], factor) < 0.05, name


def test_factors_of_an_unknown_split_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no split 'vall' in the embedded sample. Did you mean"):
        sample.factors("vall")


@pytest.fixture(scope="module")
def objects() -> dict:
    """Changes of radar and light by held-out locations of the sample `objects`, and its covers."""
    label = sample.classes_of("val")
    month = np.zeros(4, np.float32)
    numbers = range(len(label))
    places = [draw_objects(np.random.default_rng([7, n]), int(label[n]), month) for n in numbers]
    return {
        "label": torch.from_numpy(label),
        "s1": np.stack([place.echo() for place in places]),
        "s2": np.stack([place.light() for place in places]),
    }


def together(values: np.ndarray) -> torch.Tensor:
    """Correlation of every pair of bands, (n, pairs)."""
    flat = values.reshape(*values.shape[:2], -1)
    found = np.stack([np.corrcoef(each) for each in flat])
    return torch.from_numpy(found[:, *np.triu_indices(values.shape[1], 1)]).float()


@pytest.mark.parametrize("name", ["s1", "s2"])
def test_band_statistics_do_not_tell_objects(objects: dict, name) -> None:
    found = torch.from_numpy(statistics(objects[name][:, :, 50:82, 50:82])).float()
    assert linear_probe_accuracy(found, objects["label"]) < 0.4  # chance is 0.25


@pytest.mark.parametrize("name", ["s1", "s2"])
def test_bands_tell_objects_where_texture_is_averaged(objects: dict, name) -> None:
    values = objects[name]
    n, bands = values.shape[:2]
    coarse = values.reshape(n, bands, 22, 6, 22, 6).mean((3, 5))
    assert linear_probe_accuracy(together(coarse), objects["label"]) > CLEAR[name]
    fine = values - np.kron(coarse, np.ones((6, 6), np.float32))
    assert linear_probe_accuracy(together(fine), objects["label"]) < 0.4


def test_a_sample_is_called_by_its_name() -> None:
    with pytest.raises(ConfigError, match="sample:object'.*Did you mean 'objects'"):
        SSL4EOS12DataModule(root="sample:object").prepare_data()
    classes = np.zeros(96, int)
    drawn = [
        sample.draw_place("train", classes, ("S2L2A",), 3, sample.SCENES["objects"])
        for _ in range(2)
    ]
    np.testing.assert_array_equal(drawn[0].values["S2L2A"], drawn[1].values["S2L2A"])
    assert (drawn[0].place.cover == 0).all() and not np.isin(drawn[0].mask, (3, 4, 5)).any()
