"""Stains are brought to a reference; a tile without tissue is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from monai.apps.pathology.transforms.stain.array import ExtractHEStains

from domainssl.sources.stain_normalization import (
    NORMALIZATIONS,
    macenko,
    macenko_vectors,
    normalized,
    reinhard,
)

Array = np.ndarray[Any, Any]
_H, _E = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])
ALL = np.ones((64, 64), bool)


def _tile(gain: float = 1.0, seed: int = 0) -> Array:
    """Return tissue in which every pixel holds another amount of both dyes."""
    rng = np.random.default_rng(seed)
    amounts = rng.gamma(1.5, 0.35, (64, 64, 2))
    density = gain * amounts @ np.stack([_H / np.linalg.norm(_H), _E / np.linalg.norm(_E)])
    return np.asarray((240 * np.exp(-density)).round().clip(0, 255), np.uint8)


def _density(colors: Array) -> Array:
    return np.asarray(-np.log((colors.reshape(-1, 3) + 1.0).clip(max=240) / 240))


def test_vectors_are_those_that_the_tile_was_made_of_and_those_of_monai() -> None:
    density = _density(_tile())
    found = macenko_vectors(density[(density > 0.15).all(1)])
    assert found is not None
    for column, dye in enumerate((_H, _E)):
        assert found[:, column] @ dye / np.linalg.norm(dye) > 0.97
    theirs = ExtractHEStains()(_tile())
    assert np.allclose(found, theirs[:, ::-1], atol=1e-3)  # which takes eosin for hematoxylin


def test_weak_and_strong_stains_become_alike() -> None:
    weak, strong = (macenko(_tile(gain), ALL).astype(float) for gain in (0.7, 1.3))
    before = np.abs(_tile(0.7).astype(float) - _tile(1.3)).mean()
    assert before > 25 and np.abs(weak - strong).mean() < 0.25 * before
    # the 99th percentile of both dyes is that of the reference, so its colour is known
    target = np.array([[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]])
    amounts = np.linalg.lstsq(target, _density(weak).T, rcond=None)[0]
    assert np.allclose(np.percentile(amounts, 99, axis=1), [1.9705, 1.0308], rtol=0.06)


def test_reinhard_gives_tissue_the_mean_and_deviation_of_the_reference() -> None:
    cones = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
    for gain in (0.7, 1.0):
        tissue = (_density(_tile(gain)) > 0.15).any(1)
        found = reinhard(_tile(gain), ALL).reshape(-1, 3)[tissue] + 1.0
        log = np.log(found @ cones.T)
        light = log.sum(1) / 3**0.5
        assert abs(light.mean() - 8.632) < 0.03 and abs(light.std() - 0.575) < 0.04
        assert abs(((log[:, 0] - log[:, 1]) / 2**0.5).mean() - 0.0387) < 0.01
        assert abs(((log[:, 0] + log[:, 1] - 2 * log[:, 2]) / 6**0.5).mean() + 0.115) < 0.03


@pytest.mark.parametrize("method", NORMALIZATIONS)
def test_a_blank_tile_and_what_is_not_valid_stay_as_they_are(method: str) -> None:
    for blank in (255, 250, 0):
        tile = np.full((64, 64, 3), blank, np.uint8)
        assert np.array_equal(normalized(tile, ALL, method), tile)
    speck = np.full((64, 64, 3), 255, np.uint8)
    speck[3, 4] = (90, 20, 120)
    assert np.array_equal(normalized(speck, ALL, method), speck)
    assert np.array_equal(normalized(speck, ~ALL, method), speck)
    half = ALL.copy()
    half[:32] = False
    assert np.array_equal(normalized(_tile(), half, method)[:32], _tile()[:32])
