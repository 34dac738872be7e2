"""Maps of classes reach batches as `mask`: cut and turned with the pixels, -1 where unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cube_files import LEFT, TOP, coded, write_cube
from ssl4eo_files import DATES, SIDE, pattern, tile_table, write_split

from domainssl.datamodules import SentinelCubeDataModule, SSL4EOS12DataModule
from domainssl.datamodules.ssl4eo import LocationLabels
from domainssl.errors import ConfigError, DataError
from domainssl.io.ssl4eo.land_cover import LAND_COVER_NAMES
from domainssl.io.ssl4eo.write import write_release_a, write_release_b
from domainssl.loading.source import Loading
from domainssl.modality import Batch
from domainssl.sources.cube_options import Labels, Layer
from domainssl.sources.dates import Dates
from domainssl.sources.held_out import HeldOut
from domainssl.sources.windows import Window

FILES = [[0, 1, 2, 3], [4, 5, 6, 7]]
STORED_TO_CLASS = np.array([-1, 0, 1, 2, 3, 4, 5, 6, -1, 7])  # 0 no data, 8 clouds


def _stored(numbers: list[int]) -> np.ndarray:
    """Numbers 0..9 that follow the pixel, the location and the date, uint8 (n, T, Y, X)."""
    return (pattern(numbers) % 10).astype(np.uint8)


def _write_land_cover(
    root: Path, split: str, release: str, files: list[list[int]], dates: int = DATES, more: int = 0
) -> None:
    folder = root / split / "LULC"
    folder.mkdir(parents=True)
    for number, ids in enumerate(files, 1):
        values, tiles = _stored(ids)[:, :dates, None] + np.uint8(more), tile_table(ids)
        if release == "A":
            name = f"ssl4eos12_{split}_seasonal_data_{number:06d}.zarr.zip"
            write_release_a(folder / name, "LULC", values, tiles)
        else:
            keys = [f"ssl4eos12_{split}_seasonal_data_{i:07d}" for i in ids]
            path = folder / f"ssl4eos12_shard_{number:06d}.tar"
            write_release_b(path, "LULC", values, tiles, keys)


def _ssl4eo(root: Path, **changes: Any) -> SSL4EOS12DataModule:
    options: dict[str, Any] = {
        "global_batch_size": 4,
        "window": Window(size=16),
        "labels": LocationLabels(table=None, mask=True),
        "loading": Loading(workers=0),
        **changes,
    }
    data = SSL4EOS12DataModule(root=str(root), **options)
    data.setup("fit")
    return data


def _training(data: Any) -> list[Batch]:
    data.epoch = 0
    return list(data.train_dataloader())


@pytest.mark.parametrize("release", ["A", "B"])
def test_land_cover_is_that_of_the_pixels_of_the_window(release: str, tmp_path: Path) -> None:
    write_split(tmp_path, "train", FILES, release)
    _write_land_cover(tmp_path, "train", release, FILES)
    data = _ssl4eo(tmp_path)
    assert data.classes == LAND_COVER_NAMES and len(LAND_COVER_NAMES) == 8
    for batch in _training(data):
        assert batch["mask"].dtype == torch.int64 and batch["mask"].shape == (4, 16, 16)
        # Sentinel-2 holds the pattern that the numbers were made of, flipped and turned alike
        wanted = STORED_TO_CLASS[batch["s2"][:, 5].numpy().astype(int) % 10]
        np.testing.assert_array_equal(batch["mask"].numpy(), wanted)


def test_a_map_without_dates_and_one_of_the_last_date_of_a_series(tmp_path: Path) -> None:
    write_split(tmp_path, "train", FILES, "B")
    _write_land_cover(tmp_path, "train", "B", FILES)
    batch = _training(_ssl4eo(tmp_path, dates=Dates(mode="all")))[0]
    wanted = STORED_TO_CLASS[batch["s2"][:, -1, 5].numpy().astype(int) % 10]
    np.testing.assert_array_equal(batch["mask"].numpy(), wanted)
    once = tmp_path / "once"
    write_split(once, "train", FILES, "B")
    _write_land_cover(once, "train", "B", FILES, dates=1)
    for batch in _training(_ssl4eo(once, dates=Dates(mode="fixed", positions=2))):
        first = STORED_TO_CLASS[(batch["s2"][:, 5].numpy().astype(int) - 2) % 10]
        np.testing.assert_array_equal(batch["mask"].numpy(), first)


def test_resized_windows_take_the_nearest_class(tmp_path: Path) -> None:
    write_split(tmp_path, "train", [[0, 1, 2, 3]])
    folder = tmp_path / "train" / "LULC"
    folder.mkdir()
    halves = np.ones((4, DATES, 1, SIDE, SIDE), np.uint8)
    halves[..., 20:] = 5  # built
    name = "ssl4eos12_train_seasonal_data_000001.zarr.zip"
    write_release_a(folder / name, "LULC", halves, tile_table([0, 1, 2, 3]))
    data = _ssl4eo(tmp_path, window=Window(size=16, min_size=12, max_size=30))
    [batch] = _training(data)
    rows, columns = np.mgrid[:16, :16] + 0.5
    for i, geo in enumerate(batch["s2.geo"]):
        x = geo["a"] * columns + geo["b"] * rows + geo["c"] - 500_000.0
        x -= 1000.0 * int(batch["id"][i].split("_")[0])
        mask = batch["mask"][i].numpy()
        assert (mask[x < 199] == 0).all() and (mask[x > 201] == 4).all()


def test_land_cover_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_split(tmp_path, "train", FILES)
    with pytest.raises(DataError, match="has no folder 'LULC'"):
        _ssl4eo(tmp_path)
    _write_land_cover(tmp_path, "train", "A", FILES[:1])
    with pytest.raises(DataError, match="partner of the product LULC is not there.*mask: false"):
        _training(_ssl4eo(tmp_path))
    for path in (tmp_path / "train" / "LULC").iterdir():
        path.unlink()
    (tmp_path / "train" / "LULC").rmdir()
    _write_land_cover(tmp_path, "train", "A", FILES, more=2)
    with pytest.raises(DataError, match=r"holds 11, expected 0 \(no data\) to 9.*esri_original"):
        _training(_ssl4eo(tmp_path))
    with pytest.raises(ConfigError, match="maks"):
        _ssl4eo(tmp_path, labels={"maks": True})


def test_pixels_of_cubes_carry_the_class_of_the_map(tmp_path: Path) -> None:
    """The map has pixels of 20 m, the finest layer 10 m, windows are turned."""
    write_cube(tmp_path / "s2" / "a.zarr", coded(1, 1, 64).astype(np.uint16), ("B02",), times=None)
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 4, (1, 1, 32, 32)).astype(np.uint8)
    attrs = {"flag_values": [0, 1, 2], "flag_meanings": "water crops roofs", "_FillValue": 3}
    write_cube(tmp_path / "labels" / "a.zarr", classes, ("label",), times=None, step=20.0,
               as_variables=True, attrs=attrs)  # fmt: skip
    data = SentinelCubeDataModule(
        root=str(tmp_path),
        modalities={"s2": Layer(bands=("B02",))},
        labels=Labels(mask=True),
        held_out=HeldOut(val_fraction=0),
        window=Window(size=160, unit="m"),
        global_batch_size=16,
        loading=Loading(workers=0),
    )
    data.setup("fit")
    [batch] = _training(data)
    rows, columns = np.mgrid[:16, :16] + 0.5
    known = np.where(classes[0, 0] == 3, -1, classes[0, 0].astype(int))
    for geo, mask in zip(batch["s2.geo"], batch["mask"].numpy(), strict=True):
        x = geo["a"] * columns + geo["b"] * rows + geo["c"] - LEFT
        y = TOP - (geo["d"] * columns + geo["e"] * rows + geo["f"])
        np.testing.assert_array_equal(mask, known[(y // 20).astype(int), (x // 20).astype(int)])


def test_the_sample_of_change_has_two_dates_and_the_map_of_what_changed() -> None:
    data = SentinelCubeDataModule(
        root="sample:change",
        labels=Labels(mask=True),
        dates=Dates(mode="all"),
        window=Window(size=640, unit="m", jitter=False, flips=False, quarter_turns=False),
        held_out=HeldOut(val_fraction=0.2),
        global_batch_size=96,
        loading=Loading(workers=0),
    )
    data.setup("fit")
    assert data.label_names == ("unchanged", "changed")
    assert sum(data.source("train").sizes) == 256
    batch = next(iter(data.train_dataloader()))
    assert batch["s2"].shape == (96, 2, 12, 64, 64) and bool(batch["s2.frames"].all())
    changed = batch["mask"] == 1
    share = changed.float().mean((1, 2))
    assert float(share.min()) > 0.2 and float(share.max()) < 0.55
    # neither the difference of pixels nor that of levels tells where something changed
    x = batch["s2"]
    difference = (x[:, 1] - x[:, 0]).abs().mean(1)
    inside, outside = difference[changed].mean(), difference[~changed].mean()
    assert abs(float(inside / outside) - 1) < 0.05


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fraction_of_the_training_items_is_the_same_in_every_epoch(
    workers: int, tmp_path: Path
) -> None:
    numbers = list(range(100))
    write_split(tmp_path, "train", [numbers[:37], numbers[37:]])

    def ids(epoch: int, **loading: Any) -> list[str]:
        data = SSL4EOS12DataModule(
            root=str(tmp_path),
            global_batch_size=2,
            window=Window(size=16),
            loading=Loading(**loading),
        )
        data.setup("fit")
        data.epoch = epoch
        found = [item.split("_")[0] for b in data.train_dataloader() for item in b["id"]]
        data.teardown()
        return found

    few = ids(0, workers=workers, train_fraction=0.1)
    assert len(few) == len(set(few)) == 10
    assert set(ids(1, workers=workers, train_fraction=0.1)) == set(few)
    if workers:
        return
    assert set(few) < set(ids(0, workers=0, train_fraction=0.2))
    assert set(ids(0, workers=0, train_fraction=0.1, train_draw=1)) != set(few)
    with pytest.raises(ConfigError, match="train_fraction: got 0.*above 0"):
        Loading(train_fraction=0)


def test_a_part_of_a_source_holds_the_rows_of_the_whole() -> None:
    common: dict[str, Any] = {"window": Window(size=16), "labels": LocationLabels(mask=True)}
    whole = SSL4EOS12DataModule(global_batch_size=8, loading=Loading(workers=0), **common)
    whole.setup("fit")
    few = Loading(workers=0, train_fraction=0.1)
    part = SSL4EOS12DataModule(global_batch_size=9, loading=few, **common)
    part.setup("fit")
    rows = {int(i): (b, n) for b in _training(whole) for n, i in enumerate(b["index"])}
    [batch] = _training(part)
    for n, index in enumerate(batch["index"]):
        there, row = rows[int(index)]
        assert batch["id"][n] == there["id"][row]
        for name in ("s1", "s2", "s2.valid", "mask", "label"):
            assert torch.equal(batch[name][n], there[name][row]), name
