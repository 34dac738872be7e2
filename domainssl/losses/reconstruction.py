"""Reconstruction of hidden patches."""

from __future__ import annotations

import torch
from torch import Tensor

from domainssl.distributed import global_mean

__all__ = ["masked_patch_mse", "patch_mse", "patch_statistics"]


def patch_statistics(
    patches: Tensor, valid: Tensor | None = None, *, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Return mean and scale of every patch, `sqrt(unbiased variance + epsilon)`.

    Args:
        patches: (B, N, P), P values per patch.
        valid: bool, broadcastable to `patches`; False values do not count. None counts all.
        epsilon: Added to the variance.

    Returns:
        Mean and scale, (B, N, 1) each, in float32.

    Source: MAE (He et al. 2022), section 4; the unbiased variance is the released code's.

    Examples:
        >>> mean, scale = patch_statistics(torch.tensor([[[1.0, 3.0]]]))
        >>> float(mean), round(float(scale), 4)
        (2.0, 1.4142)
    """
    patches = patches.float()
    if valid is None:
        mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    else:
        weight = valid.expand_as(patches).float()
        count = weight.sum(-1, keepdim=True)
        mean = (patches * weight).sum(-1, keepdim=True) / count.clamp(min=1)
        squares = ((patches - mean) * weight).square().sum(-1, keepdim=True)
        variance = squares / (count - 1).clamp(min=1)
    return mean, (variance + epsilon).sqrt()


def patch_mse(
    prediction: Tensor, target: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Average the squared error of every patch over its valid values.

    Args:
        prediction: (B, N, P).
        target: (B, N, P).
        valid: bool, broadcastable to `prediction`; None counts all.

    Returns:
        The error, float32 (B, N), and whether a patch has a valid value, bool (B, N).

    Examples:
        >>> error, _ = patch_mse(torch.zeros(1, 1, 2), torch.tensor([[[1.0, 3.0]]]))
        >>> float(error)
        5.0
    """
    with torch.autocast(prediction.device.type, enabled=False):
        error = (prediction.float() - target.float()).square()
        if valid is None:
            return error.mean(-1), torch.ones_like(error[..., 0], dtype=torch.bool)
        counted = valid.expand_as(error).float()
        values = counted.sum(-1)
        return (error * counted).sum(-1) / values.clamp(min=1), values > 0


def masked_patch_mse(
    prediction: Tensor,
    target: Tensor,
    removed: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """Average the squared error of hidden patches over the global batch.

    `L = sum_bn m_bn mean_p (prediction - target)^2 / sum_bn m_bn`.

    Args:
        prediction: (B, N, P).
        target: (B, N, P).
        removed: Weight of a patch, bool (B, N); True where it was hidden.
        valid: bool, broadcastable to `prediction`; False values are left out of the mean of
            their patch, and a patch without any does not count.

    Returns:
        The loss, (); zero and connected to `prediction` when no patch counts.

    Examples:
        >>> prediction, target = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 3.0], [9.0, 9.0]]])
        >>> float(masked_patch_mse(prediction, target, removed=torch.tensor([[True, False]])))
        5.0
    """
    with torch.autocast(prediction.device.type, enabled=False):
        per_patch, has_values = patch_mse(prediction, target, valid)
        weight = (removed & has_values).float()
        return global_mean((per_patch * weight).sum(), weight.sum())
