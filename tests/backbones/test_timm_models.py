"""Backbones as models of timm: same features, their own normalisation, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from domainssl import export_timm, load_backbone, register_timm
from domainssl.backbones.base import Backbone
from domainssl.backbones.croma import PUBLISHED_MODALITIES, CROMABackbone
from domainssl.backbones.encoders.backbone import EncoderBackbone, EncoderSizes
from domainssl.backbones.timm_models import TimmModel, TimmPyramid
from domainssl.backbones.vit import ViTArchitecture, ViTBackbone
from domainssl.cli import main
from domainssl.errors import ConfigError, WeightsError
from domainssl.modality import Modality

timm = pytest.importorskip("timm")


def _image(**changes: object) -> dict[str, Modality]:
    facts = {
        "name": "img", "kind": "image", "channels": ("a", "b"), "value_unit": "arbitrary",
        "mean": (100.0, 200.0), "std": (10.0, 20.0), "size": (32, 32), **changes,
    }  # fmt: skip
    return {"img": Modality(**facts)}  # type: ignore[arg-type]


def _vit(**changes: object) -> ViTBackbone:
    torch.manual_seed(0)
    return ViTBackbone(_image(**changes), ViTArchitecture(width=24, depth=4, heads=2), 8).eval()


def _resenc() -> EncoderBackbone:
    torch.manual_seed(0)
    sizes = EncoderSizes(features=(4, 8, 16), blocks=(1, 1, 1))
    return EncoderBackbone(_image(), "resenc", sizes).eval()


def _values(items: int = 3) -> torch.Tensor:
    return torch.randn(items, 2, 32, 32) * 15 + 150


def test_a_model_gives_the_pooled_feature_and_takes_a_head() -> None:
    backbone = _vit()
    assert register_timm(backbone, "plan_vit") == "plan_vit"
    x = _values()
    wanted = backbone({"img": x})
    model = timm.create_model("plan_vit", pretrained=True).eval()
    assert isinstance(model, TimmModel)
    assert torch.equal(model(x), wanted.pooled["img"])
    tokens = model.forward_features(x)
    assert torch.equal(tokens[:, model.num_prefix_tokens :], wanted.tokens["img"])
    assert torch.equal(model.forward_head(tokens, pre_logits=True), wanted.pooled["img"])
    model.reset_classifier(5)
    assert model(x).shape == (3, 5) and model.get_classifier().out_features == 5
    config = timm.data.resolve_model_data_config(model)
    assert config["mean"] == (0.0, 0.0) and config["std"] == (1.0, 1.0)  # it normalises itself
    assert config["input_size"] == (2, 32, 32)


def test_without_pretrained_the_weights_are_new_and_the_statistics_stay() -> None:
    backbone = _vit()
    backbone.normalizer.get_buffer("mean_img").fill_(7.0)
    register_timm(backbone, "plan_new")
    model = timm.create_model("plan_new", num_classes=2)
    assert not torch.equal(model.backbone.embed.weight, backbone.embed.weight)
    assert model.backbone.normalizer.get_buffer("mean_img").tolist() == [7.0, 7.0]
    model.backbone.embed.weight.data.zero_()  # copies: the registered backbone stays as it is
    assert backbone.embed.weight.abs().sum() > 0


def test_a_pyramid_tells_channels_and_strides() -> None:
    backbone = _resenc()
    register_timm(backbone, "plan_resenc")
    model = timm.create_model("plan_resenc", pretrained=True, features_only=True).eval()
    assert isinstance(model, TimmPyramid)
    assert model.feature_info.channels() == [4, 8, 16]
    assert model.feature_info.reduction() == [1, 2, 4]
    x = _values()
    for found, wanted in zip(model(x), backbone.feature_pyramid({"img": x})["img"], strict=True):
        assert torch.equal(found, wanted)
    last = timm.create_model("plan_resenc", features_only=True, out_indices=[-1])
    assert last.feature_info.reduction() == [4] and len(last(x)) == 1
    with pytest.raises(ConfigError, match=r"has 3 maps at strides \[1, 2, 4\]"):
        timm.create_model("plan_resenc", features_only=True, out_indices=(0, 4))


def test_registering_a_name_again_replaces_the_backbone() -> None:
    first, second = _vit(), _resenc()
    register_timm(first, "plan_twice")
    register_timm(second, "plan_twice")
    assert timm.create_model("plan_twice", pretrained=True).backbone.embed_dim == second.embed_dim


def test_one_sensor_of_several_is_chosen_by_name() -> None:
    torch.manual_seed(0)
    croma: Backbone = CROMABackbone(PUBLISHED_MODALITIES, width=16, depth=2, heads=2).eval()
    with pytest.raises(ConfigError, match="has s1, s2; models of timm take one tensor"):
        register_timm(croma, "plan_croma")
    register_timm(croma, "plan_croma", modality="s2")
    x = torch.randn(2, 12, 16, 16) * 900 + 1500
    model = timm.create_model("plan_croma", pretrained=True, in_chans=12).eval()
    assert torch.equal(model(x), croma({"s2": x}).pooled["s2"])
    maps = timm.create_model("plan_croma", pretrained=True, features_only=True).eval()
    assert maps.feature_info.reduction() == [8]
    with pytest.raises(ConfigError, match="in_chans: got 3, the encoder takes 12: B01 .*subset"):
        timm.create_model("plan_croma", in_chans=3)
    with pytest.raises(ConfigError, match="has no 's3'. It knows s1, s2"):
        register_timm(croma, "plan_croma", modality="s3")


def test_an_export_is_found_by_its_folder(tmp_path: Path) -> None:
    backbone = _vit()
    config = export_timm(backbone, tmp_path / "out", licence="MIT")
    facts = json.loads(config.read_text())
    assert (facts["architecture"], facts["num_features"]) == ("domainssl", 24)
    register_timm()
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=3)
    assert model.num_classes == 3
    same = timm.create_model("domainssl", backbone=tmp_path / "out", pretrained=True).eval()
    x = _values()
    assert torch.equal(same(x), backbone({"img": x}).pooled["img"])
    assert torch.equal(load_backbone(tmp_path / "out")({"img": x}).pooled["img"], same(x))
    with pytest.raises(WeightsError, match="exists already"):
        export_timm(backbone, tmp_path / "out")
    with pytest.raises(ConfigError, match="name the weights: backbone="):
        timm.create_model("domainssl")


def test_the_verb_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"name": "ViTBackbone", "arguments": _vit().arguments}
    state = {f"backbone.{name}": tensor for name, tensor in _vit().state_dict().items()}
    torch.save({"backbone": facts, "state_dict": state}, tmp_path / "last.ckpt")
    words = ["export", "--checkpoint", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main([*words, "--format", "timm"]) == 0
    assert "timm.create_model('local-dir:" in " ".join(capsys.readouterr().out.split())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "backbone.json", "backbone.safetensors", "config.json",
    ]  # fmt: skip
    assert main([*words, "--format", "timm", "--modalities", "a", "b"]) == 2
    assert "models of timm take one" in capsys.readouterr().err


def test_what_is_no_single_tensor_and_what_has_no_meaning_is_refused() -> None:
    series = ViTBackbone(_image(kind="series"), ViTArchitecture(width=24, depth=1, heads=2), 8)
    with pytest.raises(ConfigError, match="is of kind 'series'"):
        register_timm(series, "plan_series")
    item = ViTBackbone(_image(), ViTArchitecture(width=24, depth=1, heads=2), 8, None, "item")
    with pytest.raises(ConfigError, match="is scaled per item"):
        register_timm(item, "plan_item")
    with pytest.raises(ConfigError, match="timm has a model 'resnet18' of its own"):
        register_timm(_vit(), "resnet18")
    with pytest.raises(ConfigError, match="letters, digits and underscores"):
        register_timm(_vit(), "my-s2")
    with pytest.raises(ConfigError, match="give a backbone and another name, or neither"):
        register_timm(_vit())
    register_timm(_vit(), "plan_options")
    with pytest.raises(ConfigError, match="drop_rate cannot be set"):
        timm.create_model("plan_options", drop_rate=0.1)
