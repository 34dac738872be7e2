"""Encoders per modality: features, series, volumes, sealed scaling, and every weights layout."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from domainssl import load_backbone
from domainssl.backbones.encoders.backbone import EncoderBackbone, EncoderSizes
from domainssl.backbones.encoders.files import published_modality
from domainssl.errors import ConfigError, WeightsError
from domainssl.modality import Modality

TINY = EncoderSizes(width=24, depth=1, heads=2, patch_size=4)


def some(name: str, bands: int = 2, kind: str = "image") -> Modality:
    return Modality(
        name=name,
        kind=kind,
        channels=tuple(f"{name}_{i}" for i in range(bands)),
        value_unit="arbitrary",
    )  # type: ignore[arg-type]


def build(*modalities: Modality, **options: Any) -> EncoderBackbone:
    torch.manual_seed(0)
    options = {"encoder": "transformer", "sizes": TINY, "normalization": "identity", **options}
    return EncoderBackbone({m.name: m for m in modalities}, **options)


@pytest.mark.parametrize(
    ("encoder", "width", "grid"),
    [("transformer", 24, (8, 8)), ("resnet18", 512, (1, 1)), ("vit_tiny_patch16_224", 192, (2, 2))],
)
def test_each_encoder_gives_tokens_on_a_grid_and_a_vector(
    encoder: str, width: int, grid: tuple[int, int]
) -> None:
    backbone = build(some("s1"), some("s2", 3), encoder=encoder, image_size=32).eval()
    batch = {"s1": torch.rand(2, 2, 32, 32), "s2": torch.rand(2, 3, 32, 32)}
    features = backbone(batch)
    for name in batch:
        assert features.pooled[name].shape == (2, width) == (2, backbone.embed_dim[name])
        assert features.grid[name] == grid
        assert features.tokens[name].shape == (2, grid[0] * grid[1], width)
    assert backbone.feature_maps(batch)["s1"].shape == (2, width, *grid)
    assert backbone.stages(batch)["s2"][-1].shape == (2, width, *grid)
    alone = backbone({"s2": batch["s2"]})
    assert torch.equal(alone.pooled["s2"], features.pooled["s2"])


def test_a_resnet_has_four_stages() -> None:
    backbone = build(some("s1"), encoder="resnet18").eval()
    maps = backbone.stages({"s1": torch.rand(1, 2, 64, 64)})["s1"]
    assert [tuple(m.shape[1:]) for m in maps] == [
        (64, 16, 16),
        (128, 8, 8),
        (256, 4, 4),
        (512, 2, 2),
    ]


def test_a_series_is_the_mean_over_its_real_dates() -> None:
    backbone = build(some("s2", 3, "series")).eval()
    image = build(some("s2", 3)).eval()
    image.load_state_dict(backbone.state_dict())
    x = torch.rand(2, 3, 3, 8, 8)
    frames = torch.tensor([[True, True, False], [True, False, False]])
    features = backbone({"s2": x, "s2.frames": frames})
    one = image({"s2": x[:, 0]}).pooled["s2"]
    two = image({"s2": x[:, 1]}).pooled["s2"]
    torch.testing.assert_close(features.pooled["s2"][0], (one[0] + two[0]) / 2)
    torch.testing.assert_close(features.pooled["s2"][1], one[1])
    assert features.grid["s2"] == (3, 2, 2)
    assert not features.token_valid["s2"].view(2, 3, 4)[:, 2].any()


def test_timm_encoders_refuse_volumes_and_name_those_that_take_them() -> None:
    backbone = build(some("ct", 1, "volume")).eval()
    assert backbone({"ct": torch.rand(1, 1, 8, 8, 12)}).grid["ct"] == (2, 2, 3)
    with pytest.raises(ConfigError, match="use encoder: transformer, resenc, monai:swin"):
        build(some("ct", 1, "volume"), encoder="resnet18")


def test_absent_items_do_not_count_in_batch_statistics() -> None:
    x = torch.rand(4, 2, 32, 32)
    present = torch.tensor([True, True, True, False])
    first, second = (build(some("s1"), encoder="resnet18").train() for _ in range(2))
    a = first({"s1": x, "s1.present": present}).pooled["s1"][:3]
    b = second({"s1": x[:3]}).pooled["s1"]
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("encoder", ["resnet18", "vit_tiny_patch16_224", "transformer"])
def test_checkpointing_changes_neither_gradients_nor_buffers(encoder: str) -> None:
    def run(enabled: bool) -> EncoderBackbone:
        backbone = build(some("s1"), encoder=encoder, image_size=32).train()
        backbone.set_gradient_checkpointing(enabled)
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(3, 2, 32, 32, generator=generator)
        backbone({"s1": x}).pooled["s1"].square().sum().backward()
        return backbone

    plain, cheap = run(False), run(True)
    for (name, p), q in zip(plain.named_parameters(), cheap.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for name, buffer in plain.state_dict().items():
        torch.testing.assert_close(cheap.state_dict()[name], buffer, msg=name)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"encoder": "resnet5O"}, "Did you mean 'resnet50'"),
        ({"encoder": "convnext_atto"}, "expected one of timm's ResNet or VisionTransformer"),
        ({"encoder": {"s1": "resnet18"}}, "one for each of"),
        ({"deformable_attention": "shared"}, "goes behind the stages of a 2D ResNet"),
    ],
)
def test_what_cannot_be_built_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build(some("s1"), some("s2", 3), **options)


def test_tokens_cannot_be_left_out() -> None:
    backbone = build(some("s1"))
    with pytest.raises(ConfigError, match="cannot leave tokens out"):
        backbone.encode({"s1": torch.rand(1, 2, 8, 8)}, keep={"s1": torch.zeros(1, 1).long()})


# -- weights -----------------------------------------------------------------------------------


def _published(*bands: int) -> dict[str, Modality]:
    found = {}
    for count in bands:
        modality = published_modality(count)
        assert modality is not None
        found[modality.name] = modality
    return found


def _random(variant: str, *bands: int) -> EncoderBackbone:
    torch.manual_seed(len(bands))
    loaded = load_backbone(variant, weights="random", modalities=dict(_published(*bands)))
    assert isinstance(loaded, EncoderBackbone)
    return loaded


def _written(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "weights.pth"
    torch.save(content, path)
    return path


def _same(a: EncoderBackbone, b: EncoderBackbone, names: tuple[str, ...]) -> None:
    for name in names:
        for key, tensor in a.encoders[name].state_dict().items():
            assert torch.equal(b.encoders[name].state_dict()[key], tensor), key


HEAD = {"module.projector1.0.weight": torch.zeros(4, 4), "module.bn.running_mean": torch.zeros(4)}


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("prefixed", [True, False])
def test_joint_resnet_files(tmp_path: Path, wrapped: bool, prefixed: bool) -> None:
    source = _random("decur_resnet50", 2, 13)
    state = {**source.to_reference(), **HEAD}
    if not prefixed:
        state = {n.removeprefix("module."): t for n, t in state.items()}
    content = {"epoch": 99, "model": state, "optimizer": {}} if wrapped else state
    loaded = load_backbone("decur_resnet50", weights=_written(tmp_path, content))
    assert isinstance(loaded, EncoderBackbone)
    assert list(loaded.modalities) == ["s1", "s2"]
    assert len(loaded.modalities["s2"].channels) == 13
    _same(source, loaded, ("s1", "s2"))
    forms = {n: str(f) for n, f in loaded.normalizer.forms.items()}
    assert forms == {"s1": "mean2std8", "s2": "window(0,10000)"}


def test_one_modality_of_a_joint_file(tmp_path: Path) -> None:
    source = _random("decur_resnet50", 2, 13)
    path = _written(tmp_path, source.to_reference())
    loaded = load_backbone("decur_resnet50", weights=path, modalities=dict(_published(13)))
    assert isinstance(loaded, EncoderBackbone)
    assert list(loaded.modalities) == ["s2"]
    _same(source, loaded, ("s2",))


@pytest.mark.parametrize("bands", [2, 12, 13])
@pytest.mark.parametrize("variant", ["ssl4eo_resnet18", "ssl4eo_vit_small"])
def test_single_files_choose_the_modality_by_their_bands(
    tmp_path: Path, variant: str, bands: int
) -> None:
    source = _random(variant, bands)
    (name,) = source.modalities
    path = _written(tmp_path, source.to_reference(name))
    loaded = load_backbone(variant, weights=path)
    assert isinstance(loaded, EncoderBackbone)
    assert loaded.modalities == source.modalities
    _same(source, loaded, (name,))


def test_published_key_counts() -> None:
    resnet = _random("decur_resnet50", 2)
    assert len(resnet.to_reference("s1")) == 318
    assert sum(p.numel() for p in resnet.parameters()) == 23_504_896
    vit = _random("decur_vit_small", 13)
    assert len(vit.to_reference("s2")) == 150
    assert sum(p.numel() for p in vit.parameters()) == 22_648_704


def _layouts(net: dict[str, Tensor], head: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    def under(prefix: str, **more: Tensor) -> dict[str, Tensor]:
        return {f"{prefix}{n}": t for n, t in {**net, **more}.items()}

    other = {f"module.encoder_k.{n}": torch.zeros_like(t) for n, t in net.items()}
    moco2 = under("module.encoder_q.", **{"fc.0.weight": torch.zeros(2, 2)})
    moco3 = under("module.base_encoder.", **{"head.0.weight": torch.zeros(2, 2)})
    student = {f"module.backbone.{n}": torch.zeros_like(t) for n, t in net.items()}
    mae = {**net, "decoder_pred.weight": torch.zeros(2), "mask_token": torch.zeros(1)}
    return {
        "moco_v2": {"epoch": 1, "state_dict": {**moco2, **other, "module.queue": torch.zeros(2)}},
        "moco_v3": {"state_dict": {**moco3, "module.predictor.0.weight": torch.zeros(1)}},
        "dino": {"student": student, "teacher": under("backbone.", **{"head.x": torch.zeros(1)})},
        "mae": {"model": mae, "epoch": 3},
        "torchgeo": {**net, **head},
    }


@pytest.mark.parametrize("layout", ["moco_v2", "moco_v3", "dino", "mae", "torchgeo"])
@pytest.mark.parametrize("variant", ["ssl4eo_resnet18", "ssl4eo_vit_small"])
def test_layouts_of_ssl4eo_and_torchgeo(tmp_path: Path, layout: str, variant: str) -> None:
    source = _random(variant, 13)
    net = source.to_reference("s2")
    head = {"fc.weight" if "resnet" in variant else "head.weight": torch.zeros(3, 3)}
    loaded = load_backbone(variant, weights=_written(tmp_path, _layouts(net, head)[layout]))
    assert isinstance(loaded, EncoderBackbone)
    _same(source, loaded, ("s2",))


def test_joint_files_with_deformable_attention(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = _random("decur_resnet50_rda", 2, 13)
    state = source.to_reference()
    assert sum(n.startswith("module.da1_l3.") for n in state) == 14
    untrained = {n: torch.zeros_like(t) for n, t in state.items() if n.startswith("module.da2_")}
    path = _written(tmp_path, {**state, **untrained})
    loaded = load_backbone("decur_resnet50_rda", weights=path)
    assert isinstance(loaded, EncoderBackbone)
    for name, tensor in source.attention.state_dict().items():
        assert torch.equal(loaded.attention.state_dict()[name], tensor)
    assert {str(f) for f in loaded.normalizer.forms.values()} == {"mean2std8"}
    assert not caplog.records or all("never trained" not in r.message for r in caplog.records)


def test_the_untrained_blocks_of_modality_two_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = _random("decur_resnet50_rda", 2, 13)
    path = _written(tmp_path, source.to_reference("s2"))
    assert any(n.startswith("da2_l3.") for n in source.to_reference("s2"))
    with caplog.at_level(logging.WARNING):
        load_backbone("decur_resnet50_rda", weights=path)
    assert "never trained" in caplog.text


def test_safetensors_and_other_bands(tmp_path: Path) -> None:
    rgb = Modality(name="rgb", kind="image", channels=("R", "G", "B"), value_unit="rgb8")
    backbone = EncoderBackbone({"rgb": rgb}, "resnet18", normalization="scale(255)")
    path = tmp_path / "rgb.safetensors"
    save_file(backbone.to_reference("rgb"), path)
    with pytest.raises(WeightsError, match="pass modalities"):
        load_backbone("ssl4eo_resnet18", weights=path)
    loaded = load_backbone("ssl4eo_resnet18", weights=path, modalities={"rgb": rgb})
    assert str(loaded.normalizer.forms["rgb"]) == "scale(255)"


def test_files_of_another_architecture_or_band_count_are_refused(tmp_path: Path) -> None:
    path = _written(tmp_path, _random("ssl4eo_resnet18", 2).to_reference("s1"))
    with pytest.raises(WeightsError, match="12 bands|the data have 12"):
        load_backbone("ssl4eo_resnet18", weights=path, modalities=dict(_published(12)))
    with pytest.raises(WeightsError):
        load_backbone("ssl4eo_resnet50", weights=path)
    data2vec = {"patch_embed.proj.weight": torch.zeros(384, 2, 16, 16), "lm_head.bias": HEAD}
    with pytest.raises(WeightsError, match="missing in the file"):
        load_backbone("ssl4eo_vit_small", weights=_written(tmp_path, data2vec))
