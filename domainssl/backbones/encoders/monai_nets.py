"""MONAI's residual networks in two and three dimensions, as encoders."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from domainssl.errors import ConfigError, nearest, require
from domainssl.modality import Modality

__all__ = ["monai_resnet", "resnet_levels"]


class _Shortcut(nn.Module):
    """Take every `stride`-th cell and append zero channels: shortcut type A, with its gradient.

    MONAI's own function detaches the values, so that no gradient passes the shortcut.
    """

    def __init__(self, planes: int, stride: int) -> None:
        super().__init__()
        self.planes, self.stride = planes, stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, E, *S) -> (B, planes, *S / stride)."""
        steps = (slice(None), slice(None)) + (slice(None, None, self.stride),) * (x.ndim - 2)
        thinned = x[steps]
        after = [0, 0] * (x.ndim - 2) + [0, self.planes - x.shape[1]]
        return F.pad(thinned, after)


def monai_resnet(name: str, modality: Modality, widen: float = 1.0) -> nn.Module:
    """Build MONAI's ResNet of a name, with the stem and shortcuts of its MedicalNet weights.

    Args:
        name: `resnet10` to `resnet200`.
        modality: Its channels and axes.
        widen: Factor on the channels of every stage.

    Raises:
        ConfigError: MONAI has no such ResNet.

    Source: `monai.networks.nets.ResNetFeatures`; the same weights give the same maps.
    """
    nets = cast(Any, require("monai.networks.nets.resnet", "medical"))
    if name not in nets.resnet_params:
        known = [f"monai:{known}" for known in nets.resnet_params]
        raise ConfigError(
            f"encoder: {f'monai:{name}'!r} is not one of monai:swin, {', '.join(known)}."
            f"{nearest(f'monai:{name}', [*known, 'monai:swin'])}"
        )
    block, layers, shortcut, bias, _ = nets.resnet_params[name]
    net: nn.Module = nets.ResNet(
        block=block,
        layers=layers,
        block_inplanes=nets.get_inplanes(),
        spatial_dims=modality.spatial_dims,
        n_input_channels=modality.num_channels,
        conv1_t_stride=2,
        shortcut_type=shortcut,
        widen_factor=widen,
        feed_forward=False,
        bias_downsample=bias,
    )
    for part in net.modules():
        found = getattr(part, "downsample", None)
        if isinstance(found, partial):
            keywords = found.keywords
            part.downsample = _Shortcut(keywords["planes"], keywords["stride"])
    return net


def resnet_levels(net: Any) -> tuple[tuple[int, int], ...]:
    """Return channels and stride of the stem and of the four stages of a ResNet.

    Args:
        net: Of timm or MONAI.
    """
    if hasattr(net, "feature_info"):  # timm
        return tuple((int(level["num_chs"]), int(level["reduction"])) for level in net.feature_info)
    widths = [net.conv1.out_channels]
    for index in range(1, 5):
        last = getattr(net, f"layer{index}")[-1]
        widths.append((last.conv3 if hasattr(last, "conv3") else last.conv2).out_channels)
    return tuple((int(width), 2 ** (index + 1)) for index, width in enumerate(widths))
