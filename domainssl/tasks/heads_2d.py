"""Heads for maps of two axes: light ones of ours, and decoders of segmentation_models_pytorch.

    levels = map_levels(backbone, (64, 64), ("s2",))["s2"]
    head = PyramidDecoder(levels, classes=8)
    logits = head(backbone.feature_pyramid(batch)["s2"], (64, 64))        # (B, 8, 64, 64)

All take maps finest first. A transformer has one grid for all of its depths; `SimplePyramid` makes
of it the levels that decoders join.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from domainssl.errors import ConfigError, require
from domainssl.nn.norm import convert_batch_norm
from domainssl.tasks.heads_3d import MapLevel, resized

__all__ = ["HEADS_2D", "LinearDecoder", "PyramidDecoder", "SimplePyramid", "SmpDecoder"]

_FACTORS = (4, 2, 1, 0.5)  # of the grid of a transformer, as published


class LinearDecoder(nn.Module):
    """Read the classes off the last map, one linear layer, bilinear between its cells.

    Args:
        levels: Of the maps.
        classes: Channels of the result.
        width: Has no use here.
    """

    def __init__(self, levels: Sequence[MapLevel], classes: int, width: int = 0) -> None:
        super().__init__()
        self.out = nn.Conv2d(levels[-1].channels, classes, 1)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Return logits, (B, K, *size).

        Args:
            maps: As `levels` say, (B, E_i, *S_i).
            size: Pixels of the result.
        """
        return resized(self.out(maps[-1]), size)


class SimplePyramid(nn.Module):
    """Make levels of 4, 2, 1 and half the resolution of the last map of a transformer.

    Levels finer than pixels are left out.

    Args:
        level: Of the map.
        width: Channels of every level.

    Source: ViTDet (Li et al. 2022), section 3: deconvolutions, the map itself, a maximum.
    """

    def __init__(self, level: MapLevel, width: int) -> None:
        super().__init__()
        stride = max(level.stride)
        factors = [factor for factor in _FACTORS if stride / factor >= 1]
        self.levels = [
            MapLevel(width, tuple(max(1, round(side / factor)) for side in level.stride))
            for factor in factors
        ]
        self.branches = nn.ModuleList(_branch(level.channels, width, factor) for factor in factors)

    def forward(self, values: Tensor) -> list[Tensor]:
        """Return the levels of a map (B, E, h, w), finest first, (B, width, *S_i)."""
        return [branch(values) for branch in self.branches]


def _branch(channels: int, width: int, factor: float) -> nn.Sequential:
    """Return the layers that make one level out of a map."""
    layers: list[nn.Module] = []
    while factor > 1:
        layers += [nn.ConvTranspose2d(channels, width, 2, stride=2), nn.GELU()]
        channels, factor = width, factor / 2
    if factor < 1:
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    layers += [nn.Conv2d(channels, width, 1), nn.GroupNorm(1, width)]
    return nn.Sequential(*layers)


def _halving(levels: Sequence[MapLevel], width: int) -> SimplePyramid | None:
    """Return what makes levels of maps on one grid, None for maps that get coarser themselves."""
    strides = [max(level.stride) for level in levels]
    if len(levels) > 1 and all(a < b for a, b in itertools.pairwise(strides)):
        return None
    return SimplePyramid(levels[-1], width)


