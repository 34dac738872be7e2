"""The embedded sample of cubes: small, equal every time, readable elsewhere, and time matters."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domainssl.datamodules import SentinelCubeDataModule
from domainssl.datamodules.samples import cubes
from domainssl.datamodules.samples.cubes_scene import CROPS
from domainssl.evaluation.probes import linear_probe_accuracy
from domainssl.evaluation.raw import PERCENTILES
from domainssl.loading.source import Loading
from domainssl.sources.dates import Dates
from domainssl.sources.held_out import HeldOut
from domainssl.sources.windows import Window

STILL: dict[str, Any] = {"jitter": False, "flips": False, "quarter_turns": False}
NOTHING_HELD = HeldOut(val_fraction=0)


@pytest.fixture(scope="module")
def sample(cache_folder: Path) -> Path:
    return cubes.sample_root()


def held_out(dates: str) -> dict[str, Any]:
    """Return the held-out windows of the recipe, at one date or as a series."""
    data = SentinelCubeDataModule(
        window=Window(size=640, unit="m", jitter=False),
        dates=Dates(mode=dates),
        held_out=HeldOut(val_fraction=0.4),
        global_batch_size=64,
        loading=Loading(workers=0),
    )
    data.setup("fit")
    [batch] = list(data.val_dataloader())
    return batch


def statistics(batch: dict[str, Any]) -> torch.Tensor:
    """Return mean, spread and five percentiles of every band, at every date, per window."""
    parts = []
    for name in ("s1", "s2"):
        values = batch[name].flatten(-2)
        percentiles = values.quantile(torch.tensor(PERCENTILES) / 100, dim=-1)
        parts += [x.flatten(1) for x in (values.mean(-1), values.std(-1), *percentiles)]
    return torch.cat(parts, 1)


def test_time_matters(sample):
    one, series = held_out("one"), held_out("all")
    assert series["s2"].shape[:3] == (64, cubes.DATES, 12)
    single = linear_probe_accuracy(statistics(one), one["label"])
    several = linear_probe_accuracy(statistics(series), series["label"])
    assert single < 0.45, "one date must not tell the crop by its band statistics"
    assert several > single + 0.25


def test_the_sample_is_small_and_equal_every_time(sample, tmp_path):
    files = sorted(p for p in sample.rglob("*") if p.is_file() and p.name != ".domainssl.json")
    assert sum(p.stat().st_size for p in files) < 50e6
    again = tmp_path / "again"
    cubes._write_site(again, 0, "fields_a", 32632)
    name = "s2/fields_a.zarr/reflectance/c/0/0/0/0"
    assert _digest(sample / name) == _digest(again / name)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_xarray_reads_the_same_values(sample):
    xarray = pytest.importorskip("xarray")
    store = sample / "s2" / "fields_a.zarr"
    with xarray.open_zarr(store, consolidated=False, chunks=None) as cube:
        assert list(cube.band.values[:2]) == ["B01", "B02"]
        data = SentinelCubeDataModule(
            window=Window(size=640, unit="m", **STILL), held_out=NOTHING_HELD,
            dates=Dates(mode="all"), global_batch_size=1, loading=Loading(workers=0),
        )  # fmt: skip
        data.setup("fit")
        batch = next(b for b in data.predict_dataloader() if "fields_a" in b["id"][0])
        geo = batch["s2.geo"][0]
        x = geo["c"] + 10 * (np.arange(64) + 0.5)
        y = geo["f"] - 10 * (np.arange(64) + 0.5)
        there = cube.reflectance.sel(x=x, y=y).values
        days = cube.time.values.astype("datetime64[D]").astype(int)
    known = batch["s2.valid"][0].numpy()[:, None] & np.ones((1, 12, 1, 1), bool)
    assert np.allclose(batch["s2"][0].numpy()[known], 1e4 * there[known], atol=0.01)
    assert np.isnan(there[~known]).all() and batch["s2.dates"][0].tolist() == days.tolist()


def test_every_crop_is_held_out(sample):
    labels = held_out("one")["label"]
    assert set(labels.tolist()) == set(range(len(CROPS)))
