"""Data sets of others as data: values, companions, windows, splits, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from monai.data import Dataset as MonaiDataset
from monai.data import MetaTensor
from monai.transforms import Compose, NormalizeIntensityd, RandSpatialCropSamplesd
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from domainssl.datamodules.dataset import DatasetClass, DatasetDataModule
from domainssl.errors import ConfigError, DataError
from domainssl.loading.plan import Piece
from domainssl.loading.source import Loading
from domainssl.modality import check_batch
from domainssl.sources.dataset import SampleKeys
from domainssl.sources.held_out import HeldOut
from domainssl.sources.windows import Window

PAIR: dict[str, Any] = {
    "s1": {
        "channels": ("VV", "VH"), "positions": (1, 0), "stored_unit": "linear",
        "value_unit": "db", "size": (8, 12),
    },
    "s2": {"key": "optical", "channels": ("B03",), "value_unit": "dn", "size": (4, 6)},
}  # fmt: skip


class Pairs(Dataset[Any]):
    """Radar of 8 x 12 and optical values of 4 x 6 pixels; item 2 has no optical image."""

    classes = ("forest", "water")

    def __init__(self, count: int = 12, **changes: Any) -> None:
        self.count, self.changes = count, changes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        radar = torch.stack([torch.full((8, 12), 0.01), torch.full((8, 12), 0.1)])
        radar[0, 0, 0] = 0.0  # no echo: no decibels
        rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
        optical = (1000 * number + 10 * rows + columns)[None].to(torch.int16)
        item = {"image": radar, "optical": optical, "label": torch.tensor(number % 2)}
        return item | {k: v(number) if callable(v) else v for k, v in self.changes.items()}


def of(dataset: Any, modalities: Any = None, **options: Any) -> DatasetDataModule:
    given = {"global_batch_size": 3, "loading": Loading(workers=0)} | options
    data = DatasetDataModule.of(dataset, modalities or PAIR, **given)
    data.setup("fit")
    return data


def first(data: DatasetDataModule, number: int = 0, split: str = "val") -> dict[str, Any]:
    return data.source(split).load(Piece(0, number, number + 1), 0).data


def test_values_units_channels_and_ids_are_those_of_the_data_set() -> None:
    data = of({"train": Pairs(), "val": Pairs(4)})
    batch = first(data, 3)
    # positions 1, 0: VV is the second channel; 0.1 and 0.01 are -10 and -20 dB
    radar, valid = batch["s1"][0], batch["s1.valid"][0]
    assert torch.allclose(radar[:, 4, 5], torch.tensor([-10.0, -20.0]))
    assert (~valid).nonzero().tolist() == [[0, 0]] and (radar[:, 0, 0] == 0).all()
    assert batch["s2"].dtype == torch.int16
    assert batch["s2"][0, 0].tolist() == [[3000 + 10 * y + x for x in range(6)] for y in range(4)]
    assert batch["id"] == ["val_3"] and batch["label"].tolist() == [1]
    assert data.label_names == ("forest", "water") and data.num_classes == 2
    check_batch(next(iter(data.train_dataloader())), data.modalities, training=True)


def test_one_window_cuts_all_modalities_where_they_lie() -> None:
    data = of({"train": Pairs(), "val": Pairs()}, window=Window(size=(4, 4)))
    assert data.modalities["s1"].size == (4, 4) and data.modalities["s2"].size == (2, 2)
    assert data.context_size == (4, 4)
    batch = first(data, 1)
    assert batch["s2"][0, 0].tolist() == [[1012, 1013], [1022, 1023]]  # the middle of 4 x 6
    seen = set()
    for number in range(12):
        item = first(data, number, "train")["s2"][0, 0] - 1000 * number
        seen.add(tuple(item.flatten().tolist()))
        high, low = int(item.max()), int(item.min())
        assert high - low == 11  # 2 x 2 neighbours, however turned
    assert len(seen) > 4


def test_what_an_item_lacks_is_not_present_where_that_is_allowed() -> None:
    missing = Pairs(4, optical=lambda number: None if number == 2 else torch.ones(1, 4, 6))
    sensors = {**PAIR, "s2": {**PAIR["s2"], "optional": True}}
    data = of({"train": missing, "val": missing}, sensors)
    rows = data.source("val").load(Piece(0, 0, 4), 0)
    assert rows.data["s2.present"].tolist() == [True, True, False, True]
    assert not rows.data["s2.valid"][2].any() and rows.data["s2"].isfinite().all()
    bad = of({"train": missing, "val": missing}).source("val").load(Piece(0, 0, 4), 0).bad
    assert list(bad) == [2] and "item 2 of Pairs has no 'optical'" in bad[2]


def test_a_part_is_held_out_the_same_in_every_run_and_never_trained_on() -> None:
    def ids(split: str, seed: int) -> list[str]:
        data = of(Pairs(), seed=seed, held_out=HeldOut(val_fraction=0.25))
        source = data.source(split)
        return [
            i for b, n in enumerate(source.sizes) for i in source.load(Piece(b, 0, n), 0).data["id"]
        ]

    assert ids("val", 0) == ids("val", 1)
    assert len(ids("val", 0)) == 3 and len(ids("train", 0)) == 9
    assert not set(ids("val", 0)) & set(ids("train", 0))


def test_a_series_keeps_its_dates_and_a_mask_its_pixels() -> None:
    class Series(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, number: int) -> dict[str, Any]:
            count = 2 + number % 2
            days = np.array([f"2020-01-{d + 1:02d}" for d in range(count)])
            mask = torch.arange(16).view(1, 4, 4)
            return {"x": torch.rand(count, 1, 4, 4), "when": days, "mask": mask}

    sensors = {
        "s2": {"key": "x", "kind": "series", "channels": ("B03",), "value_unit": "reflectance",
               "size": (4, 4)}
    }  # fmt: skip
    data = of(
        {"train": Series(), "val": Series()}, sensors, window=Window(size=2, flips=False),
        keys=SampleKeys(dates={"s2": "when"}),
    )  # fmt: skip
    rows = data.source("val").load(Piece(0, 0, 4), 0).data
    assert rows["s2.dates"].tolist()[:2] == [[18262, 18263, 0], [18262, 18263, 18264]]
    assert rows["s2.frames"].sum(1).tolist() == [2, 3, 2, 3]
    assert rows["mask"][0].tolist() == [[5, 6], [9, 10]]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.5, 0.5), (torch.tensor([1.5]), 1.5), (np.array([1.0, np.nan]), [1.0, float("nan")])],
)
def test_numbers_to_predict_are_float32(value: Any, expected: Any) -> None:
    item = first(of({"val": Pairs(target=lambda _: value)}))
    wanted = torch.tensor([expected], dtype=torch.float32)
    torch.testing.assert_close(item["target"], wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [2, 4])  # one pixel of the coarsest, turned and flipped, too
def test_maps_to_predict_are_cut_as_the_pixels_and_keep_what_is_not_known(size: int) -> None:
    def height(number: int) -> Tensor:
        rows, columns = torch.meshgrid(torch.arange(8), torch.arange(12), indexing="ij")
        found = (1000.0 * number + 10 * (rows // 2) + columns // 2).double()
        return torch.where(columns % 2 > 0, torch.nan, found)[None]

    keys = SampleKeys(target="mask")  # as torchgeo names them; then it is no mask
    window = Window(size=size)
    data = of({"train": Pairs(mask=height)}, keys=keys, window=window, global_batch_size=6)
    for batch in data.train_dataloader():
        assert "mask" not in batch and "label" in batch
        target = batch["target"]
        assert target.shape == (6, size, size) and target.dtype == torch.float32
        known = target.isfinite()
        assert known.float().mean() == 0.5
        fine = batch["s2"][:, 0].float().repeat_interleave(2, 1).repeat_interleave(2, 2)
        assert torch.equal(target[known], fine[known])
    several = of({"val": Pairs(target=lambda n: torch.cat([height(n), -height(n)]))})
    assert first(several)["target"].shape == (1, 2, 8, 12)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(8, 11), "shape .8, 11.; expected numbers per pixel.*keys.target: null"),
        (torch.zeros(2, 2, 8, 12), "expected numbers per pixel"),
        (torch.tensor(torch.inf), "'target' holds infinite numbers"),
    ],
)
def test_targets_that_do_not_fit_are_refused(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        first(of({"val": Pairs(target=lambda _: value)}))


def test_entries_that_are_no_numbers_are_no_targets() -> None:
    assert "target" not in first(of({"val": Pairs(target=lambda _: {"boxes": [1, 2]})}))


def test_monai_volumes_keep_their_affine_and_lists_of_crops_are_refused() -> None:
    affine = torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0]))
    items = [{"image": MetaTensor(torch.rand(1, 8, 8, 8) * 100, affine=affine)} for _ in range(3)]
    sensors = {"ct": {"kind": "volume", "channels": ("ct",), "value_unit": "hu", "size": (8, 8, 8)}}
    data = of(MonaiDataset(items), sensors, window=Window(size=4))
    batch = first(data)
    assert type(batch["ct"]) is Tensor and batch["ct"].shape == (1, 1, 4, 4, 4)
    moved = torch.tensor(batch["ct.affine"][0])
    assert moved[:3, 3].tolist() == [4.0, 4.0, 6.0] and moved[2, 2] == 3
    crops = RandSpatialCropSamplesd(["image"], [4, 4, 4], 2, random_size=False)
    many = of(MonaiDataset(items, crops), sensors)
    with pytest.raises(DataError, match="list of 2 items.*num_samples"):
        first(many)
    scaled = MonaiDataset(items, Compose([NormalizeIntensityd("image")]))
    with pytest.raises(ConfigError, match="applies NormalizeIntensityd, but batches hold raw"):
        of(scaled, sensors)


def test_tuples_are_read_by_position() -> None:
    pairs = TensorDataset(torch.rand(6, 3, 4, 4), torch.arange(6))
    sensors = {
        "rgb": {"key": "0", "channels": ("r", "g", "b"), "value_unit": "arbitrary", "size": (4, 4)}
    }
    data = of(pairs, sensors, keys=SampleKeys(label="1"), held_out=HeldOut(val_fraction=0))
    batch = data.source("train").load(Piece(0, 0, 6), 0).data
    assert torch.equal(batch["rgb"], pairs.tensors[0]) and batch["label"].tolist() == list(range(6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.zeros(2, 8, 9)}, r"'image' has the shape \(2, 8, 9\).*says \(2, 8, 12\)"),
        ({"image": torch.zeros(8, 12)}, r"takes the channels \[1, 0\] of its axis 0|has the shape"),
        ({"image": torch.zeros(2, 8, 12, dtype=torch.complex64)}, "complex64.*real numbers"),
        ({"image": torch.full((2, 8, 12), torch.nan)}, "holds no finite value.*optional: true"),
        ({"image": "a.tif"}, "'image' is a builtins.str, expected a tensor"),
        ({"label": torch.tensor(torch.nan)}, "a label is a whole number"),
        ({"mask": torch.zeros(5, 5)}, r"'mask' has the shape \(5, 5\); expected one class per"),
    ],
)
def test_items_that_do_not_fit_are_refused_by_key(changes: dict[str, Any], message: str) -> None:
    data = of({"train": Pairs(**changes), "val": Pairs(**changes)})
    with pytest.raises(DataError, match=message):
        first(data)


def test_arguments_that_cannot_be_used_are_refused() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield {}

    with pytest.raises(ConfigError, match="Endless gives items in its own order"):
        of(Endless())
    with pytest.raises(ConfigError, match=r"no way from stored_unit 'hu' to value_unit 'db'"):
        of(Pairs(), {"s1": {**PAIR["s1"], "stored_unit": "hu"}})
    with pytest.raises(ConfigError, match=r"modalities.s1.size: got \[8\], expected 2 numbers"):
        of(Pairs(), {"s1": {**PAIR["s1"], "size": (8,)}})
    with pytest.raises(ConfigError, match="windows need whole multiples"):
        of(Pairs(), {**PAIR, "s2": {**PAIR["s2"], "size": (5, 6)}}, window=Window(size=4))

    def built(name: str, **arguments: Any) -> None:
        dataset = DatasetClass(name, arguments, {"train": {}}, None)
        sensors = DatasetDataModule.of(Pairs(), PAIR).described
        DatasetDataModule("", dataset, sensors).setup("fit")

    with pytest.raises(ConfigError, match="no class or function 'EuroSat'. Did you mean 'EuroSAT'"):
        built("torchgeo.datasets.EuroSat")
    with pytest.raises(ConfigError, match="module 'no_such' of 'no_such.Data' cannot be imported"):
        built("no_such.Data")
    with pytest.raises(ConfigError, match=r"argument 'spilt'\. Did you mean 'split'\?"):
        built("torchgeo.datasets.EuroSAT", spilt="train")


def test_a_torchgeo_datamodule_gives_raw_values_without_its_augmentations(
    sample_root: Path,
) -> None:
    from domainssl.datamodules.samples.so2sat import sample_root as so2sat

    splits = DatasetClass(
        "torchgeo.datamodules.So2SatDataModule", {"batch_size": 4, "checksum": False}
    )
    sensors = DatasetDataModule().described
    data = DatasetDataModule(str(so2sat()), splits, sensors, loading=Loading(workers=0))
    data.setup("fit")
    own = DatasetDataModule(loading=Loading(workers=0))
    own.setup("fit")
    for split in ("train", "val"):
        assert data.source(split).sizes == own.source(split).sizes
        assert torch.equal(first(data, 5, split)["s2"], first(own, 5, split)["s2"])


class Module(LightningDataModule):
    """Data sets of three stages; the one of the test is made for the test alone."""

    def setup(self, stage: str | None = None) -> None:
        if stage == "test":
            self.test_dataset = Pairs(2)
        else:
            self.train_dataset, self.val_dataset = Pairs(6), Pairs(4)

    def test_dataloader(self) -> None: ...


def test_a_test_takes_the_test_split_where_there_is_one() -> None:
    parts = {"train": Pairs(6), "val": Pairs(4), "test": Pairs(2)}
    for given in (parts, Module()):
        data = of(given)
        data.setup("test")
        [batch] = data.test_dataloader()
        assert batch["id"] == ["test_0", "test_1"]
        assert [item for part in data.val_dataloader() for item in part["id"]] == [
            "val_0", "val_1", "val_2", "val_3",
        ]  # fmt: skip
    data = of({"train": Pairs(6), "val": Pairs(2)})
    assert [batch["id"] for batch in data.test_dataloader()] == [["val_0", "val_1"]]


def test_a_geodataset_is_read_on_a_grid(tmp_path: Path) -> None:
    import rasterio
    from torchgeo.datasets import RasterDataset

    class Scenes(RasterDataset):
        filename_glob = "*.tif"

    values = np.arange(72, dtype=np.float32).reshape(1, 8, 9)
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", width=9, height=8, count=1, dtype="float32",
        crs="EPSG:32632", transform=rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000),
    ) as file:  # fmt: skip
        file.write(values)
    sensors = {"dem": {"channels": ("height",), "value_unit": "arbitrary", "size": (4, 4)}}
    data = of({"train": Scenes(str(tmp_path))}, sensors, held_out=HeldOut(val_fraction=0))
    source = data.source("train")
    assert sum(source.sizes) == 6  # the last column of boxes is moved into the scene
    rows = source.load(Piece(0, 0, 6), 0).data
    found = {tuple(item.flatten().tolist()) for item in rows["dem"]}
    wanted = {
        tuple(values[0, y : y + 4, x : x + 4].flatten().tolist()) for y in (0, 4) for x in (0, 4, 5)
    }
    assert found == wanted
