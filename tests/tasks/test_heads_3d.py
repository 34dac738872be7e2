"""The decoders over our backbones equal MONAI's whole networks, and take other sizes too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from domainssl.backbones.encoders.swin import SwinArchitecture
from domainssl.backbones.swin import SwinBackbone
from domainssl.backbones.vit import ViTBackbone
from domainssl.errors import ConfigError
from domainssl.tasks.heads_3d import (
    LightDecoder,
    MapLevel,
    SwinUNETRDecoder,
    UNETRDecoder,
    levels_of,
)

nets = pytest.importorskip("monai.networks.nets")


def copied(head: Any, net: Any, names: dict[str, str]) -> Any:
    """The head with the weights of a network of MONAI's, part by part."""
    for ours, theirs in names.items():
        head.get_submodule(ours).load_state_dict(net.get_submodule(theirs).state_dict())
    assert {n.partition(".")[0] for n in head.state_dict()} == {n.partition(".")[0] for n in names}
    return head.eval()


@torch.no_grad()
def test_unetr_equals_monai_with_its_weights() -> None:
    torch.manual_seed(0)
    size = (32, 16, 16)
    net = nets.UNETR(
        in_channels=2, out_channels=3, img_size=size, feature_size=4, hidden_size=24, mlp_dim=40,
        num_heads=4,
    ).eval()  # fmt: skip
    backbone, _ = ViTBackbone.from_reference(
        net.state_dict(),
        {"architecture": {"width": 24, "depth": 12, "heads": 4, "hidden": 40}, "patch_size": 16,
         "normalization": "identity"},
        {"ct": {"kind": "volume", "channels": ("a", "b"), "value_unit": "hu", "size": size}},
    )  # fmt: skip
    head = copied(
        UNETRDecoder([MapLevel(24, (16,) * 3)] * 4, classes=3, channels=2, width=4),
        net,
        {"stem": "encoder1", "skips.0": "encoder2", "skips.1": "encoder3", "skips.2": "encoder4",
         "ups.3": "decoder5", "ups.2": "decoder4", "ups.1": "decoder3", "ups.0": "decoder2",
         "out": "out"},
    )  # fmt: skip
    x = torch.randn(1, 2, *size)
    found = head(backbone.eval().feature_pyramid({"ct": x})["ct"], x)
    torch.testing.assert_close(found, net(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_swinunetr_equals_monai_with_its_weights() -> None:
    torch.manual_seed(0)
    backbone = SwinBackbone(
        {"ct": {"kind": "volume", "channels": ("ct",), "value_unit": "hu"}},
        SwinArchitecture(feature_size=12, depths=(1, 1, 1, 1), merging="standard"),
    ).eval()
    net = nets.SwinUNETR(in_channels=1, out_channels=3, feature_size=12, depths=(1, 1, 1, 1)).eval()
    net.load_state_dict(backbone.to_reference()["state_dict"], strict=False)
    batch = {"ct": torch.randn(1, 1, 64, 32, 32) * 300}
    values, found = backbone.normalize(batch)["ct"], backbone.feature_pyramid(batch)["ct"]
    levels = levels_of(found, values.shape[2:])
    assert levels == [MapLevel(12 * 2**i, (2 * 2**i,) * 3) for i in range(5)]
    head = copied(
        SwinUNETRDecoder(levels, classes=3, channels=1),
        net,
        {"stem": "encoder1", "encoders.0": "encoder2", "encoders.1": "encoder3",
         "encoders.2": "encoder4", "encoders.4": "encoder10", "ups.4": "decoder5",
         "ups.3": "decoder4", "ups.2": "decoder3", "ups.1": "decoder2", "ups.0": "decoder1",
         "out": "out"},
    )  # fmt: skip
    torch.testing.assert_close(head(found, values), net(values), rtol=1e-4, atol=1e-5)


def maps(levels: list[MapLevel], size: tuple[int, ...] = (32, 32, 64)) -> list[Tensor]:
    return [
        torch.randn(1, v.channels, *(n // s for n, s in zip(size, v.stride, strict=True)))
        for v in levels
    ]


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
@pytest.mark.parametrize("count", [1, 4])
def test_unetr_takes_patches_of_every_power_of_two(stride: int, count: int) -> None:
    levels = [MapLevel(6, (stride,) * 3)] * count
    head = UNETRDecoder(levels, classes=5, channels=1, width=2)
    assert head(maps(levels), torch.randn(1, 1, 32, 32, 64)).shape == (1, 5, 32, 32, 64)


@pytest.mark.parametrize(("first", "count"), [(1, 4), (2, 4), (2, 5), (1, 2)])
def test_swinunetr_takes_convolutional_pyramids(first: int, count: int) -> None:
    levels = [MapLevel(2 + i, (first * 2**i,) * 3) for i in range(count)]
    head = SwinUNETRDecoder(levels, classes=5, channels=1)
    assert head(maps(levels), torch.randn(1, 1, 32, 32, 64)).shape == (1, 5, 32, 32, 64)


def test_the_light_decoder_takes_any_maps() -> None:
    levels = [MapLevel(3, (1, 1, 1)), MapLevel(5, (4, 4, 2)), MapLevel(7, (8, 8, 8))]
    head = LightDecoder(levels, classes=5, channels=2, width=4)
    assert head(maps(levels), torch.randn(1, 2, 32, 32, 64)).shape == (1, 5, 32, 32, 64)


def test_maps_that_do_not_fit_a_decoder_are_refused() -> None:
    halving = [MapLevel(4, (2,) * 3), MapLevel(8, (4,) * 3)]
    with pytest.raises(ConfigError, match=r"one grid.*Choose 'swin_unetr'"):
        UNETRDecoder(halving, classes=2, channels=1)
    for stride in ((6,) * 3, (1,) * 3, (8, 8, 4)):
        with pytest.raises(ConfigError, match="patches of 2, 4, 8 or 16"):
            UNETRDecoder([MapLevel(4, stride)], classes=2, channels=1)
    for levels in ([MapLevel(4, (8,) * 3)] * 4, halving[1:], halving[:1]):
        with pytest.raises(ConfigError, match=r"maps that halve.*Choose 'unetr'"):
            SwinUNETRDecoder(levels, classes=2, channels=1)
