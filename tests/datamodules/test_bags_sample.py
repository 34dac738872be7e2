"""The embedded sample of feature bags: its class lies in which tissue lymphocytes accompany."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from domainssl.backbones.slide import TITANBackbone
from domainssl.datamodules.samples import bags
from domainssl.datamodules.slides import SlideFeatureDataModule
from domainssl.evaluation.probes import linear_probe_accuracy
from domainssl.evaluation.raw import band_statistics
from domainssl.loading.counts import unit_counts
from domainssl.loading.source import Loading
from domainssl.sources.slide_options import SlideWindow

NAME = "tile_features"


@pytest.fixture(scope="module")
def data(cache_folder: Any) -> SlideFeatureDataModule:
    module = SlideFeatureDataModule(
        root="sample:bags", window=SlideWindow(size=14), global_batch_size=bags.SPLITS["val"]
    )
    module.prepare_data()
    module.setup("fit")
    return module


@pytest.fixture(scope="module")
def held_out(data: SlideFeatureDataModule) -> dict[str, Any]:
    """Return the region of every held-out slide."""
    [batch] = list(data.val_dataloader())
    return batch


def together(batch: dict[str, Any]) -> torch.Tensor:
    """Return the mean products of features of tissue and features of lymphocytes, per slide."""
    half = bags.DIM // 2
    tissue, lymphocytes = batch[NAME][..., :half], batch[NAME][..., half:]
    return torch.einsum("bnt,bnl->btl", tissue, lymphocytes).flatten(1)


def test_no_statistic_of_single_features_tells_the_class_but_their_products_do(data, held_out):
    raw = band_statistics(held_out, data.modalities[NAME])
    assert linear_probe_accuracy(raw, held_out["label"]) <= 0.45
    assert linear_probe_accuracy(together(held_out), held_out["label"]) >= 0.8


def test_an_untrained_backbone_knows_little_of_the_class(data, held_out):
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        backbone = TITANBackbone(data.modalities, width=72, depth=2, heads=12).eval()
        with torch.no_grad():
            pooled = backbone(held_out).pooled[NAME]
        found.append(linear_probe_accuracy(pooled, held_out["label"]))
    assert np.mean(found) <= 0.7


def test_every_class_has_as_many_tiles_of_all_kinds_and_slides_repeat():
    tissue, _ = bags._prototypes()
    shares = np.zeros((len(bags.CLASSES), len(tissue)))
    for number in range(60):
        bag, label = bags.slide("train", number)
        nearest = ((bag.features[:, None, : bags.DIM // 2] - tissue) ** 2).sum(-1).argmin(1)
        shares[label] += np.bincount(nearest, minlength=len(tissue)) / len(bag) / 20
    assert np.abs(shares - 1 / 3).max() < 0.08
    again, _ = bags.slide("train", 59)
    assert np.array_equal(again.features, bag.features)
    assert np.array_equal(again.coords, bag.coords)


def test_a_tenth_of_the_cohort_are_eight_slides_of_a_class_and_none_of_the_bags():
    keys = bags.SAMPLES["cohort"].keys()
    assert not set(keys) & set(bags.SAMPLES["bags"].keys())
    for split, held in (("train", 80), ("val", 40)):
        labels = [number % len(bags.CLASSES) for own, number in keys if own == split]
        assert np.bincount(labels).tolist() == [held] * 3
    data = SlideFeatureDataModule(root="sample:cohort", loading=Loading(train_fraction=0.1))
    data.prepare_data()
    data.setup("fit")
    assert unit_counts(data.source("train"), "label", 3) == [8, 8, 8]
