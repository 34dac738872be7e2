"""Labelled pairs of images in memory, and a small backbone for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from domainssl.backbones.card import export_backbone
from domainssl.backbones.croma import CROMABackbone
from domainssl.datamodules.base import DomainDataModule
from domainssl.loading.plan import Piece
from domainssl.loading.source import Loading, Rows
from domainssl.modality import Modality

SIDE = 16
CLASSES = ("<b>river</b>", "field & wood", "town")


def modality(name: str, channels: tuple[str, ...]) -> Modality:
    count = len(channels)
    return Modality(
        name=name, kind="image", channels=channels, value_unit="arbitrary", size=(SIDE, SIDE),
        mean=(0.0,) * count, std=(1.0,) * count,
    )  # fmt: skip


MODALITIES = {"s1": modality("s1", ("VV", "VH")), "s2": modality("s2", ("B04", "B03", "B02"))}


@dataclass
class PairSource:
    """Images whose halves are brighter by class; both sensors share a position."""

    split: str
    count: int
    with_mask: bool
    labels: str
    is_training: bool = False

    @property
    def sizes(self) -> list[int]:
        return [self.count]

    @property
    def num_bytes(self) -> int:
        return 0

    def load(self, piece: Piece, epoch: int) -> Rows:
        numbers = np.arange(piece.start, piece.stop)
        label = numbers % len(CLASSES)
        data: dict[str, object] = {}
        mask = np.zeros((len(numbers), SIDE, SIDE), np.int64)
        for name, form in MODALITIES.items():
            values = np.empty((len(numbers), form.num_channels, SIDE, SIDE), np.float32)
            for row, (number, own) in enumerate(zip(numbers, label)):
                rng = np.random.default_rng([number, self.split == "train", len(name)])
                shared = np.random.default_rng([number, self.split == "train"]).normal(size=4)
                values[row] = 0.3 * rng.normal(size=values[row].shape)
                values[row, :, : SIDE // 2] += own
                values[row, 0, : SIDE // 2, : SIDE // 2] += shared[0]
                values[row, 1, SIDE // 2 :, SIDE // 2 :] += shared[1]
                mask[row, : SIDE // 2] = own
            data[name] = torch.from_numpy(values)
        data["id"] = [f"{self.split}{number}" for number in numbers]
        if self.labels == "one":
            label = np.zeros_like(label)
        if self.labels == "few":
            label = np.where(numbers < 3, label, -1)
        if self.labels == "multi":  # how bright halves are; the last is not known of all
            several = np.stack([label > 0, label > 1, label == 0], 1).astype(np.float32)
            several[numbers % 5 == 0, 2] = np.nan
            data["label"] = torch.from_numpy(several)
        elif self.labels != "none":
            data["label"] = torch.from_numpy(label.astype(np.int64))
        if self.with_mask:
            data["mask"] = torch.from_numpy(mask)
        return Rows(data=data, count=len(numbers))


class LabelledPairs(DomainDataModule):
    """Two sensors, three classes, a map per item.

    Args:
        labels: `all`, `one`, `few`, `multi` (any number per item) or `none`.
        with_mask: Deliver maps.
        private: Behave as data whose names are protected.
        same_person: Give both splits a person in common.
        train_items: Items of the train split.
    """

    label_names = CLASSES
    modalities = MODALITIES

    def __init__(
        self,
        labels: str = "all",
        with_mask: bool = True,
        private: bool = False,
        same_person: bool = False,
        train_items: int = 36,
    ) -> None:
        super().__init__(global_batch_size=12, loading=Loading(workers=0))
        self.labels, self.with_mask, self.private = labels, with_mask, private
        self.train_items = train_items
        self.persons = {"train0": 7, "val0": 7} if same_person else {}

    def open_sources(self) -> dict[str, PairSource]:
        sizes = {"train": self.train_items, "val": 24}
        return {
            split: PairSource(split, count, self.with_mask, self.labels, split == "train")
            for split, count in sizes.items()
        }

    def identity(self) -> Mapping[str, object]:
        return {"format": "pairs", "items": self.train_items}

    @property
    def withheld(self) -> tuple[str, ...]:
        return ("Miller",) if self.private else ()


def exported(folder: Path, names: tuple[str, ...] = ("s1", "s2"), seed: int = 1) -> Path:
    """Export a small CROMA with random weights."""
    torch.manual_seed(seed)
    backbone = CROMABackbone(
        {n: MODALITIES[n] for n in names}, width=32, depth=2, heads=2, patch_size=4
    )
    export_backbone(backbone, folder)
    return folder


def data_file(folder: Path, **arguments: object) -> Path:
    """Write a configuration of the data alone."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["data:", "  class_path: evaluation_fakes.LabelledPairs", "  init_args:"]
    lines += [f"    {name}: {str(value).lower()}" for name, value in arguments.items()]
    lines = lines if arguments else lines[:2]
    path = folder / "data.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


class Foreign(LightningDataModule):
    """A DataModule of somebody else, which makes its test data for the stage `test` alone."""

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.parts = {"train": _Halves(30), "val": _Halves(6)}
        else:
            self.parts = {"test": _Halves(12)}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.parts["train"])

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.parts["val"])

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.parts["test"])


@dataclass
class _Halves(Dataset):
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, object]:
        draw = torch.Generator().manual_seed(number + 100 * self.count)
        image = torch.randn(2, SIDE, SIDE, generator=draw) + number % 3
        return {"image": image, "label": number % 3}
