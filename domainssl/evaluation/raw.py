"""What a person gets without any model: mean and standard deviation per band."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from domainssl.modality import Modality, valid_mask

__all__ = ["band_statistics"]


def band_statistics(batch: Mapping[str, Any], modality: Modality) -> Tensor:
    """Return mean and standard deviation of every band over the valid pixels of each item.

    Args:
        batch: Raw physical values and their companions.
        modality: Which one, and where its channel axis is.

    Returns:
        (B, 2 C), float32; zero for items without a valid pixel.
    """
    x = batch[modality.name].double().movedim(modality.channel_axis, 1).flatten(2)  # (B, C, P)
    if x.shape[-1] == 0:
        x = x.new_zeros((*x.shape[:2], 1))
    valid = valid_mask(batch, modality)
    valid = valid.reshape(len(x), 1, -1) if valid.ndim > 1 else valid.reshape(-1, 1, 1)
    weight = valid.double().expand(-1, 1, x.shape[-1])
    x = torch.where(weight > 0, x, 0.0)
    count = weight.sum(-1).clamp(min=1)
    mean = (x * weight).sum(-1) / count
    spread = ((x - mean.unsqueeze(-1)).square() * weight).sum(-1) / count
    return torch.cat([mean, spread.sqrt()], dim=1).float()
