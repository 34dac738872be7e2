"""Image patches to one token and back, with pooling indices handed past the token.

The indices tell the decoder where every maximum was, so the token carries radiometry, not texture.
Source: OmniSat (arXiv 2404.08351), section 3.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainssl.errors import ConfigError
from domainssl.nn.ltae import linear_before_norm
from domainssl.nn.norm import GlobalBatchNorm

__all__ = ["PatchDecoder", "PatchEncoder", "Pooled", "pooled_sides", "unpool"]


class Pooled(NamedTuple):
    """Where the maxima of one pooling were.

    Attributes:
        indices: Flat positions in the input, int64 (N, D, h, w).
        side: Side of the input.
    """

    indices: Tensor
    side: int


def pooled_sides(patch_size: int) -> list[int]:
    """Return the sides of the inputs of all poolings of a patch, 25, 12, 6, 3 for 50 pixels.

    Raises:
        ConfigError: The patch is too small for one pooling.
    """
    if patch_size < 3:
        raise ConfigError(f"patch_size: image patches need at least 3 pixels, got {patch_size}.")
    sides = [(patch_size + 1) // 2]
    while sides[-1] // 2 > 1:
        sides.append(sides[-1] // 2)
    return sides


def unpool(x: Tensor, pooled: Pooled) -> Tensor:
    """Put values back where the maxima were: (N, D, h, w) -> (N, D, side, side), else zero.

    Windows do not overlap, so no position is written twice and the result is deterministic.
    """
    # channels last in memory, which the convolutions after it take without a copy
    places, values = (t.flatten(2).transpose(1, 2) for t in (pooled.indices, x))
    empty = x.new_zeros((len(x), pooled.side**2, x.shape[1]))
    full = empty.scatter(1, places, values).transpose(1, 2)
    return full.unflatten(2, (pooled.side, pooled.side))


class _ResidualBlock(nn.Module):
    """`GELU(GN(conv2(GELU(GN(conv1 x)))) + x)` with one group normalisation for both."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.GroupNorm(groups, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D, h, w) -> (N, D, h, w)."""
        y = F.gelu(self.bn(self.conv1(x)))
        return F.gelu(self.bn(self.conv2(y)) + x)


class PatchEncoder(nn.Module):
    """Encode image patches one by one.

    Args:
        channels: Bands.
        width: Token width D.
        patch_size: Side of a patch in pixels, at least 3.
        groups: Groups of the normalisations.
    """

    def __init__(self, channels: int, width: int, patch_size: int, groups: int = 4) -> None:
        super().__init__()
        pools = len(pooled_sides(patch_size))
        first = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        layers: list[nn.Module] = [first, GlobalBatchNorm(width), nn.GELU(), nn.MaxPool2d(2)]
        for _ in range(pools - 1):
            layers += [_ResidualBlock(width, groups), nn.MaxPool2d(2)]
        # Places in the list are those of the published state dict.
        self.proj = nn.ModuleList(layers)

    def forward(self, x: Tensor, counts: Tensor) -> tuple[Tensor, list[Pooled]]:
        """Encode patches.

        Args:
            x: (N, C, p, p).
            counts: bool (N,); False patches do not count in batch statistics.

        Returns:
            Tokens (N, D), and the poolings from the last (1 × 1 output) to the first.
        """
        poolings: list[Pooled] = []
        # channels last in memory: convolutions and poolings make no copies
        x = x.contiguous(memory_format=torch.channels_last)
        for i, layer in enumerate(self.proj):
            if isinstance(layer, nn.Conv2d):
                x = linear_before_norm(x, layer, self.proj[i + 1])
            elif isinstance(layer, GlobalBatchNorm):
                x = layer(x, counts)
            elif isinstance(layer, nn.MaxPool2d):
                side = x.shape[-1]
                x, indices = F.max_pool2d(x, 2, return_indices=True)
                poolings.insert(0, Pooled(indices, side))
            else:
                x = layer(x)
        return x.flatten(1), poolings


class PatchDecoder(nn.Module):
    """Mirror the poolings of `PatchEncoder`; linear given the indices.

    Args:
        channels: Bands.
        width: Token width D.
        patch_size: Side of a patch in pixels.
    """

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        sides = pooled_sides(patch_size)
        layers: list[nn.Module] = []
        for _ in sides[1:]:
            layers += [nn.Identity(), nn.ConvTranspose2d(width, width, 3, padding=1, bias=False)]
        extra = patch_size - (2 * (sides[0] - 1) + 1)
        last = nn.ConvTranspose2d(width, channels, 3, 2, padding=1, output_padding=extra)
        # Identity stands where the published list has a pooling to undo.
        self.decode = nn.ModuleList([*layers, nn.Identity(), last])

    def forward(self, tokens: Tensor, poolings: list[Pooled]) -> Tensor:
        """(N, D) and the poolings of the same patches -> (N, C, p, p)."""
        x = tokens[:, :, None, None]
        for pooled, layer in zip(poolings, self.decode[1::2], strict=True):
            x = layer(unpool(x, pooled))
        return x
