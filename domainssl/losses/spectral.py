"""Reconstruction of hidden bands and hidden patches, each averaged by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from domainssl.distributed import global_mean

__all__ = ["hidden_bands_and_patches"]


def hidden_bands_and_patches(
    error: Tensor, hidden_bands: Tensor, hidden_patches: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Average the errors of one modality over hidden patches, and over hidden bands.

    `L_pos = sum_{b,n hidden} mean_c e / count` over all bands, and
    `L_ch = sum_{b,c hidden} mean_n e / count` over all patches: what both hide counts in both.

    Args:
        error: Mean squared error of every band and patch, (B, C, N).
        hidden_bands: bool (B, C).
        hidden_patches: bool (B, N).
        counted: Patches that were measured, bool (B, N); others count nowhere.

    Returns:
        `L_pos` and `L_ch`, means over all ranks (zero and connected to `error` without terms), and
        how many hidden patches and bands this rank had, (2,).

    Source: Hyper-MAE (arXiv 2503.12843), its released code.

    Examples:
        >>> error = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])
        >>> bands, patches = torch.tensor([[True, False]]), torch.tensor([[False, True]])
        >>> position, channel, _ = hidden_bands_and_patches(
        ...     error, bands, patches, torch.ones(1, 2, dtype=torch.bool)
        ... )
        >>> float(position), float(channel)
        (5.0, 2.0)
    """
    with torch.autocast(error.device.type, enabled=False):
        error = error.float()
        places = counted.float()
        weight = (hidden_patches & counted).float()
        position = global_mean((error.mean(1) * weight).sum(), weight.sum())
        per_band = (error * places.unsqueeze(1)).sum(2) / places.sum(1, keepdim=True).clamp(min=1)
        bands = (hidden_bands & counted.any(1, keepdim=True)).float()
        channel = global_mean((per_band * bands).sum(), bands.sum())
        return position, channel, torch.stack([weight.sum(), bands.sum()])
