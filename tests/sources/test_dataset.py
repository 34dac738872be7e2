from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from domainssl.datamodules.base import DomainDataModule
from domainssl.errors import DataError
from domainssl.loading.plan import Piece
from domainssl.loading.source import Loading, Source
from domainssl.modality import Modality, check_batch
from domainssl.sources.dataset import DatasetSource, Reads


class Stacked(Dataset):
    """Radar and optical channels in one image, as torchgeo's data sets give them."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.arange(4.0)[:, None, None].expand(4, 6, 6) + 10 * index
        image = image.clone()
        image[3, 0, index % 6] = float("nan")
        return {"image": image, "label": index % 3, "noise": torch.rand(())}


MODALITIES = {
    "s1": Modality(
        name="s1", kind="image", channels=("VV", "VH"), value_unit="db", size=(6, 6), gsd_m=10.0
    ),
    "s2": Modality(
        name="s2", kind="image", channels=("B03", "B04"), value_unit="dn", size=(6, 6), gsd_m=10.0
    ),
}
READS = {"s1": Reads("image", (0, 1)), "s2": Reads("image", (2, 3))}


def source(**changes: Any) -> DatasetSource:
    return DatasetSource(
        dataset=Stacked(), modalities=MODALITIES, reads=READS, per_block=4, **changes
    )


class DatasetData(DomainDataModule):
    """All that a DataModule needs."""

    modalities = MODALITIES  # type: ignore[assignment]

    def open_sources(self) -> dict[str, Source]:
        return {"train": source(is_training=True), "val": source()}

    def identity(self) -> dict[str, Any]:
        return {"format": "torch"}


def test_channels_of_one_image_become_modalities_with_their_values():
    assert source().sizes == [4, 4, 2]
    rows = source().load(Piece(1, 1, 3), 0)
    assert rows.data["id"] == ["5", "6"] and rows.data["label"].tolist() == [2, 0]
    assert (rows.data["s1"][0] == torch.tensor([50.0, 51.0])[:, None, None]).all()
    valid = rows.data["s2.valid"]
    assert (~valid).nonzero().tolist() == [[0, 0, 5], [1, 0, 0]]
    assert rows.data["s2"].isfinite().all() and (rows.data["s2"][0, 1][valid[0]] == 53).all()


def test_a_data_set_trains_through_the_stream_and_epochs_repeat():
    data = DatasetData(global_batch_size=5, loading=Loading(workers=0))
    data.setup("fit")
    batches = list(data.train_dataloader())
    for batch in batches:
        check_batch(batch, MODALITIES, training=True)
    assert sorted(int(i) for b in batches for i in b["index"]) == list(range(10))
    assert isinstance(data.source("val"), DatasetSource)


def test_random_transforms_repeat_per_seed_and_epoch():
    def noise(epoch: int, seed: int = 0) -> float:
        drawing, kept = source(is_training=True, seed=seed), []
        drawing.dataset = _Recording(Stacked(), kept)
        drawing.load(Piece(0, 0, 1), epoch)
        return kept[0]

    before = torch.random.get_rng_state()
    assert noise(0) == noise(0) and len({noise(0), noise(1), noise(0, seed=1)}) == 3
    assert torch.equal(torch.random.get_rng_state(), before)


class _Recording(Dataset):
    def __init__(self, inner: Dataset, kept: list[float]) -> None:
        self.inner, self.kept = inner, kept

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = self.inner[index]
        self.kept.append(float(found["noise"]))
        return found


def test_items_that_do_not_fit_are_refused_by_name():
    wrong = DatasetSource(
        dataset=Stacked(), modalities=MODALITIES, reads={**READS, "s2": Reads("imge")}
    )
    with pytest.raises(DataError, match=r"no 'imge', only image.*Did you mean 'image'"):
        wrong.load(Piece(0, 0, 1), 0)
    whole = DatasetSource(
        dataset=Stacked(), modalities=MODALITIES, reads={**READS, "s2": Reads("image")}
    )
    with pytest.raises(DataError, match=r"shape \(4, 6, 6\), but modality 's2' says \(2, 6, 6\)"):
        whole.load(Piece(0, 0, 1), 0)
