"""The plain ViT: features of timm and MONAI, and what it adds: series, validity, other sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from domainssl import export_backbone, load_backbone
from domainssl.backbones.vit import ViTArchitecture, ViTBackbone, position_codes
from domainssl.errors import ConfigError, DataError, WeightsError
from domainssl.modality import Modality

SIZES = {"width": 24, "depth": 2, "heads": 4, "hidden": 40}


def modality(kind: str, size: tuple[int, ...], channels: int = 2) -> dict[str, Any]:
    names = tuple(f"c{i}" for i in range(channels))
    return {"m": Modality(name="m", kind=kind, channels=names, value_unit="arbitrary", size=size)}  # type: ignore[arg-type]


def backbone(kind: str, size: tuple[int, ...], **changes: Any) -> ViTBackbone:
    torch.manual_seed(0)
    return ViTBackbone(
        modality(kind, size),
        architecture=ViTArchitecture(**{**SIZES, **changes}),
        patch_size=4,
        image_size=size if changes.get("positions") == "learned" else None,
        normalization="identity",
    ).eval()


def read(state: dict[str, Tensor], kind: str, size: tuple[int, ...]) -> ViTBackbone:
    architecture = {n: v for n, v in SIZES.items() if n != "depth"} | {"depth": 2}
    loaded, report = ViTBackbone.from_reference(
        state,
        {"architecture": architecture, "patch_size": 4, "normalization": "identity"},
        modality(kind, size),
    )
    assert not report.missing and not report.unexpected
    return loaded.eval()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_weights_of_timm_give_its_features_at_any_size_and_go_back() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    net = timm.models.VisionTransformer(
        img_size=(16, 24), patch_size=4, in_chans=2, num_classes=0, embed_dim=24, depth=2,
        num_heads=4, mlp_ratio=40 / 24, dynamic_img_size=True,
    ).eval()  # fmt: skip
    for parameter in net.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    ours = read(net.state_dict(), "image", (16, 24))
    assert ours.position_table is not None
    for size in ((16, 24), (24, 20)):  # its own, and one that resamples the table
        x = torch.randn(2, 2, *size)
        expected, found = net.forward_features(x), ours({"m": x})
        close(torch.cat([found.cls["m"].unsqueeze(1), found.tokens["m"]], 1), expected)
    written = ours.to_reference()
    net.load_state_dict(written)
    close(net.forward_features(x), expected)


@pytest.mark.parametrize("stem", ["conv", "perceptron"])
@pytest.mark.parametrize("positions", ["learnable", "sincos"])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_weights_of_monai_give_its_features_and_go_back(
    stem: str, positions: str, bias: bool
) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(1)
    size = (8, 12, 16)
    options = {
        "in_channels": 2, "img_size": size, "patch_size": 4, "hidden_size": 24, "mlp_dim": 40,
        "num_layers": 2, "num_heads": 4, "pos_embed_type": positions, "qkv_bias": bias,
    }  # fmt: skip
    net = nets.ViT(**options, proj_type=stem).eval()
    ours = read(net.state_dict(), "volume", size)
    assert (ours.position_table is None) == (positions == "sincos")
    assert ours.class_token is None and ours.layout == "monai"
    x = torch.randn(2, 2, *size)
    expected = net(x)[0]
    found = ours({"m": x})
    close(found.tokens["m"], expected)
    close(found.pooled["m"], expected.mean(1))
    again = nets.ViT(**options, proj_type="conv").eval()
    again.load_state_dict(ours.to_reference())
    close(again(x)[0], expected)


@torch.no_grad()
def test_the_encoder_of_a_unetr_is_read_and_unused_layers_of_old_files_are_left_out() -> None:
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(1)
    size = (16, 16, 16)
    net = nets.UNETR(
        in_channels=2, out_channels=2, img_size=size, feature_size=4, hidden_size=24, mlp_dim=40,
        num_heads=4,
    ).vit.eval()  # fmt: skip
    state = {f"vit.{n}": t for n, t in net.state_dict().items()} | {"out.weight": torch.zeros(1)}
    state["vit.blocks.0.cross_attn.to_q.weight"] = torch.zeros(24, 24)
    state["vit.patch_embedding.cls_token"] = torch.zeros(1, 1, 24)
    loaded, report = ViTBackbone.from_reference(
        {"state_dict": state},
        {"architecture": {**SIZES, "depth": 12}, "patch_size": 16, "normalization": "identity"},
        modality("volume", size),
    )
    assert not report.missing and not report.unexpected
    x = torch.randn(1, 2, *size)
    close(loaded.eval()({"m": x}).tokens["m"], net(x)[0])


@torch.no_grad()
def test_the_decoder_of_a_unetr_takes_the_pyramid() -> None:
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(1)
    size = (32, 16, 16)
    net = nets.UNETR(
        in_channels=2, out_channels=2, img_size=size, feature_size=4, hidden_size=24, mlp_dim=40,
        num_heads=4,
    ).eval()  # fmt: skip
    ours, _ = ViTBackbone.from_reference(
        net.state_dict(),
        {"architecture": {**SIZES, "depth": 12}, "patch_size": 16, "normalization": "identity"},
        modality("volume", size),
    )
    x = torch.randn(1, 2, *size)
    maps = ours.eval().feature_pyramid({"m": x})["m"]
    deep = net.decoder5(maps[3], net.encoder4(maps[2]))
    deep = net.decoder4(deep, net.encoder3(maps[1]))
    deep = net.decoder3(deep, net.encoder2(maps[0]))
    close(net.out(net.decoder2(deep, net.encoder1(x))), net(x))


def test_the_pyramid_of_a_vit_has_no_class_token_and_takes_no_series() -> None:
    with torch.no_grad():
        ours = backbone("image", (16, 24))
        x = {"m": torch.randn(2, 2, 16, 24)}
        maps = ours.feature_pyramid(x)["m"]
        close(maps[3], ours.feature_maps(x)["m"])
    assert [tuple(m.shape) for m in maps] == [(2, 24, 4, 6)] * 4
    with pytest.raises(ConfigError, match="choose one date"):
        backbone("series", (16, 16)).feature_pyramid({"m": torch.randn(1, 2, 2, 16, 16)})


def test_a_file_of_something_else_is_refused() -> None:
    with pytest.raises(WeightsError, match="no ViT weights file of timm or MONAI"):
        read({"conv1.weight": torch.zeros(1)}, "image", (16, 16))
    state = backbone("image", (16, 16)).to_reference()
    with pytest.raises(WeightsError, match=r"blocks\.0\.ls1\.gamma.*no plain transformer block"):
        read({**state, "blocks.0.ls1.gamma": torch.ones(24)}, "image", (16, 16))
    few = {n: t for n, t in state.items() if "blocks.1" not in n}
    with pytest.raises(WeightsError, match=r"Only \d+ of \d+ tensors"):
        read(few, "image", (16, 16))


def test_a_table_for_another_grid_of_as_many_tokens_is_refused() -> None:
    state = backbone("volume", (8, 12, 16)).to_reference()
    variant = {"architecture": {**SIZES, "positions": "sincos"}, "patch_size": 4}
    variant["normalization"] = "identity"
    ViTBackbone.from_reference(state, variant, modality("volume", (8, 12, 16)))
    with pytest.raises(WeightsError, match=r"not the sine-cosine table of a grid of \(4, 3, 2\)"):
        ViTBackbone.from_reference(state, variant, modality("volume", (16, 12, 8)))


def test_3d_positions_put_the_second_axis_first() -> None:
    codes = position_codes((2, 3, 4), 12)
    along_y = codes.unflatten(0, (2, 3, 4))[0, :, 0]  # x and z at zero
    assert torch.equal(along_y[:, 4:], codes[:1, 4:].expand(3, -1))
    close(
        along_y[:, :2], torch.stack([torch.arange(3.0).sin(), (torch.arange(3.0) / 100).sin()], 1)
    )


@torch.no_grad()
def test_kept_tokens_are_encoded_as_if_the_others_did_not_exist() -> None:
    net = backbone("volume", (8, 12, 16))
    x = torch.randn(1, 2, 8, 12, 16)
    keep = torch.tensor([[5, 0, 17]])
    found = net.encode({"m": x}, keep={"m": keep})
    assert found.coords["m"].tolist() == [[[0, 1, 1], [0, 0, 0], [1, 1, 1]]]
    other = x.clone()
    other[..., 12:] = 9.0  # the last column of patches, none of them kept
    close(net.encode({"m": other}, keep={"m": keep}).tokens["m"], found.tokens["m"])


@torch.no_grad()
def test_replaced_patches_do_not_reach_the_features() -> None:
    net = backbone("image", (8, 8), mask_token=True)
    x = torch.randn(1, 2, 8, 8)
    other = x.clone()
    other[..., :4, :4] = 9.0
    hidden = {"m": torch.tensor([[True, False, False, False]])}
    first, second = (net.encode({"m": v}, replace=hidden).tokens["m"] for v in (x, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, net.encode({"m": x}).tokens["m"])
    with pytest.raises(ConfigError, match="mask_token: false has no mask token"):
        backbone("image", (8, 8)).encode({"m": x}, replace=hidden)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (4, 8, 4)])
def test_padded_dates_of_a_series_change_nothing(size: tuple[int, ...]) -> None:
    net = backbone("series", size)
    x = torch.randn(2, 3, 2, *size)
    dates = torch.tensor([[18000, 18100, 18200]] * 2, dtype=torch.int32)
    short = net({"m": x, "m.dates": dates})
    frames = torch.tensor([[True, True, True, False]] * 2)
    padded = {
        "m": torch.cat([x, torch.full_like(x[:, :1], 7.0)], 1),
        "m.dates": torch.cat([dates, torch.zeros_like(dates[:, :1])], 1),
        "m.frames": frames,
        "m.valid": frames.view(2, 4, *[1] * len(size)).expand(2, 4, *size),
    }
    long = net(padded)
    close(long.tokens["m"][:, : short.tokens["m"].shape[1]], short.tokens["m"])
    close(long.pooled["m"], short.pooled["m"])
    close(net.feature_maps(padded)["m"], net.feature_maps({"m": x, "m.dates": dates})["m"])
    later = net({"m": x, "m.dates": dates + torch.tensor([0, 90, 180], dtype=torch.int32)})
    assert not torch.allclose(later.pooled["m"], short.pooled["m"])
    with pytest.raises(DataError, match=r"batch\.m\.dates is missing"):
        net({"m": x})


@torch.no_grad()
def test_feature_maps_lay_tokens_on_their_grid() -> None:
    net = backbone("volume", (8, 12, 16))
    x = torch.randn(1, 2, 8, 12, 16)
    maps, tokens = net.feature_maps({"m": x})["m"], net({"m": x}).tokens["m"]
    assert maps.shape == (1, 24, 2, 3, 4)
    assert torch.equal(maps[0, :, 1, 2, 3], tokens[0, (1 * 3 + 2) * 4 + 3])


def test_several_modalities_and_tables_without_a_size_are_refused() -> None:
    two = {
        **modality("image", (8, 8)),
        "n": Modality(name="n", kind="image", channels=("a",), value_unit="arbitrary"),
    }
    with pytest.raises(ConfigError, match="encodes one modality"):
        ViTBackbone(two, normalization="identity")
    with pytest.raises(ConfigError, match="needs image_size"):
        ViTBackbone(
            modality("image", (8, 8)),
            architecture=ViTArchitecture(positions="learned"),
            normalization="identity",
        )


@pytest.mark.parametrize("layout", ["dino", "dinov2", "student_of_dino", "module"])
def test_students_and_teachers_of_dino_give_the_teachers_features(layout: str) -> None:
    torch.manual_seed(0)
    image = {
        "x": Modality(
            name="x", kind="image", channels=("a", "b"), value_unit="arbitrary", size=(16, 16)
        )
    }
    sizes = {"width": 24, "depth": 1, "heads": 2, "positions": "learned", "mask_token": True}
    arguments = {
        "architecture": {**sizes, "pooling": "class"}, "patch_size": 4, "image_size": 16,
        "normalization": "identity",
    }  # fmt: skip
    ours = ViTBackbone(image, **arguments).eval()  # type: ignore[arg-type]
    plain = {**ours.to_reference(), "mask_token": torch.ones(1, 24)}
    other = {n: torch.zeros_like(t) for n, t in plain.items()}
    head = {"head.mlp.0.weight": torch.zeros(3, 24)}

    def below(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"{prefix}{n}": t for n, t in state.items()}

    teacher = below("backbone.", plain) | head
    files: dict[str, dict[str, Any]] = {
        "dino": {"teacher": teacher, "student": below("module.backbone.", other), "epoch": 3},
        "dinov2": {"model": below("teacher.backbone.", plain) | below("student.backbone.", other)},
        "student_of_dino": below("module.backbone.", plain) | below("module.", head),
        "module": below("module.", plain),
    }
    loaded, report = ViTBackbone.from_reference(files[layout], arguments, image)
    assert not report.missing
    assert float(loaded.mask_token.detach().sum()) == 24  # type: ignore[union-attr]
    x = {"x": torch.randn(2, 2, 16, 16), "x.valid": torch.ones(2, 16, 16, dtype=torch.bool)}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x).pooled["x"], ours(x).pooled["x"])


def test_weights_that_hold_nan_are_refused(tmp_path: Path) -> None:
    made = ViTBackbone(
        modality("image", (8, 8)), ViTArchitecture(width=12, depth=1, heads=2), patch_size=4,
        normalization="identity",
    )  # fmt: skip
    torch.nn.init.constant_(next(made.parameters()), float("nan"))
    export_backbone(made, tmp_path / "out")
    with pytest.raises(WeightsError, match="1 tensors of the weights hold NaN or infinite"):
        load_backbone(tmp_path / "out")
