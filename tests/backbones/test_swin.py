"""SwinUNETR's encoder: weights of every layout and back, MONAI's decoder, sizes."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import SwinUNETR
from torch import Tensor

from domainssl import export_backbone, load_backbone
from domainssl.backbones.swin import SwinBackbone
from domainssl.errors import ConfigError, DataError, WeightsError
from domainssl.modality import Modality

CT = Modality(name="ct", kind="volume", channels=("ct",), value_unit="hu")
SMALL = {"feature_size": 12, "merging": "standard"}


def build(**changes: Any) -> SwinBackbone:
    torch.manual_seed(0)
    return SwinBackbone({"ct": CT}, {**SMALL, **changes}).eval()  # type: ignore[arg-type]


def crop(*size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"ct": 2000 * torch.rand(1, 1, *size, generator=generator) - 1000}


def layouts(backbone: SwinBackbone) -> dict[str, dict[str, Any]]:
    """Content of weights files as they are found, by name."""
    monai = backbone.to_reference("monai")["state_dict"]
    old = backbone.to_reference("model_swinvit")["state_dict"]
    inner = {n.removeprefix("swinViT."): t for n, t in monai.items()}
    disruptive = {
        "encoder." + re.sub(r"^(layers\d)\.0\.", r"\1.0.0.", n): t
        for n, t in inner.items()
        if not n.endswith("index")
    }
    disruptive |= {"encoder.mask_token": torch.zeros(1), "encoder.norm.weight": torch.ones(192)}
    return {
        "model_swinvit": {"state_dict": old},
        "no tables": {"state_dict": {n: t for n, t in old.items() if not n.endswith("index")}},
        "disruptive": {"model": disruptive},
        "monai": monai,
        "research": {
            "state_dict": {f"module.{n}": t for n, t in monai.items()},
            "optimizer": {"step": 3},
        },
        "suprem": {"net": {f"module.backbone.{n}": t for n, t in monai.items()}},
    }


@pytest.mark.parametrize(
    "layout", ["model_swinvit", "no tables", "disruptive", "monai", "research", "suprem"]
)
def test_every_layout_fills_the_whole_encoder(layout: str, tmp_path: Path) -> None:
    backbone = build(merging="legacy")
    torch.save(layouts(backbone)[layout], path := tmp_path / "file.pt")
    loaded = load_backbone("swin_unetr_legacy", weights=path)
    assert isinstance(loaded, SwinBackbone)
    assert loaded.architecture == backbone.architecture
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_release_has_126_tensors_and_says_legacy_by_its_layout(tmp_path: Path) -> None:
    content = layouts(build())["model_swinvit"]
    assert len(content["state_dict"]) == 126
    torch.save(content, path := tmp_path / "model_swinvit.pt")
    loaded = load_backbone("swin_unetr", weights=path)
    assert isinstance(loaded, SwinBackbone) and loaded.architecture.merging == "legacy"


def test_a_file_that_does_not_tell_its_merging_is_refused(tmp_path: Path) -> None:
    torch.save(layouts(build())["monai"], path := tmp_path / "swinunetr.pt")
    with pytest.raises(WeightsError, match="load it as 'swin_unetr_legacy', else"):
        load_backbone("swin_unetr", weights=path)


def test_files_of_ours_tell_it(tmp_path: Path) -> None:
    torch.save(build().to_reference("model_swinvit"), path := tmp_path / "file.pt")
    loaded = load_backbone("swin_unetr", weights=path)
    assert isinstance(loaded, SwinBackbone) and loaded.architecture.merging == "standard"


def test_another_merging_than_that_of_the_layout_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(layouts(build())["model_swinvit"], path := tmp_path / "model_swinvit.pt")
    with caplog.at_level(logging.WARNING):
        load_backbone("swin_unetr_standard", weights=path)
    assert "weights with legacy patch merging; standard was asked for" in caplog.text


def test_the_two_orders_of_merging_give_other_features() -> None:
    new, old = build(), build(merging="legacy")
    old.load_state_dict(new.state_dict())
    x = crop(64, 32, 32)
    with torch.no_grad():
        a, b = (m.feature_pyramid(x)["ct"] for m in (new, old))
    assert torch.equal(a[0], b[0])
    assert float((a[4] - b[4]).abs().max()) > 0.1


def test_swinunetr_takes_the_weights_and_decodes_the_pyramid() -> None:
    backbone, x = build(), crop(64, 32, 32)
    net = SwinUNETR(in_channels=1, out_channels=3, feature_size=12).eval()
    left = net.load_state_dict(backbone.to_reference()["state_dict"], strict=False)
    assert not left.unexpected_keys
    assert not any(n.startswith("swinViT.") for n in left.missing_keys)
    values = backbone.normalize(x)["ct"]
    with torch.no_grad():
        expected = net(values)
        maps = backbone.feature_pyramid(x)["ct"]
        deep = net.decoder5(net.encoder10(maps[4]), maps[3])
        deep = net.decoder4(deep, net.encoder4(maps[2]))
        deep = net.decoder3(deep, net.encoder3(maps[1]))
        deep = net.decoder2(deep, net.encoder2(maps[0]))
        found = net.out(net.decoder1(deep, net.encoder1(values)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_monai_loads_the_old_layout_that_we_write() -> None:
    backbone = build()
    net = SwinUNETR(in_channels=1, out_channels=3, feature_size=12)
    net.load_from(backbone.to_reference("model_swinvit"))
    for name, tensor in backbone.encoder.net.state_dict().items():
        assert torch.equal(net.swinViT.state_dict()[name], tensor), name


def test_integer_tables_are_not_exported(tmp_path: Path) -> None:
    export_backbone(build(), tmp_path)
    loaded = load_backbone(tmp_path)
    assert not [n for n, t in loaded.state_dict().items() if not t.is_floating_point()]
    x = crop(32, 32, 64)
    assert torch.equal(loaded(x).pooled["ct"], build()(x).pooled["ct"])


def test_version_two_is_recognised(tmp_path: Path) -> None:
    torch.save(build(residual_convolution=True).to_reference(), path := tmp_path / "voco.pt")
    loaded = load_backbone("swin_unetr", weights=path)
    assert isinstance(loaded, SwinBackbone) and loaded.architecture.residual_convolution


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"conv1.weight": torch.zeros(1)}, "No SwinTransformer in this file"),
        (lambda s: {}, "No SwinTransformer in this file"),
        (
            lambda s: {n: t for n, t in s.items() if ".mlp." not in n or "layers1.0.blocks.0" in n},
            "tensors of the encoder are in the file; missing are",
        ),
        (lambda s: {n: t for n, t in s.items() if "table" not in n}, "bias_table' is missing"),
    ],
)
def test_files_that_are_no_encoder_raise(change: Any, words: str, tmp_path: Path) -> None:
    state = build().to_reference()["state_dict"]
    torch.save({"state_dict": change(state), "merging": "standard"}, path := tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=words):
        load_backbone("swin_unetr", weights=path)


def test_data_that_do_not_fit_the_file_are_refused(tmp_path: Path) -> None:
    torch.save(build().to_reference(), path := tmp_path / "x.pt")
    two = Modality(name="ct", kind="volume", channels=("a", "b"), value_unit="hu")
    with pytest.raises(WeightsError, match="the data have 2 channels, the file 1"):
        load_backbone("swin_unetr", weights=path, modalities={"ct": two})
    mr = Modality(name="t1", kind="volume", channels=("t1",), value_unit="arbitrary")
    with pytest.raises(WeightsError, match="trained on CT in HU"):
        load_backbone("swin_unetr", weights=path, modalities={"t1": mr})
    with pytest.raises(WeightsError, match="'feature_size': 48} was asked for"):
        load_backbone("swin_unetr", weights=path, arguments={"architecture": {"feature_size": 48}})


def test_sizes_that_are_not_divisible_by_32_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"size \(48, 64, 96\) is not divisible by 32.*\(64, 64, 96"
    ):
        build()(crop(48, 64, 96))


def test_one_volume_is_encoded() -> None:
    with pytest.raises(ConfigError, match=r"encodes one volume, the data have \['a', 'b'\]"):
        SwinBackbone(
            {n: Modality(name=n, kind="volume", channels=("x",), value_unit="hu") for n in "ab"}
        )
