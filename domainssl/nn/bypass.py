"""Patches of images and volumes to one token and back, with pooling indices handed past the token.

The indices tell the decoder where every maximum was, so the token carries radiometry, not texture.
Source: OmniSat (arXiv 2404.08351), section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainssl.errors import ConfigError
from domainssl.modality import sides_of
from domainssl.nn.ltae import linear_before_norm
from domainssl.nn.norm import GlobalBatchNorm

__all__ = ["PatchDecoder", "PatchEncoder", "Pooled", "pooled_sizes", "unpool"]

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_MAX_POOL = {2: F.max_pool2d, 3: F.max_pool3d}
_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


class Pooled(NamedTuple):
    """Where the maxima of one pooling were.

    Attributes:
        indices: Flat positions in the input, int64 (N, D, *s).
        size: Sides of the input.
    """

    indices: Tensor
    size: tuple[int, ...]


def _sides(patch_size: int | Sequence[int]) -> tuple[int, ...]:
    """Return the sides of a patch; one number is a square."""
    return sides_of(patch_size, 2 if isinstance(patch_size, int) else len(patch_size))


def pooled_sizes(patch_size: int | Sequence[int]) -> list[tuple[int, ...]]:
    """Return the sizes of the inputs of all poolings of a patch.

    Their sides are 25, 12, 6, 3 for 50 pixels. An axis that is down to one pixel stays there.

    Raises:
        ConfigError: The patch is too small for one pooling.
    """
    patch = _sides(patch_size)
    if max(patch) < 3:
        raise ConfigError(
            f"patch_size: patches of images and volumes need at least 3 pixels along one axis, got "
            f"{patch_size}."
        )
    sizes = [tuple((side + 1) // 2 for side in patch)]
    while max(sizes[-1]) // 2 > 1:
        sizes.append(tuple(max(1, side // 2) for side in sizes[-1]))
    return sizes


def unpool(x: Tensor, pooled: Pooled) -> Tensor:
    """Put values back where the maxima were: (N, D, *s) -> (N, D, *size), else zero.

    Windows do not overlap, so no position is written twice and the result is deterministic.
    """
    # channels last in memory, which the convolutions after it take without a copy
    places, values = (t.flatten(2).transpose(1, 2) for t in (pooled.indices, x))
    empty = x.new_zeros((len(x), math.prod(pooled.size), x.shape[1]))
    full = empty.scatter(1, places, values).transpose(1, 2)
    return full.unflatten(2, pooled.size)


class _ResidualBlock(nn.Module):
    """`GELU(GN(conv2(GELU(GN(conv1 x)))) + x)` with one group normalisation for both."""

    def __init__(self, width: int, groups: int, axes: int) -> None:
        super().__init__()
        self.conv1 = _CONV[axes](width, width, 3, padding=1, bias=False)
        self.conv2 = _CONV[axes](width, width, 3, padding=1, bias=False)
        self.bn = nn.GroupNorm(groups, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D, *s) -> (N, D, *s)."""
        y = F.gelu(self.bn(self.conv1(x)))
        return F.gelu(self.bn(self.conv2(y)) + x)


class PatchEncoder(nn.Module):
    """Encode patches of images or volumes one by one.

    Args:
        channels: Bands.
        width: Token width D.
        patch_size: Side of a square patch in pixels, at least 3, or the sides of any patch with
            one of them at least 3.
        groups: Groups of the normalisations.
    """

    def __init__(
        self, channels: int, width: int, patch_size: int | Sequence[int], groups: int = 4
    ) -> None:
        super().__init__()
        axes = len(_sides(patch_size))
        first = _CONV[axes](channels, width, 3, stride=2, padding=1)
        layers: list[nn.Module] = [first, GlobalBatchNorm(width), nn.GELU()]
        for i, size in enumerate(pooled_sizes(patch_size)):
            if i > 0:
                layers.append(_ResidualBlock(width, groups, axes))
            layers.append(_POOL[axes](tuple(min(2, side) for side in size)))
        # Places in the list are those of the published state dict.
        self.proj = nn.ModuleList(layers)
        self.axes = axes

    def forward(self, x: Tensor, counts: Tensor) -> tuple[Tensor, list[Pooled]]:
        """Encode patches.

        Args:
            x: (N, C, *p).
            counts: bool (N,); False patches do not count in batch statistics.

        Returns:
            Tokens (N, D), and the poolings from the last (one place left) to the first.
        """
        poolings: list[Pooled] = []
        # channels last in memory: convolutions and poolings make no copies
        x = x.contiguous(memory_format=_CHANNELS_LAST[self.axes])
        for i, layer in enumerate(self.proj):
            if isinstance(layer, nn.Conv2d | nn.Conv3d):
                x = linear_before_norm(x, layer, self.proj[i + 1])
            elif isinstance(layer, GlobalBatchNorm):
                x = layer(x, counts)
            elif isinstance(layer, nn.MaxPool2d | nn.MaxPool3d):
                size = tuple(x.shape[2:])
                x, indices = _MAX_POOL[self.axes](x, layer.kernel_size, return_indices=True)
                poolings.insert(0, Pooled(indices, size))
            else:
                x = layer(x)
        return x.flatten(1), poolings


class PatchDecoder(nn.Module):
    """Mirror the poolings of `PatchEncoder`; linear given the indices.

    Args:
        channels: Bands.
        width: Token width D.
        patch_size: Side of a square patch in pixels, or the sides of any patch.
    """

    def __init__(self, channels: int, width: int, patch_size: int | Sequence[int]) -> None:
        super().__init__()
        patch, sizes = _sides(patch_size), pooled_sizes(patch_size)
        transposed = _TRANSPOSED[len(patch)]
        layers: list[nn.Module] = []
        for _ in sizes[1:]:
            layers += [nn.Identity(), transposed(width, width, 3, padding=1, bias=False)]
        extra = tuple(p - (2 * (side - 1) + 1) for p, side in zip(patch, sizes[0], strict=True))
        last = transposed(width, channels, 3, 2, padding=1, output_padding=extra)  # type: ignore[arg-type]
        # Identity stands where the published list has a pooling to undo.
        self.decode = nn.ModuleList([*layers, nn.Identity(), last])
        self.axes = len(patch)

    def forward(self, tokens: Tensor, poolings: list[Pooled]) -> Tensor:
        """(N, D) and the poolings of the same patches -> (N, C, *p)."""
        x = tokens.view(*tokens.shape, *[1] * self.axes)
        for pooled, layer in zip(poolings, self.decode[1::2], strict=True):
            x = layer(unpool(x, pooled))
        return x
