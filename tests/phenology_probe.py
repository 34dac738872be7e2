"""Probe of a season sample by hand-made features: one date, or the whole year."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from domainssl.datamodules.base import DomainDataModule
from domainssl.loading.plan import Piece

Item = dict[str, Any]
Features = Callable[[Item], np.ndarray]


def items(data: DomainDataModule, split: str) -> list[Item]:
    """All items of a split, without draws."""
    source = replace(data._sources[split], is_training=False)  # type: ignore[type-var]
    out = []
    for block, size in enumerate(source.sizes):
        rows = source.load(Piece(block, 0, size), 0).data
        out += [{name: value[i] for name, value in rows.items()} for i in range(size)]
    return out


def _year(item: Item, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Days of the year, ascending, and band means of each date."""
    dates = item[f"{name}.dates"].numpy()[item[f"{name}.frames"].numpy()].astype("datetime64[D]")
    day = (dates - dates.astype("datetime64[Y]")).astype(int)
    values = item[name][item[f"{name}.frames"]].mean((-1, -2)).numpy()
    order = np.argsort(day)
    return day[order], values[order]


def _index(values: np.ndarray, name: str) -> np.ndarray:
    """What tells vegetation in one number: NDVI, or VH backscatter, (T,)."""
    if name != "s2":
        return values[:, 1]
    return (values[:, 6] - values[:, 2]) / (values[:, 6] + values[:, 2])  # B08, B04


def date_features(item: Item, name: str, day_of_year: int) -> np.ndarray:
    """Band means and index on the date nearest to a day of the year."""
    days, values = _year(item, name)
    place = np.abs(days - day_of_year).argmin()
    return np.concatenate([values[place], _index(values, name)[[place]]])


def series_features(item: Item, name: str) -> np.ndarray:
    """The index interpolated to 24 days of the year."""
    days, values = _year(item, name)
    return np.interp(np.linspace(15, 350, 24), days, _index(values, name))


def probe(train: list[Item], held_out: list[Item], features: Features, draws: int = 5) -> float:
    """Accuracy of a linear probe on 10 labels per class, mean over draws."""
    x, y = (np.stack([features(item) for item in part]) for part in (train, held_out))
    labels, expected = (np.array([int(i["label"]) for i in part]) for part in (train, held_out))
    scores = []
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        index = np.concatenate(
            [rng.permutation(np.flatnonzero(labels == k))[:10] for k in np.unique(labels)]
        )
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(x[index], labels[index])
        scores.append(model.score(y, expected))
    return float(np.mean(scores))
