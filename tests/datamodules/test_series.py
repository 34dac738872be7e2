"""Windows over several resolutions and choice of dates, on tiles made by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from domainssl.errors import ConfigError
from domainssl.io.series.tile import (
    Image,
    Series,
    Tile,
    even_dates,
    join_days,
    measured,
    typical_dates,
)
from domainssl.loading.plan import Piece
from domainssl.modality import Modality
from domainssl.sources.dates import Dates
from domainssl.sources.tiles import TileSource
from domainssl.sources.windows import Window

CELLS, TIMES, MARGIN = 6, 5, 2
S2 = Modality(
    name="s2", kind="series", channels=("A", "B"), value_unit="dn", size=(4, 4), gsd_m=10.0
)
FINE = Modality(
    name="aerial", kind="image", channels=("R",), value_unit="rgb8", size=(20, 20), gsd_m=2.0
)
NUMBERS = np.arange(1, CELLS * CELLS + 1).reshape(CELLS, CELLS)


def dated(days: list[int], cloud: np.ndarray | None = None) -> Series:
    """A series whose pixels hold the number of their cell in band A and the day in band B."""
    values = np.empty((len(days), 2, CELLS, CELLS), np.float32)
    values[:, 0], values[:, 1] = NUMBERS, np.array(days)[:, None, None]
    return Series(values, np.array(days), "dn", cloud)


@dataclass
class _Fake:
    series: dict[str, Series] = field(default_factory=lambda: {"s2": dated(list(range(1, 31)))})
    count: int = 3

    def __len__(self) -> int:
        return self.count

    def read(self, number: int) -> Tile:
        fine = np.pad(NUMBERS.repeat(TIMES, 0).repeat(TIMES, 1), MARGIN)[None].astype(np.uint8)
        image = Image(fine, 17_000, (1000.0 - MARGIN * 2.0, 5000.0 + MARGIN * 2.0), 25832)
        return Tile(
            id=f"tile{number}", images={"aerial": image}, series=self.series, classes=NUMBERS
        )

    def labels(self, number: int, classes: Any) -> dict[str, Any]:
        return {"mask": torch.from_numpy(classes)}


def source(tiles: _Fake | None = None, **changes: Any) -> TileSource:
    given: dict[str, Any] = {
        "modalities": {"s2": S2, "aerial": FINE},
        "margins": {"aerial": MARGIN},
        "window": Window(size=40.0, unit="m"),
        "tile_m": 60.0,
        "step_m": 10.0,
        "dates": Dates(),
        "seed": 3,
        "is_training": True,
    }
    given |= changes
    given["window"] = given["window"].on_grid(10.0, whole=(6, 6), name="pixels of the series")
    given["reads"] = {name: name for name in given["modalities"]}
    return TileSource(tiles=tiles or _Fake(), **given)


def item(tiles: TileSource, block: int = 0, epoch: int = 0) -> dict[str, Any]:
    rows = tiles.load(Piece(block, 0, tiles.windows), epoch)
    return {name: value[0] for name, value in rows.data.items()}


@pytest.mark.parametrize("epoch", range(8))
def test_all_resolutions_and_the_class_map_show_the_same_ground(epoch: int) -> None:
    found = item(source(), block=1, epoch=epoch)
    cells = found["s2"][0, 0]
    assert cells.shape == (4, 4) and len(cells.unique()) == 16
    fine = cells.repeat_interleave(TIMES, 0).repeat_interleave(TIMES, 1)
    assert torch.equal(found["aerial"][0].float(), fine)
    assert torch.equal(found["mask"].float(), cells)


def test_windows_move_flip_and_turn_from_epoch_to_epoch() -> None:
    tiles = source()
    corners = {float(item(tiles, epoch=e)["s2"][0, 0, 0, 0]) for e in range(12)}
    assert len(corners) > 4
    assert torch.equal(item(tiles, epoch=4)["s2"], item(tiles, epoch=4)["s2"])


@pytest.mark.parametrize("epoch", range(4))
def test_geo_tells_where_each_cell_lies(epoch: int) -> None:
    found = item(source(), epoch=epoch)
    for name, centre in (("s2", 0.5), ("aerial", 2.5)):
        geo = found[f"{name}.geo"]
        x = geo["a"] * centre + geo["b"] * centre + geo["c"]
        y = geo["d"] * centre + geo["e"] * centre + geo["f"]
        row, column = np.argwhere(int(found["s2"][0, 0, 0, 0]) == NUMBERS)[0]
        assert x == pytest.approx(1000 + 10 * (column + 0.5))
        assert y == pytest.approx(5000 - 10 * (row + 0.5))
        assert geo["crs"] == 25832


def test_held_out_windows_lie_in_the_middle_as_they_are() -> None:
    found = item(source(is_training=False), epoch=5)
    assert found["s2"][0, 0].tolist() == NUMBERS[1:5, 1:5].tolist()


def test_several_held_out_windows_lie_on_a_grid() -> None:
    tiles = source(is_training=False, windows=4, window=Window(size=30.0, unit="m"),
                   modalities={"s2": S2})  # fmt: skip
    rows = tiles.load(Piece(2, 0, 4), 0)
    assert rows.data["s2"][:, 0, 0, 0, 0].tolist() == [1, 4, 19, 22]
    assert rows.data["id"] == ["tile2_0", "tile2_1", "tile2_2", "tile2_3"]
    assert rows.data["index"].tolist() == [8, 9, 10, 11]


def test_drawn_dates_depend_on_seed_epoch_and_item_alone_and_ascend() -> None:
    tiles = source(dates=Dates(max_dates=7))
    first = item(tiles)["s2.dates"]
    assert len(first) == 7 and (first.diff() > 0).all()
    assert torch.equal(item(tiles)["s2.dates"], first)
    assert torch.equal(item(tiles)["s2"][:, 1, 0, 0].int(), first)  # values follow their dates
    others = [item(tiles, epoch=1), item(tiles, block=1), item(source(dates=Dates(max_dates=7),
                                                                      seed=4))]  # fmt: skip
    assert all(not torch.equal(other["s2.dates"], first) for other in others)


def test_held_out_dates_are_spread_evenly() -> None:
    found = item(source(dates=Dates(max_dates=3), is_training=False), epoch=9)
    assert found["s2.dates"].tolist() == [1, 15, 30]
    assert even_dates(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert even_dates(5, 1).tolist() == [2]


def test_a_sensor_that_never_saw_the_place_is_absent_with_a_finite_filler() -> None:
    found = item(source(_Fake(series={})))
    assert not found["s2.present"] and not found["s2.frames"].any() and not found["s2.valid"].any()
    assert found["s2"].shape == (1, 2, 4, 4) and found["s2"].isfinite().all()
    assert found["aerial.present"]


def test_cloudy_dates_are_kept_masked_or_left_out_as_asked() -> None:
    cloud = np.zeros((3, CELLS, CELLS), np.float32)
    cloud[1], cloud[2, :3] = 80, 30
    tiles = _Fake({"s2": dated([10, 20, 30], cloud)})
    whole = {"window": Window(size=None, unit="m", flips=False, quarter_turns=False)}
    kept = item(source(tiles, **whole))
    assert kept["s2.dates"].tolist() == [10, 20, 30] and kept["s2.valid"].all()
    masked = item(source(tiles, dates=Dates(mask_clouds=True), **whole))
    assert masked["s2.valid"].float().mean((1, 2)).tolist() == [1, 0, 0.5]
    assert not masked["s2"][1].any()
    left = item(source(tiles, dates=Dates(min_valid_fraction=0.5), **whole))
    assert left["s2.dates"].tolist() == [10, 30]
    lenient = item(source(tiles, dates=Dates(min_valid_fraction=0.6, cloud_percent=50), **whole))
    assert lenient["s2.dates"].tolist() == [10, 30] and lenient["s2.valid"].all()


def test_linear_backscatter_becomes_db_and_its_zeros_and_nan_are_not_valid() -> None:
    power = np.full((1, 2, 2, 2), 0.1, np.float32)
    power[0, 0, 0, 0], power[0, 1, 0, 1] = 0, np.nan
    values, valid = measured(power, "linear")
    assert valid[0].tolist() == [[False, False], [True, True]]
    assert values[0, :, 1].flatten().tolist() == pytest.approx([-10] * 4)
    assert not values[0, :, 0].any()


def test_digital_numbers_of_no_data_are_not_valid_but_a_dark_band_is() -> None:
    x = np.array([[0, 0], [0, 7], [-10_000, 7], [np.nan, 7]], np.float32)  # (T, C)
    values, valid = measured(x[:, :, None, None], "dn")
    assert valid[:, 0, 0].tolist() == [False, True, False, False]
    assert np.isfinite(values).all() and values[1, 1, 0, 0] == 7


def test_acquisitions_of_one_day_fill_each_other_and_days_ascend() -> None:
    values = np.array([5, 1, 2, 3], np.float32)[:, None, None, None] * np.ones((4, 1, 1, 2))
    valid = np.array([[[1, 1]], [[1, 0]], [[1, 1]], [[1, 1]]], bool)
    out, is_valid, days, _ = join_days(values, valid, np.array([9, 4, 4, 4]), ~valid)
    assert days.tolist() == [4, 9]
    assert out[:, 0, 0].tolist() == [[1, 2], [5, 5]]  # the second pixel from the second slice
    assert is_valid.all()


def test_the_typical_date_is_the_clear_one_nearest_to_the_median() -> None:
    values = np.array([1, 5, 6, 20, 7, 9, 9, 9, 0], np.float32)[:, None, None, None]
    clear = np.zeros((9, 1, 1), bool)
    assert typical_dates(values, clear, 2, 0).tolist() == [1, 5]
    assert typical_dates(values, clear, 2, 1).tolist() == [2, 5]
    masked = clear.copy()
    masked[1] = True
    assert typical_dates(values, masked, 2, 0).tolist() == [2, 5]
    masked[:4] = True  # a run without any clear date ignores its masks
    assert typical_dates(values, masked, 2, 0).tolist() == [1, 5]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Dates(choice="typicl"), "Did you mean 'typical'"),  # type: ignore[arg-type]
        (lambda: Dates(max_dates={"s2": 0}), r"dates\.max_dates\.s2: got 0"),
        (lambda: Dates(min_valid_fraction=2), "between 0 and 1"),
        (lambda: Dates(max_dates={"s1_as": 4}).check(["s1_asc"]), "Did you mean 's1_asc'"),
        (lambda: source(window=Window(size=45.0, unit="m")), "no multiple of 10 m"),
        (lambda: source(window=Window(size=70.0, unit="m")), "6 x 6 px.*takes 7"),
    ],
)
def test_options_that_cannot_be_used_are_refused(make: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()
