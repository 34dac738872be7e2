"""Decoders of MONAI's UNETR and SwinUNETR over the maps of any backbone of volumes.

    levels = levels_of(maps, size=(96, 96, 96))
    head = SwinUNETRDecoder(levels, classes=14, channels=1)
    logits = head(backbone.feature_pyramid(batch)["ct"], values)      # (B, 14, 96, 96, 96)

The blocks are MONAI's. Sizes follow the backbone instead of being fixed, so that patches of 8 or
16 voxels, ResNets and nnU-Net's encoder are decoded as well as the published networks are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainssl.errors import ConfigError, require

__all__ = [
    "HEADS_3D",
    "LightDecoder",
    "MapLevel",
    "SwinUNETRDecoder",
    "UNETRDecoder",
    "levels_of",
    "resized",
]


@dataclass(frozen=True)
class MapLevel:
    """A map of a pyramid.

    Attributes:
        channels: Its channels.
        stride: Voxels of the input per cell along each axis.
    """

    channels: int
    stride: tuple[int, ...]


def levels_of(maps: Sequence[Tensor], size: Sequence[int]) -> list[MapLevel]:
    """Return the levels of maps (B, E_i, *S_i) that a backbone made of some input.

    Args:
        maps: The maps.
        size: Pixels or voxels of the input along each axis.
    """
    return [
        MapLevel(m.shape[1], tuple(n // s for n, s in zip(size, m.shape[2:], strict=True)))
        for m in maps
    ]


class UNETRDecoder(nn.Module):
    """Decode maps that all lie on one grid, those of a transformer at several depths.

    The deepest map is brought up by factors of 2, joined at every level by an earlier map and at
    the end by the volume itself. With patches of 16 voxels and the hidden states that
    `feature_pyramid` of a `ViTBackbone` returns it equals MONAI's UNETR.

    Args:
        levels: Of the maps, earliest first; patches of 2, 4, 8, 16, ... voxels.
        classes: Channels of the result.
        channels: Channels of the volume.
        width: Channels at full resolution; doubled per level.

    Raises:
        ConfigError: The maps have no such grid.

    Source: Hatamizadeh et al. 2022; MONAI `networks/nets/unetr.py`.
    """

    def __init__(
        self, levels: Sequence[MapLevel], classes: int, channels: int, width: int = 16
    ) -> None:
        super().__init__()
        blocks = require("monai.networks.blocks", "medical")
        strides = {side for level in levels for side in level.stride}
        (stride, *others) = sorted(strides)
        self.steps = max(stride, 1).bit_length() - 1
        if others or 2**self.steps != stride or self.steps == 0:
            raise ConfigError(
                "head: the decoder of UNETR wants maps on one grid, with patches of 2, 4, 8 or 16 "
                f"voxels along every axis; got strides of {[level.stride for level in levels]}. "
                "Choose 'swin_unetr' for maps that get coarser, or 'light'."
            )
        shared: dict[str, Any] = {"spatial_dims": 3, "kernel_size": 3, "norm_name": "instance"}
        sizes = [width * 2**step for step in range(self.steps)]  # finest first
        # which map joins at the strides 2, 4, ...: evenly spread over those before the last
        last = len(levels) - 1
        self.joined = [(last * step) // max(1, self.steps - 1) for step in range(self.steps - 1)]
        self.stem = blocks.UnetrBasicBlock(
            in_channels=channels, out_channels=width, stride=1, res_block=True, **shared
        )
        self.skips = nn.ModuleList(
            blocks.UnetrPrUpBlock(
                in_channels=levels[at].channels,
                out_channels=sizes[step],
                num_layer=self.steps - 1 - step,
                stride=1,
                upsample_kernel_size=2,
                conv_block=True,
                res_block=True,
                **shared,
            )
            for step, at in enumerate(self.joined, 1)
        )
        self.ups = nn.ModuleList(
            blocks.UnetrUpBlock(
                in_channels=levels[-1].channels if step == self.steps - 1 else sizes[step + 1],
                out_channels=sizes[step],
                upsample_kernel_size=2,
                res_block=True,
                **shared,
            )
            for step in range(self.steps)
        )
        self.out = blocks.UnetOutBlock(spatial_dims=3, in_channels=width, out_channels=classes)

    def forward(self, maps: Sequence[Tensor], values: Tensor) -> Tensor:
        """Return logits, (B, K, *S).

        Args:
            maps: As `levels` say, (B, E, *grid).
            values: The normalised volume, (B, C, *S).
        """
        found = maps[-1]
        for step in range(self.steps - 1, 0, -1):
            skip = self.skips[step - 1](maps[self.joined[step - 1]])
            found = self.ups[step](found, skip)
        logits: Tensor = self.out(self.ups[0](found, self.stem(values)))
        return logits


class SwinUNETRDecoder(nn.Module):
    """Decode maps that halve from level to level, those of Swin or of a convolutional network.

    Every map is encoded once more, the deepest is brought up by factors of 2 and joined by the
    next one. Where the finest map has half the resolution, the volume itself joins at the end.
    Over the five maps of a `SwinBackbone` it equals MONAI's SwinUNETR.

    Args:
        levels: Of the maps, finest first, at strides 1 or 2, then doubled each time.
        classes: Channels of the result.
        channels: Channels of the volume.
        width: Has no use here: widths are those of the maps.

    Raises:
        ConfigError: The maps do not halve.

    Source: Hatamizadeh et al. 2022; MONAI `networks/nets/swin_unetr.py`.
    """

    def __init__(
        self, levels: Sequence[MapLevel], classes: int, channels: int, width: int = 0
    ) -> None:
        super().__init__()
        blocks = require("monai.networks.blocks", "medical")
        strides = [level.stride for level in levels]
        first = max(strides[0])
        wanted = [(first * 2**i,) * 3 for i in range(len(levels))]
        if first not in (1, 2) or strides != wanted or len(levels) < 2:
            raise ConfigError(
                "head: the decoder of SwinUNETR wants two or more maps that halve, the first at "
                f"full or half resolution; got strides of {strides}. Choose 'unetr' for the maps "
                "of a transformer, or 'light'."
            )
        shared: dict[str, Any] = {"spatial_dims": 3, "kernel_size": 3, "norm_name": "instance"}
        widths = [level.channels for level in levels]

        def block(inside: int, outside: int) -> nn.Module:
            made: nn.Module = blocks.UnetrBasicBlock(
                in_channels=inside, out_channels=outside, stride=1, res_block=True, **shared
            )
            return made

        # the last but one joins as it is, as in MONAI, where there are that many
        self.passed = len(levels) - 2 if len(levels) > 3 else -1
        self.encoders = nn.ModuleList(
            nn.Identity() if i == self.passed else block(width, width)
            for i, width in enumerate(widths)
        )
        self.stem = block(channels, widths[0]) if first == 2 else None
        outs = [widths[0], *widths] if first == 2 else widths
        self.ups = nn.ModuleList(
            blocks.UnetrUpBlock(
                in_channels=coarse,
                out_channels=fine,
                upsample_kernel_size=2,
                res_block=True,
                **shared,
            )
            for fine, coarse in itertools.pairwise(outs)
        )
        self.out = blocks.UnetOutBlock(spatial_dims=3, in_channels=outs[0], out_channels=classes)

    def forward(self, maps: Sequence[Tensor], values: Tensor) -> Tensor:
        """Return logits, (B, K, *S).

        Args:
            maps: As `levels` say, (B, E_i, *S_i).
            values: The normalised volume, (B, C, *S).
        """
        skips = [encode(found) for encode, found in zip(self.encoders, maps, strict=True)]
        if self.stem is not None:
            skips.insert(0, self.stem(values))
        found = skips.pop()
        for up in reversed(self.ups):
            found = up(found, skips.pop())
        logits: Tensor = self.out(found)
        return logits


class LightDecoder(nn.Module):
    """Bring all maps to one width and the finest grid, add them up, and read the classes off.

    Few weights, no normalisation over the volume: what it finds was in the features.

    Args:
        levels: Of the maps, on any grids.
        classes: Channels of the result.
        channels: Channels of the volume, which it does not look at.
        width: Channels between the maps and the classes.
    """

    def __init__(
        self, levels: Sequence[MapLevel], classes: int, channels: int, width: int = 32
    ) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv3d(v.channels, width, 1) for v in levels)
        self.finest = min(range(len(levels)), key=lambda i: math.prod(levels[i].stride))
        self.out = nn.Conv3d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor], values: Tensor) -> Tensor:
        """Return logits, (B, K, *S), trilinear between the cells of the finest map.

        Args:
            maps: As `levels` say, (B, E_i, *S_i).
            values: The normalised volume, (B, C, *S), for its size.
        """
        size = tuple(maps[self.finest].shape[2:])
        parts = [project(m) for project, m in zip(self.projections, maps, strict=True)]
        found = torch.stack([resized(part, size) for part in parts]).sum(0)
        return resized(self.out(F.gelu(found)), tuple(values.shape[2:]))


def resized(values: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps (B, E, *S) of another size, linear between cells; unchanged if it is theirs."""
    size = tuple(size)
    if tuple(values.shape[2:]) == size:
        return values
    mode = {2: "bilinear", 3: "trilinear"}[len(size)]
    return F.interpolate(values, size=size, mode=mode, align_corners=False)


HEADS_3D: dict[str, Callable[..., nn.Module]] = {
    "light": LightDecoder,
    "unetr": UNETRDecoder,
    "swin_unetr": SwinUNETRDecoder,
}
