"""Any torch `Dataset` as a source: those of torchgeo and MONAI, or your own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from domainssl.errors import DataError, nearest
from domainssl.loading.plan import Piece, generator
from domainssl.loading.source import Rows
from domainssl.modality import Batch, Modality, collate, key

__all__ = ["DatasetSource", "Reads"]

_ITEM = 41  # tag that keeps the stream of random numbers apart
_KEPT = (torch.uint8, torch.int16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Reads:
    """Where a modality lies in the items of a data set.

    Attributes:
        key: Key of a tensor (C, ...) in the item, such as `image`.
        channels: Positions of its channels; empty takes all.
    """

    key: str = "image"
    channels: tuple[int, ...] = ()


@dataclass(kw_only=True)
class DatasetSource:
    """Gives out the items of a data set whose items are dictionaries of tensors.

    `label` (int) and `mask` of an item are passed on. Random transforms that use torch's global
    generator give the same item for the same seed and epoch.

    Attributes:
        dataset: Has `__len__` and `__getitem__`; pickled to workers.
        modalities: What batches hold.
        reads: Where each modality lies in an item.
        seed: Seed of random transforms.
        is_training: Draw anew in every epoch.
        per_block: Items that are read together.
    """

    dataset: Any
    modalities: Mapping[str, Modality]
    reads: Mapping[str, Reads]
    seed: int = 0
    is_training: bool = False
    per_block: int = 32

    @property
    def sizes(self) -> Sequence[int]:
        """Items per block."""
        count = len(self.dataset)
        full, rest = divmod(count, self.per_block)
        return [self.per_block] * full + [rest] * (rest > 0)

    @property
    def num_bytes(self) -> int:
        """Bytes of all items as float32, roughly."""
        item = sum(m.num_channels * torch.Size(m.size).numel() for m in self.modalities.values())
        return 4 * item * len(self.dataset)

    def load(self, piece: Piece, epoch: int) -> Rows:
        """Read the items of a piece."""
        first = piece.block * self.per_block
        numbers = range(first + piece.start, first + piece.stop)
        items = [self._item(i, epoch if self.is_training else 0) for i in numbers]
        return Rows(data=collate(items), count=len(items))

    def _item(self, number: int, epoch: int) -> Batch:
        with torch.random.fork_rng(devices=[]):
            draw = generator(self.seed, epoch, _ITEM, number)
            torch.manual_seed(int(draw.integers(2**63)))
            found = self.dataset[number]
        item: Batch = {"index": number, "id": str(found.get("id", number))}
        for name, modality in self.modalities.items():
            values = self._values(number, found, self.reads[name], modality)
            valid = values.isfinite().all(0)
            if modality.nodata is not None:
                valid &= (values != modality.nodata).all(0)
            item[name] = values.nan_to_num(0.0, 0.0, 0.0)
            item[key(name, "valid")] = valid
            item[key(name, "present")] = True
        return item | {k: found[k] for k in ("label", "mask") if k in found}

    def _values(
        self, number: int, found: Mapping[str, Any], reads: Reads, modality: Modality
    ) -> Tensor:
        where = f"item {number} of {type(self.dataset).__name__}"
        if reads.key not in found:
            names = [str(name) for name in found]
            raise DataError(
                f"{where} has no {reads.key!r}, only {', '.join(names)}."
                f"{nearest(reads.key, names)} Set reads of {modality.name!r} to one of them."
            )
        values = torch.as_tensor(found[reads.key])
        if reads.channels:
            values = values[list(reads.channels)]
        expected = (modality.num_channels, *modality.size)
        if tuple(values.shape) != expected:
            raise DataError(
                f"{where}: {reads.key!r} has the shape {tuple(values.shape)}, but modality "
                f"{modality.name!r} says {expected} (channels, then size). Crop or resize in the "
                "data set's transforms, or choose channels."
            )
        return values if values.dtype in _KEPT else values.float()
