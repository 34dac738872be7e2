"""What a person gets without any model: mean, deviation and five percentiles per channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from domainssl.modality import Modality, valid_mask

__all__ = ["PERCENTILES", "band_statistics"]

PERCENTILES = (5, 25, 50, 75, 95)


def band_statistics(batch: Mapping[str, Any], modality: Modality) -> Tensor:
    """Return mean, standard deviation and `PERCENTILES` of every channel of each item.

    Only valid pixels, voxels or features count. Percentiles are interpolated linearly between the
    sorted values, as `numpy.percentile` does.

    Args:
        batch: Raw physical values and their companions.
        modality: Which one, and where its channel axis is.

    Returns:
        (B, 7 C), float32: all means, all deviations, then one percentile after the other; zero for
        items without a valid pixel.
    """
    x = batch[modality.name].double().movedim(modality.channel_axis, 1)
    x = x.unsqueeze(-1).flatten(2)  # (B, C, P); a table has one value per channel
    if x.shape[-1] == 0:
        x = x.new_zeros((*x.shape[:2], 1))
    valid = valid_mask(batch, modality)
    valid = valid.reshape(len(x), 1, -1) if valid.ndim > 1 else valid.reshape(-1, 1, 1)
    weight = valid.double().expand(-1, 1, x.shape[-1])
    x = torch.where(weight > 0, x, 0.0)
    count = weight.sum(-1).clamp(min=1)
    mean = (x * weight).sum(-1) / count
    spread = ((x - mean.unsqueeze(-1)).square() * weight).sum(-1) / count
    ranked = _percentiles(x, weight > 0)
    return torch.cat([mean, spread.sqrt(), *ranked], dim=1).float()


def _percentiles(x: Tensor, valid: Tensor) -> list[Tensor]:
    """Return (B, C) per percentile of values (B, C, P) where `valid` (B, 1, P)."""
    ordered = torch.where(valid, x, torch.inf).sort(dim=-1).values  # invalid ones come last
    last = (valid.sum(-1, keepdim=True) - 1).clamp(min=0)  # (B, 1, 1), of the valid values
    found = []
    for percent in PERCENTILES:
        place = last.double() * percent / 100
        low = place.floor().long().expand(-1, x.shape[1], 1)
        high = place.ceil().long().expand(-1, x.shape[1], 1)
        below, above = ordered.gather(-1, low), ordered.gather(-1, high)
        value = below + (above - below) * (place - place.floor())
        found.append(torch.where(valid.any(-1, keepdim=True), value, 0.0).squeeze(-1))
    return found
