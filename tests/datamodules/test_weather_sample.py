"""Cubes with heights, weather and the place of a window, from the embedded sample of weather."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from domainssl.callbacks.evaluation import OnlineEvaluation
from domainssl.datamodules import SentinelCubeDataModule
from domainssl.datamodules.samples import weather
from domainssl.errors import ConfigError, require
from domainssl.evaluation.raw import band_statistics
from domainssl.loading.source import Loading
from domainssl.sources.cube_options import Layer
from domainssl.sources.dates import Dates
from domainssl.sources.held_out import HeldOut
from domainssl.sources.windows import Window

LAYERS = {
    "s1": Layer(bands=("VV", "vh"), value_unit="db"),
    "dem": Layer(bands=("elevation", "slope"), value_unit="m", is_static=True),
    "era5": Layer(
        bands=("temperature_2m", "total_precipitation_sum"), value_unit="K, m", gsd_m=320
    ),
    "latlon": Layer(bands=("lat", "lon"), is_location=True),
}


@pytest.fixture(scope="module")
def data(cache_folder: Any) -> SentinelCubeDataModule:
    found = SentinelCubeDataModule(
        root="sample:weather",
        modalities=LAYERS,
        global_batch_size=64,
        window=Window(size=320, unit="m", jitter=False, per_block=4),
        dates=Dates(mode="all"),
        held_out=HeldOut(val_fraction=0.25),
        loading=Loading(workers=0),
    )
    found.setup("fit")
    return found


@pytest.fixture(scope="module")
def batch(data: SentinelCubeDataModule) -> dict[str, Any]:
    [found] = list(data.val_dataloader())
    return found


def test_modalities_are_those_that_galileo_knows(data):
    facts = {name: (m.kind, m.channels, m.size) for name, m in data.modalities.items()}
    assert facts == {
        "s1": ("series", ("VV", "VH"), (32, 32)),
        "dem": ("image", ("elevation", "slope"), (32, 32)),
        "era5": ("series", ("temperature_2m", "total_precipitation_sum"), (1, 1)),
        "latlon": ("table", ("lat", "lon"), ()),
    }
    assert "latlon: middle of the window in degrees" in data.describe()


def test_places_are_those_of_the_middle_of_windows(data, batch):
    pyproj = require("pyproj", "geo")
    for row, geo in enumerate(batch["s1.geo"]):
        to_degrees = pyproj.Transformer.from_crs(geo["crs"], 4326)
        expected = to_degrees.transform(geo["c"] + 160, geo["f"] - 160)
        torch.testing.assert_close(
            batch["latlon"][row], torch.tensor(expected), check_dtype=False, rtol=0, atol=1e-5
        )
    assert batch["latlon.present"].all() and batch["latlon.valid"].shape == (64,)


def test_heights_and_weather_belong_to_the_field(batch):
    """The higher a field lies, the colder it is; series have one date in two months."""
    height, warmth = batch["dem"][:, 0].mean((-2, -1)), batch["era5"][:, :, 0, 0, 0].mean(1)
    assert float(torch.corrcoef(torch.stack([height, warmth]))[0, 1]) < -0.95
    assert batch["era5"].shape == (64, weather.DATES, 2, 1, 1)
    assert torch.equal(batch["s1.dates"], batch["era5.dates"])
    assert batch["label"].bincount(minlength=4).min() > 10


def test_statistics_of_a_table_are_its_values(data, batch):
    found = band_statistics(batch, data.modalities["latlon"])
    lat, lon = batch["latlon"].unbind(1)
    expected = torch.stack([lat, lon, 0 * lat, 0 * lon, *[lat, lon] * 5], 1)  # five percentiles
    torch.testing.assert_close(found, expected)


def test_mistakes_are_told():
    with pytest.raises(ConfigError, match="has two bands, latitude and longitude"):
        Layer(bands=("lat",), is_location=True)
    with pytest.raises(ConfigError, match="no layer has files"):
        SentinelCubeDataModule(modalities={"latlon": LAYERS["latlon"]})


def test_some_modalities_are_judged_alone():
    names = ("s1", "s2", "dem", "era5", "latlon")
    chosen = OnlineEvaluation(alone=("s1", "s2"))
    assert chosen._subsets(names) == [("s1",), ("s2",), ("s1", "s2"), names]
    with pytest.raises(ConfigError, match=r"no modality 'lat_lon'. Did you mean 'latlon'"):
        OnlineEvaluation(alone=("lat_lon",))._subsets(names)
