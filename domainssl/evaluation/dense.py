"""Labels of patches out of maps, and the patches of a representation on one grid."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d, one_hot

from domainssl.backbones.base import Features
from domainssl.modality import Modality

__all__ = ["majority", "patch_labels", "patch_tokens"]


def patch_tokens(
    features: Features, subset: tuple[str, ...], modalities: Mapping[str, Modality]
) -> tuple[Tensor, Tensor, tuple[int, ...]] | None:
    """Return the patches of a representation on one grid.

    The fused ones where there are some, else those of the modalities side by side where all have
    the same grid. Dates of a series are averaged over those in which a patch is valid.

    Args:
        features: Of a batch.
        subset: Modalities that were encoded.
        modalities: Of the backbone.

    Returns:
        Tokens (B, N, E), which of them are valid, bool (B, N), and the grid without dates; None
        where there is no common grid.
    """
    names = ["joint"] if len(subset) > 1 and "joint" in features.tokens else list(subset)
    parts, valid, grids = [], [], set()
    for name in names:
        tokens, grid = features.tokens.get(name), features.grid.get(name)
        if tokens is None or not grid or tokens.shape[1] != torch.Size(grid).numel():
            return None
        is_valid = features.token_valid.get(name)
        if is_valid is None:
            is_valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        is_series = name in features.dates and features.dates[name].ndim == 2
        is_series |= name in modalities and modalities[name].kind == "series"  # without dates
        if is_series and len(grid) == 3:
            weight = is_valid.unflatten(1, grid).flatten(2).float().unsqueeze(-1)  # (B, T, N, 1)
            values = tokens.unflatten(1, grid).flatten(2, 3) * weight
            tokens = values.sum(1) / weight.sum(1).clamp(min=1)
            is_valid, grid = weight.any(1).squeeze(-1), grid[1:]
        parts.append(tokens)
        valid.append(is_valid)
        grids.add(tuple(grid))
    if len(grids) != 1:
        return None
    return torch.cat(parts, dim=2), torch.stack(valid).all(0), grids.pop()


def majority(mask: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Return the most frequent class in each patch, int64 (B, *grid).

    Args:
        mask: int64 (B, *S), -1 where unknown.
        grid: Patches per axis.

    Returns:
        -1 where more than half of a patch is unknown.
    """
    classes = int(mask.max()) + 1 if mask.numel() else 0
    if classes < 1:
        return torch.full((len(mask), *grid), -1, dtype=torch.int64, device=mask.device)
    shares = one_hot(mask.long() + 1, classes + 1).movedim(-1, 1).float()  # (B, 1 + K, *S)
    if len(grid) == 2:
        shares = adaptive_avg_pool2d(shares, grid)
    else:
        shares = adaptive_avg_pool3d(shares, (grid[0], grid[1], grid[2]))
    known = shares[:, 1:].argmax(1)
    return torch.where(shares[:, 0] > 0.5, -1, known)


def patch_labels(
    tokens: Tensor, valid: Tensor, grid: tuple[int, ...], mask: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return patches with a known class, at most `most` of an item, evenly spread.

    Args:
        tokens: (B, N, E).
        valid: bool (B, N).
        grid: Patches per axis.
        mask: int64 (B, *S), -1 where unknown.
        most: Patches per item.

    Returns:
        Features (M, E), row of the item in the batch, int64 (M,), and class, int64 (M,).
    """
    if mask.ndim - 1 != len(grid):
        empty = torch.zeros(0, dtype=torch.int64, device=tokens.device)
        return tokens.new_zeros((0, tokens.shape[2])), empty, empty
    wanted = majority(mask, grid).flatten(1)
    values, items, classes = [], [], []
    for row in range(len(tokens)):
        usable = torch.nonzero((wanted[row] >= 0) & valid[row]).squeeze(1)
        if len(usable) > most:
            places = torch.arange(most, device=usable.device) * len(usable) // most
            usable = usable[places]
        values.append(tokens[row, usable])
        items.append(torch.full_like(usable, row))
        classes.append(wanted[row, usable])
    return torch.cat(values), torch.cat(items), torch.cat(classes)