class PyramidDecoder(nn.Module):
    """Bring the levels to one width, add them from coarse to fine, and convolve once.

    Args:
        levels: Of the maps; those of a transformer go through `SimplePyramid`.
        classes: Channels of the result.
        width: Channels between the maps and the classes.
    """

    def __init__(self, levels: Sequence[MapLevel], classes: int, width: int = 64) -> None:
        super().__init__()
        self.pyramid = _halving(levels, width)
        inner = self.pyramid.levels if self.pyramid is not None else levels
        self.lateral = nn.ModuleList(nn.Conv2d(level.channels, width, 1) for level in inner)
        self.smooth = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(1, width), nn.GELU()
        )
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Return logits, (B, K, *size); arguments as in `LinearDecoder`."""
        if self.pyramid is not None:
            maps = self.pyramid(maps[-1])
        found = self.lateral[-1](maps[-1])
        for layer, values in zip(reversed(self.lateral[:-1]), reversed(maps[:-1]), strict=True):
            found = layer(values) + resized(found, values.shape[2:])
        return resized(self.out(self.smooth(found)), size)


class SmpDecoder(nn.Module):
    """A decoder of segmentation_models_pytorch over the levels of any backbone.

    Batch norms count the items of all ranks, dropout is off.

    Args:
        levels: Of the maps; those of a transformer go through `SimplePyramid`.
        classes: Channels of the result.
        width: Channels of the decoder; U-Net halves them from level to level.
        kind: `unet`, `fpn` or `upernet`.

    Raises:
        ConfigError: The decoder wants more levels.
        MissingExtraError: The library is not installed.
    """

    def __init__(
        self,
        levels: Sequence[MapLevel],
        classes: int,
        width: int = 64,
        kind: Literal["unet", "fpn", "upernet"] = "unet",
    ) -> None:
        super().__init__()
        self.kind = kind
        self.pyramid = _halving(levels, width)
        inner = self.pyramid.levels if self.pyramid is not None else levels
        least = {"unet": 1, "fpn": 4, "upernet": 2}[kind]
        if len(inner) < least:
            raise ConfigError(
                f"model.init_args.head.name: {kind!r} joins {least} levels, the maps of this "
                f"backbone give {len(inner)} (strides {[v.stride for v in inner]}). Choose "
                "'pyramid' or 'unet', or a backbone of larger patches."
            )
        channels = [level.channels for level in inner]
        self.decoder, end = _smp(kind, channels, width)
        convert_batch_norm(self.decoder)
        self.out = nn.Conv2d(end, classes, 3 if kind == "unet" else 1, padding="same")

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Return logits, (B, K, *size); arguments as in `LinearDecoder`."""
        if self.pyramid is not None:
            maps = self.pyramid(maps[-1])
        first = maps[0]
        if self.kind == "unet":  # asks the first one for its size alone
            features = [first.new_empty(first.shape[0], 0, *size), *maps]
        elif self.kind == "upernet":  # leaves out the first two
            features = [first, first, *maps]
        else:
            features = _doubling(maps)
        return resized(self.out(self.decoder(features)), size)


def _smp(kind: str, channels: list[int], width: int) -> tuple[nn.Module, int]:
    """Return a decoder and the channels it gives."""
    package = require("segmentation_models_pytorch", "finetune").decoders
    decoder: nn.Module
    if kind == "unet":
        widths = [max(8, width >> i) for i in range(len(channels))]
        decoder = package.unet.decoder.UnetDecoder((0, *channels), widths, n_blocks=len(widths))
        return decoder, widths[-1]
    if kind == "fpn":
        inner = max(32, width // 32 * 32)  # it normalises groups of 32 channels
        decoder = package.fpn.decoder.FPNDecoder(
            channels, encoder_depth=len(channels), pyramid_channels=inner,
            segmentation_channels=inner, dropout=0.0,
        )  # fmt: skip
        return decoder, inner
    decoder = package.upernet.decoder.UPerNetDecoder(
        (0, 0, *channels), encoder_depth=len(channels) + 1, decoder_channels=width
    )
    return decoder, width


def _doubling(maps: Sequence[Tensor]) -> list[Tensor]:
    """Return maps each exactly twice as large as the next one, as the decoder of FPN adds them."""
    height, width = maps[-1].shape[2:]
    last = len(maps) - 1
    return [resized(m, (height << last - i, width << last - i)) for i, m in enumerate(maps)]


def _of_kind(kind: Literal["unet", "fpn", "upernet"]) -> Callable[..., nn.Module]:
    def make(levels: Sequence[MapLevel], classes: int, width: int) -> nn.Module:
        return SmpDecoder(levels, classes, width, kind)

    return make


HEADS_2D: dict[str, Callable[..., nn.Module]] = {
    "linear": LinearDecoder,
    "pyramid": PyramidDecoder,
    "unet": _of_kind("unet"),
    "fpn": _of_kind("fpn"),
    "upernet": _of_kind("upernet"),
}
