"""The embedded sample of relief: what tells its classes, and what does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from domainssl.datamodules.samples import relief
from domainssl.datamodules.terramesh import TerraMeshDataModule
from domainssl.errors import ConfigError
from domainssl.evaluation.probes import linear_probe_accuracy
from domainssl.evaluation.raw import band_statistics
from domainssl.loading.source import Loading
from domainssl.sources.windows import Window

PRODUCTS = {"rgb": "S2RGB", "dem": "DEM"}


@pytest.fixture(scope="module")
def data(cache_folder: Any) -> TerraMeshDataModule:
    found = TerraMeshDataModule(
        root="sample:relief", modalities=dict(PRODUCTS), global_batch_size=128,
        window=Window(size=32), loading=Loading(workers=0),
    )  # fmt: skip
    found.setup("fit")
    return found


@pytest.fixture(scope="module")
def batch(data: TerraMeshDataModule) -> dict[str, Any]:
    batches: Any = data.val_dataloader()
    found: dict[str, Any] = next(iter(batches))
    return found


def test_files_hold_what_was_drawn(batch):
    assert batch["rgb"].shape == (128, 3, 32, 32) and batch["dem"].shape == (128, 1, 32, 32)
    assert batch["dem.present"].all() and batch["label"].bincount().tolist() == [32] * 4
    for at in (0, 77):
        number, label = int(batch["id"][at][-7:]), int(batch["label"][at])
        land = relief.draw_land("val", label, number)
        assert (batch["rgb"][at].numpy() == land.colours[:, 4:36, 4:36]).all()
        assert (batch["dem"][at].numpy() == land.heights[:, 4:36, 4:36]).all()


def test_statistics_do_not_tell_to_which_side_land_rises(data, batch):
    raw = {name: band_statistics(batch, data.modalities[name]) for name in PRODUCTS}
    for found in (*raw.values(), torch.cat(list(raw.values()), 1)):
        assert linear_probe_accuracy(found, batch["label"]) < 0.35  # chance is 0.25


def test_both_sensors_show_the_same_land_and_to_which_side_it_rises(batch):
    heights, red = batch["dem"][:, 0].float(), batch["rgb"][:, 0].float()
    for values in (heights, red):
        rise = torch.stack(
            [values[..., 16:].mean((1, 2)) - values[..., :16].mean((1, 2)),
             values[:, :16].mean((1, 2)) - values[:, 16:].mean((1, 2))], 1
        )  # fmt: skip
        assert linear_probe_accuracy(rise, batch["label"]) > 0.8
    both = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(heights, red, strict=True)]
    assert np.median(both) > 0.6


def test_unknown_samples_are_refused():
    with pytest.raises(ConfigError, match=r"expected sample:relief or a folder"):
        TerraMeshDataModule(root="sample:relieff", modalities=dict(PRODUCTS)).prepare_data()
