"""Targets standardised per patch and per group of correlated bands, and losses on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from domainssl.distributed import global_mean
from domainssl.losses.reconstruction import patch_statistics

__all__ = ["masked_error", "patch_group_statistics"]


def patch_group_statistics(
    patches: Tensor, sizes: Sequence[int], valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return mean and scale of every patch and group of consecutive bands.

    `scale = sqrt(unbiased variance + 1e-6)` over the P · |group| values of a patch. One group of
    all bands is the standardisation of MAE; groups of one band standardise every band.

    Args:
        patches: (B, N, P, C).
        sizes: Number of bands per group; their sum is C.
        valid: bool (B, N, P, 1); False pixels do not count. None counts all.

    Returns:
        Mean and scale, float32 (B, N, 1, C).

    Source: MAESTRO (arXiv 2508.10894), patch-group-wise normalisation.

    Examples:
        >>> patches = torch.tensor([[[[1.0, 10.0], [3.0, 30.0]]]])  # two pixels and bands
        >>> patch_group_statistics(patches, [1, 1])[0].flatten().tolist()
        [2.0, 20.0]
        >>> patch_group_statistics(patches, [2])[0].flatten().tolist()
        [11.0, 11.0]
    """
    with torch.autocast(patches.device.type, enabled=False):
        parts = []
        for group in patches.float().split(list(sizes), dim=-1):
            where = None if valid is None else valid.expand_as(group).flatten(2)
            statistics = patch_statistics(group.flatten(2), where)  # (B, N, 1) each
            parts.append([s.unsqueeze(-1).expand(-1, -1, 1, group.shape[-1]) for s in statistics])
        mean, scale = (torch.cat(list(part), dim=-1) for part in zip(*parts, strict=True))
        return mean, scale


def masked_error(
    prediction: Tensor, target: Tensor, counted: Tensor, power: Literal[1, 2] = 1
) -> Tensor:
    """Average `|prediction - target|^power` over the values that count in the global batch.

    Args:
        prediction: Any shape.
        target: The same shape.
        counted: bool, broadcastable to them.
        power: 1 for the absolute, 2 for the squared error.

    Returns:
        The loss, (); zero and connected to `prediction` when nothing counts.

    Examples:
        >>> prediction, target = torch.tensor([0.0, 0.0]), torch.tensor([2.0, 9.0])
        >>> float(masked_error(prediction, target, torch.tensor([True, False]), power=2))
        4.0
    """
    with torch.autocast(prediction.device.type, enabled=False):
        error = (prediction.float() - target.float()).abs()
        if power == 2:
            error = error.square()
        weight = counted.expand_as(error)
        return global_mean(torch.where(weight, error, 0.0).sum(), weight.sum().float())
