"""The residual encoder of nnU-Net and nnssl, in two and three dimensions.

Source: `ResidualEncoder` of dynamic-network-architectures with the plans of nnssl (ResEnc-L): a
stem, then stages of residual blocks, each stage but the first halving the grid; instance norm and
leaky ReLU. Parameter names are those of its state dict, without the copies under `all_modules`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from domainssl.backbones.encoders.base import MapEncoder, refuse_attention
from domainssl.errors import ConfigError
from domainssl.modality import Modality

__all__ = ["RESENC_L", "ConvNormAct", "ResidualEncoder"]


@dataclass(frozen=True)
class _Plan:
    """Channels and residual blocks of every stage."""

    features: tuple[int, ...]
    blocks: tuple[int, ...]


RESENC_L = _Plan((32, 64, 128, 256, 320, 320), (1, 3, 4, 6, 6, 6))


class ConvNormAct(nn.Module):
    """Convolution, instance norm with affine, leaky ReLU; (B, C, *S) -> (B, E, *S / stride)."""

    def __init__(
        self,
        dims: int,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        bias: bool = True,
        act: bool = True,
    ) -> None:
        super().__init__()
        conv, norm = (nn.Conv3d, nn.InstanceNorm3d) if dims == 3 else (nn.Conv2d, nn.InstanceNorm2d)
        self.conv = conv(inputs, outputs, kernel, stride, kernel // 2, bias=bias)
        self.norm = norm(outputs, affine=True)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise every channel of every item, activate."""
        out = self.conv(x)
        if out[0, 0].numel() == 1:  # a map of one cell has no spread, and torch refuses it
            out = self.norm.bias.view(1, -1, *[1] * (out.ndim - 2)).expand_as(out) + 0 * out
        else:
            out = self.norm(out)
        return F.leaky_relu(out) if self.act else out


class _ResidualBlock(nn.Module):
    """Two convolutions and a shortcut (ResNet-D: average pooling, then a 1³ convolution)."""

    is_block = True

    def __init__(self, dims: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(dims, inputs, outputs, stride=stride)
        self.conv2 = ConvNormAct(dims, outputs, outputs, act=False)
        parts: list[nn.Module] = []
        if stride > 1:
            parts.append((nn.AvgPool3d if dims == 3 else nn.AvgPool2d)(stride))
        if inputs != outputs:
            parts.append(ConvNormAct(dims, inputs, outputs, kernel=1, bias=False, act=False))
        self.skip = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, E, *S / stride)."""
        return F.leaky_relu(self.conv2(self.conv1(x)) + self.skip(x))


class _Stem(nn.Module):
    def __init__(self, dims: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvNormAct(dims, inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, E, *S)."""
        out: Tensor = self.convs(x)
        return out


class _Stage(nn.Module):
    def __init__(self, dims: int, inputs: int, outputs: int, blocks: int, stride: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                _ResidualBlock(dims, outputs if i else inputs, outputs, 1 if i else stride)
                for i in range(blocks)
            )
        )


class _Net(nn.Module):
    def __init__(
        self, dims: int, channels: int, features: Sequence[int], blocks: Sequence[int]
    ) -> None:
        super().__init__()
        self.stem = _Stem(dims, channels, features[0])
        before = [features[0], *features[:-1]]
        self.stages = nn.ModuleList(
            _Stage(dims, inputs, outputs, count, 2 if index else 1)
            for index, (inputs, outputs, count) in enumerate(
                zip(before, features, blocks, strict=True)
            )
        )


class ResidualEncoder(MapEncoder):
    """Stem and stages of residual blocks; the first stage keeps the grid, the others halve it.

    Args:
        modality: Its channels and axes.
        features: Channels of every stage.
        blocks: Residual blocks of every stage.

    Raises:
        ConfigError: The sizes do not fit together.
    """

    is_own = True
    band_tensors: Mapping[str, str] = {"net.stem.convs.0.conv.weight": "convolution"}

    def __init__(self, modality: Modality, features: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        if not features or len(features) != len(blocks) or min(*features, *blocks) < 1:
            raise ConfigError(
                f"sizes: features {list(features)} and blocks {list(blocks)}; resenc takes one "
                "positive number per stage in each, such as [32, 64, 128] and [1, 2, 2]."
            )
        self.net = _Net(modality.spatial_dims, modality.num_channels, features, blocks)
        self.width = features[-1]
        self.levels = tuple((width, 2**index) for index, width in enumerate(features))
        self.gradient_checkpointing = False

    def stages(
        self, x: Tensor, valid: Tensor, attention: nn.ModuleDict | None = None
    ) -> list[Tensor]:
        """Return the map of every stage, (B, E_i, *S / 2^i)."""
        refuse_attention(attention, "resenc")
        x = self.net.stem(x)
        maps = []
        for stage in self.net.stages:
            for block in stage.blocks:  # type: ignore[union-attr]
                if self.gradient_checkpointing and self.training:
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            maps.append(x)
        return maps
