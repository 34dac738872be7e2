"""Choose which tokens stay visible."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Masking",
    "kept_count",
    "marked_first",
    "mask_from_noise",
    "mean_of_valid",
    "restore_tokens",
    "take_tokens",
]


class Masking(NamedTuple):
    """One random masking.

    Attributes:
        keep: Indices of the visible tokens in shuffled order, int64 (B, K).
        restore: Position of every token in the shuffled order, int64 (B, N).
        removed: True where the token is hidden, bool (B, N).
    """

    keep: Tensor
    restore: Tensor
    removed: Tensor


def kept_count(tokens: int, ratio: float) -> int:
    """Number of visible tokens at a mask ratio: `int(N · (1 − ratio))`, at least one."""
    return max(1, int(tokens * (1 - ratio)))


def mask_from_noise(noise: Tensor, kept: int) -> Masking:
    """Keep the `kept` tokens with the smallest noise of every item.

    Args:
        noise: (B, N).
        kept: Number of visible tokens per item.
    """
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    return Masking(shuffle[:, :kept], restore, restore >= kept)


def take_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """Gather tokens by index: (B, N, E) and (B, K) -> (B, K, E); a 2D table is shared by items."""
    if tokens.ndim == 2:
        return tokens[indices]
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def restore_tokens(visible: Tensor, restore: Tensor, filler: Tensor) -> Tensor:
    """Put visible tokens back in their places and `filler` everywhere else.

    Args:
        visible: (B, K, E), in shuffled order.
        restore: int64 (B, N).
        filler: The mask token, broadcastable to (B, N, E).

    Returns:
        (B, N, E).
    """
    batch, kept, width = visible.shape
    missing = restore.shape[1] - kept
    full = torch.cat([visible, filler.to(visible.dtype).expand(batch, missing, width)], dim=1)
    return take_tokens(full, restore)


def marked_first(mark: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bring the marked tokens of every item to the front, as many as the richest item has.

    Args:
        mark: bool (B, N).

    Returns:
        Indices int64 (B, K), in order; which of them are marked, bool (B, K); and the tokens that
        attention may look at, which are the same and one more where an item has none, or None
        where these are all.
    """
    count = mark.sum(1)
    most = int(count.max().clamp(min=1))
    order = (~mark).int().argsort(dim=1, stable=True)[:, :most]
    places = torch.arange(most, device=mark.device)
    real = places < count.unsqueeze(1)
    keys = None if int(count.min()) == most else places < count.clamp(min=1).unsqueeze(1)
    return order, real, keys


def mean_of_valid(tokens: Tensor, valid: Tensor, axis: int = 1) -> Tensor:
    """Return the mean of valid tokens along an axis, zero where there is none.

    Args:
        tokens: (B, N, E), or with more axes before the last one.
        valid: bool, the shape of the tokens without the last axis, or one that fits it.
        axis: The axis that vanishes.
    """
    weight = valid.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weight).sum(axis) / weight.sum(axis).clamp(min=1)
