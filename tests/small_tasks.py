"""A small task over a small backbone, and a batch for it."""

from __future__ import annotations

import torch

from domainssl.backbones.vit import ViTBackbone
from domainssl.modality import Modality
from domainssl.tasks import ClassificationTask

MODALITIES = {
    "he": Modality(
        name="he", kind="image", channels=("r", "g", "b"), value_unit="rgb8", size=(16, 16),
        mpp_um=1.0, mean=(128.0,) * 3, std=(64.0,) * 3,
    )
}  # fmt: skip
CLASSES = ("glands", "nests", "mucin")
SMALL = {"architecture": {"width": 24, "depth": 2, "heads": 2}, "patch_size": 8}


def backbone() -> ViTBackbone:
    torch.manual_seed(3)
    return ViTBackbone(MODALITIES, **SMALL)


def task(**changes) -> ClassificationTask:
    given = {"modalities": MODALITIES, "classes": CLASSES, **changes}
    return ClassificationTask(given.pop("backbone", None) or backbone(), **given)


def batch(size: int = 4) -> dict:
    values = torch.rand(size, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 255
    return {"he": values, "label": torch.arange(size) % 3, "id": [str(i) for i in range(size)]}
