"""Encoders of volumes: MONAI's own outputs, pyramids, gradients of shortcuts, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets.resnet import ResNetFeatures
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor

from domainssl import load_backbone
from domainssl.backbones.encoders.backbone import EncoderBackbone, EncoderSizes
from domainssl.errors import ConfigError, WeightsError
from domainssl.modality import Modality

CT = Modality(name="ct", kind="volume", channels=("ct",), value_unit="hu")
SWIN = {"feature_size": 12, "depths": (1, 1, 1, 1), "window": 4}
SMALL = EncoderSizes(
    width=24, depth=4, heads=2, patch_size=8,
    features=(4, 6, 8), blocks=(1, 2, 1), widen=0.0625, swin=SWIN,  # type: ignore[arg-type]
)  # fmt: skip
RESNETS = ("monai:resnet10", "monai:resnet18", "monai:resnet50")


def build(encoder: str, sizes: EncoderSizes = SMALL, modality: Modality = CT) -> EncoderBackbone:
    torch.manual_seed(0)
    return EncoderBackbone(
        {modality.name: modality}, encoder=encoder, sizes=sizes, normalization="identity"
    )


def crop(*size: int) -> dict[str, Any]:
    return {"ct": torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize(
    ("encoder", "width", "grid"),
    [
        ("transformer", 24, (8, 4, 4)),
        ("resenc", 8, (16, 8, 8)),
        ("monai:resnet10", 32, (2, 1, 1)),
        ("monai:resnet18", 32, (2, 1, 1)),
        ("monai:resnet50", 128, (2, 1, 1)),
        ("monai:swin", 192, (2, 1, 1)),
    ],
)
def test_volumes_become_tokens_on_a_grid_and_a_vector(
    encoder: str, width: int, grid: tuple[int, ...]
) -> None:
    backbone, batch = build(encoder).eval(), crop(64, 32, 32)
    batch["ct.valid"] = torch.zeros(2, 64, 32, 32, dtype=torch.bool)
    batch["ct.valid"][:, :32] = True
    features = backbone(batch)
    assert features.grid["ct"] == grid
    assert features.pooled["ct"].shape == (2, width) == (2, backbone.embed_dim["ct"])
    assert features.tokens["ct"].shape == (2, grid[0] * grid[1] * grid[2], width)
    seen = features.token_valid["ct"].view(2, *grid)
    assert seen[:, : grid[0] // 2].all() and not seen[:, grid[0] // 2 :].any()


@pytest.mark.parametrize("name", ["resnet10", "resnet18", "resnet50"])
def test_resnets_give_the_maps_of_monai(name: str) -> None:
    backbone = build(f"monai:{name}", EncoderSizes()).eval()
    net = ResNetFeatures(name, pretrained=False, spatial_dims=3, in_channels=1).eval()
    ours: Any = backbone.encoders["ct"]
    net.load_state_dict(ours.net.state_dict())
    batch = crop(24, 16, 16)
    with torch.no_grad():
        for a, b in zip(backbone.feature_pyramid(batch)["ct"], net(batch["ct"]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_swin_transformer_gives_the_maps_of_monai() -> None:
    backbone = build("monai:swin").eval()
    net = SwinTransformer(
        in_chans=1, embed_dim=12, window_size=(4, 4, 4), patch_size=(2, 2, 2),
        depths=SWIN["depths"], num_heads=(3, 6, 12, 24), qkv_bias=True,  # type: ignore[arg-type]
    ).eval()  # fmt: skip
    ours: Any = backbone.encoders["ct"]
    left = net.load_state_dict(ours.net.state_dict(), strict=False)
    assert all(key.endswith("relative_position_index") for key in left.missing_keys)
    assert len(left.missing_keys) == 4 and not left.unexpected_keys
    batch = crop(64, 32, 32)
    with torch.no_grad():
        for a, b in zip(backbone.feature_pyramid(batch)["ct"], net(batch["ct"]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_pyramids_say_at_which_resolution_their_maps_are() -> None:
    sides = {
        name: [m.shape[2] for m in build(name).eval().feature_pyramid(batch)["ct"]]
        for batch in [crop(64, 32, 32)]
        for name in ("transformer", "resenc", *RESNETS, "monai:swin")
    }
    halves = [32, 16, 8, 4, 2]
    assert sides == {
        "transformer": [8, 8, 8, 8],
        "resenc": [64, 32, 16],
        "monai:resnet10": halves,
        "monai:resnet18": halves,
        "monai:resnet50": halves,
        "monai:swin": halves,
    }


def test_the_zero_padding_shortcut_passes_gradients() -> None:
    """MONAI detaches it (shortcut type A of resnet18 and 34)."""
    net: Any = build("monai:resnet18").encoders["ct"]
    shortcut = net.net.layer2[0].downsample
    x = torch.rand(1, 4, 4, 4, 4, requires_grad=True)
    shortcut(x).sum().backward()
    expected = torch.zeros(4, 4, 4)
    expected[::2, ::2, ::2] = 1
    assert torch.equal(x.grad, expected.expand(1, 4, 4, 4, 4))


@pytest.mark.parametrize("encoder", ["resenc", "monai:resnet10", "monai:swin"])
def test_checkpointing_changes_no_gradient(encoder: str) -> None:
    def gradients(enabled: bool) -> list[Tensor]:
        backbone = build(encoder).train()
        backbone.set_gradient_checkpointing(enabled)
        backbone(crop(64, 32, 32)).pooled["ct"].square().sum().backward()
        return [p.grad for p in backbone.parameters() if p.grad is not None]

    plain, cheap = gradients(False), gradients(True)
    assert len(plain) == len(cheap) > 0
    for a, b in zip(plain, cheap, strict=True):
        torch.testing.assert_close(a, b)


def test_two_dimensional_ones_exist_too() -> None:
    image = Modality(name="rgb", kind="image", channels=("r", "g", "b"), value_unit="arbitrary")
    for encoder, grid in (("resenc", (8, 4)), ("monai:resnet10", (1, 1))):
        backbone = build(encoder, modality=image).eval()
        assert backbone({"rgb": torch.rand(1, 3, 32, 16)}).grid["rgb"] == grid


@pytest.mark.parametrize(
    ("encoder", "sizes", "words"),
    [
        (
            "monai:resnet11",
            {},
            "not one of monai:swin, monai:resnet10",
        ),
        ("resenc", {"features": (4, 8), "blocks": (1,)}, "one positive number per stage"),
        ("monai:swin", {"swin": {"feature_size": 16}}, "heads: 3 in stage 1 do not divide"),
        ("monai:swin", {"swin": {"depths": (2, 2)}}, "expected 4 numbers"),
        ("monai:swin", {"swin": {"merging": "old"}}, "expected standard or legacy"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(encoder: str, sizes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(encoder, EncoderSizes(**sizes))


def test_a_swin_transformer_takes_volumes_only() -> None:
    image = Modality(name="rgb", kind="image", channels=("r",), value_unit="arbitrary")
    with pytest.raises(ConfigError, match="takes volumes; modality 'rgb' is of kind 'image'"):
        build("monai:swin", modality=image)


def test_weights_of_a_3d_resnet_are_read_and_written_back(tmp_path: Path) -> None:
    net = ResNetFeatures("resnet10", pretrained=False, spatial_dims=3, in_channels=1).eval()
    path = tmp_path / "resnet_10_23dataset.pth"
    torch.save({"state_dict": {f"module.{n}": t for n, t in net.state_dict().items()}}, path)
    with pytest.raises(WeightsError, match="does not say how its volumes were scaled"):
        load_backbone("monai_resnet10", weights=path, modalities={"ct": CT})
    backbone = load_backbone(
        "monai_resnet10", weights=path, modalities={"ct": CT},
        arguments={"normalization": "identity"},
    )  # fmt: skip
    assert isinstance(backbone, EncoderBackbone)
    written = backbone.to_reference("ct")
    assert written.keys() == net.state_dict().keys()
    assert all(torch.equal(written[n], t) for n, t in net.state_dict().items())


def _nnssl(backbone: EncoderBackbone) -> dict[str, Any]:
    """What nnssl saves of its residual encoder U-Net: each layer twice, and a decoder."""
    weights = {}
    for name, tensor in backbone.encoders["ct"].state_dict().items():
        owner, kind, leaf = name.removeprefix("net.").rsplit(".", 2)
        weights[f"encoder.{owner}.{kind}.{leaf}"] = tensor
        weights[f"encoder.{owner}.all_modules.{int(kind == 'norm')}.{leaf}"] = tensor
    weights |= {f"decoder.{name}": tensor for name, tensor in weights.items()}
    weights["decoder.stages.0.convs.0.conv.weight"] = torch.rand(4, 8, 3, 3, 3)
    plan = {"key_to_encoder": "encoder.stages", "key_to_stem": "encoder.stem"}
    return {
        "network_weights": weights, "optimizer_state": {}, "current_epoch": 1000,
        "trainer_name": "BaseMAETrainer", "nnssl_adaptation_plan": plan,
    }  # fmt: skip


def test_the_residual_encoder_of_nnssl_is_read_out_of_its_u_net(tmp_path: Path) -> None:
    published = build("resenc").eval()
    path = tmp_path / "checkpoint_final.pth"
    torch.save(_nnssl(published), path)
    options: dict[str, Any] = {"sizes": {"features": [4, 6, 8], "blocks": [1, 2, 1]}}
    with pytest.raises(WeightsError, match="does not say how its volumes were scaled"):
        load_backbone("resenc_l", weights=path, modalities={"ct": CT}, arguments=options)
    options["normalization"] = "identity"
    backbone = load_backbone("resenc_l", weights=path, modalities={"ct": CT}, arguments=options)
    batch = crop(16, 16, 8)
    assert torch.equal(backbone(batch).pooled["ct"], published(batch).pooled["ct"])
    for sizes, said in (
        ({"blocks": [1, 1, 1]}, "have no place"),
        ({"blocks": [1, 3, 1]}, "missing in the file: 8"),
    ):
        other = {**options, "sizes": {**options["sizes"], **sizes}}
        with pytest.raises(WeightsError, match=said):
            load_backbone("resenc_l", weights=path, modalities={"ct": CT}, arguments=other)
    with pytest.raises(WeightsError, match="another architecture"):
        load_backbone(
            "resenc_l", weights=path, modalities={"ct": CT},
            arguments={"normalization": "identity"},
        )  # fmt: skip
