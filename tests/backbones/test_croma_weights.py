"""CROMA weights in every published layout, and their outputs against torchgeo's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from grouped import grouped
from safetensors.torch import load_file, save_file
from torch import Tensor

from domainssl import load_backbone
from domainssl.backbones.croma import (
    PUBLISHED_MODALITIES,
    CROMABackbone,
    flatten_reference,
    reference_name,
)
from domainssl.errors import WeightsError
from domainssl.objectives.croma import CROMA, CROMAArchitecture

GOLDEN = Path(__file__).parents[1] / "golden" / "croma_tiny.safetensors"
WIDE = {"width": 64, "depth": 2, "heads": 16}  # torchgeo's encoders have 16 heads always


def _backbone(**arguments: Any) -> CROMABackbone:
    torch.manual_seed(0)
    return CROMABackbone(dict(PUBLISHED_MODALITIES), **{**WIDE, **arguments}).eval()


def _torchgeo_layout(backbone: CROMABackbone) -> dict[str, Tensor]:
    groups = backbone.to_reference()
    return {f"{g}.{name}": t.clone() for g, state in groups.items() for name, t in state.items()}


def _pretraining_layout(backbone: CROMABackbone) -> dict[str, Tensor]:
    return {
        reference_name(own, "pretraining"): t.clone()
        for own, t in backbone.state_dict().items()
        if not own.startswith("normalizer.")
    }


def _batch(size: tuple[int, int] = (24, 24)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "s1": torch.randn(2, 2, *size, generator=generator) * 5 - 12,
        "s2": torch.randn(2, 12, *size, generator=generator) * 900 + 1500,
    }


@pytest.mark.parametrize("layout", ["released", "torchgeo", "pretraining", "wrapped"])
def test_every_published_layout_loads(layout: str, tmp_path: Path) -> None:
    backbone = _backbone()
    states: dict[str, Any] = {
        "released": backbone.to_reference(),
        "torchgeo": _torchgeo_layout(backbone),
        "pretraining": _pretraining_layout(backbone),
        "wrapped": {
            "state_dict": {f"module.{n}": t for n, t in _torchgeo_layout(backbone).items()}
        },
    }
    path = tmp_path / "weights.pt"
    torch.save(states[layout], path)
    loaded = load_backbone("croma_base", weights=path, arguments=WIDE)
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_released_files_have_the_published_tensors() -> None:
    with torch.device("meta"):
        for variant, counts in {
            "croma_base": {"s1_encoder": 70, "s2_encoder": 136, "joint_encoder": 110},
            "croma_large": {"s1_encoder": 136, "s2_encoder": 268, "joint_encoder": 218},
        }.items():
            backbone = CROMABackbone(dict(PUBLISHED_MODALITIES), **CROMABackbone.variants[variant])
            groups = {group: len(state) for group, state in backbone.to_reference().items()}
            assert groups == {**counts, "s1_GAP_FFN": 6, "s2_GAP_FFN": 6}
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in backbone.named_children()}
    assert sizes["radar_encoder"] == 151_251_968
    assert sizes["optical_encoder"] == 303_025_152
    assert sizes["joint_encoder"] == 201_488_384
    assert sizes["radar_pool"] == sizes["optical_pool"] == 8_395_776


def test_outputs_equal_torchgeos(tmp_path: Path) -> None:
    croma = pytest.importorskip("torchgeo.models.croma", reason="torchgeo is not installed")
    torch.manual_seed(3)
    theirs = croma.CROMA(encoder_dim=64, encoder_depth=2, image_size=24).eval()
    path = tmp_path / "torchgeo.pt"
    torch.save(theirs.state_dict(), path)
    ours = load_backbone("croma_base", weights=path, arguments=WIDE)
    x = ours.normalize(_batch())
    with torch.no_grad():
        features = ours.encode(x)
        expected = theirs(x_sar=x["s1"], x_optical=x["s2"])
    for name, prefix in {"s1": "sar", "s2": "optical", "joint": "joint"}.items():
        tokens, pooled = expected[f"{prefix}_encodings"], expected[f"{prefix}_GAP"]
        torch.testing.assert_close(features.tokens[name], tokens, rtol=0, atol=1e-5)
        torch.testing.assert_close(features.pooled[name], pooled, rtol=0, atol=1e-5)


def test_a_partial_file_is_refused_and_may_be_loaded_knowingly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = _torchgeo_layout(_backbone())
    del state["s1_encoder.linear_input.weight"]
    state["s1_encoder.something.weight"] = torch.zeros(1)
    path = tmp_path / "partial.safetensors"
    save_file(state, path)
    message = r"missing in the file: 1 \(radar_encoder.embed.weight\).*unexpected.*something"
    with pytest.raises(WeightsError, match=message):
        load_backbone("croma_base", weights=path, arguments=WIDE)
    with caplog.at_level(logging.WARNING):
        load_backbone("croma_base", weights=path, arguments=WIDE, strict=False)
    assert "radar_encoder.embed.weight" in caplog.text
    assert "s1_encoder.something.weight" in caplog.text


def test_one_sensor_loads_from_a_file_of_two(tmp_path: Path) -> None:
    both = _backbone()
    path = tmp_path / "weights.pt"
    torch.save(both.to_reference(), path)
    optical = load_backbone(
        "croma_base", weights=path, arguments=WIDE, modalities={"s2": PUBLISHED_MODALITIES["s2"]}
    )
    x = {"s2": _batch()["s2"]}
    with torch.no_grad():
        assert torch.equal(optical(x).pooled["s2"], both(x).pooled["s2"])
    assert set(optical(x).pooled) == {"s2"}


def test_rectangles_follow_the_formula() -> None:
    backbone = _backbone()
    with torch.no_grad():
        features = backbone(_batch((16, 40)))
    assert features.grid["joint"] == (2, 5)
    for module in backbone.modules():
        if hasattr(module, "path"):
            module.path = "math"
    with torch.no_grad():
        written_out = backbone(_batch((16, 40)))
    torch.testing.assert_close(features.tokens["joint"], written_out.tokens["joint"])
    maps = backbone.feature_maps(_batch((16, 40)))["joint"]
    assert maps.shape == (2, 64, 2, 5)
    torch.testing.assert_close(maps[:, :, 1, 3], written_out.tokens["joint"][:, 8])


def test_volumes_are_encoded_by_the_same_code() -> None:
    def volume(name: str, channels: int) -> dict[str, Any]:
        names = [f"{name}{i}" for i in range(channels)]
        return {"name": name, "kind": "volume", "channels": names, "value_unit": "arbitrary"}

    backbone = CROMABackbone(
        {"ct": volume("ct", 1), "mr": volume("mr", 2)},
        radar="ct",
        optical="mr",
        width=24,
        depth=2,
        heads=2,
        patch_size=4,
        normalization="identity",
    )
    batch = {"ct": torch.randn(2, 1, 8, 8, 4), "mr": torch.randn(2, 2, 8, 8, 4)}
    features = backbone(batch)
    assert features.grid["joint"] == (2, 2, 1)
    assert features.tokens["joint"].shape == (2, 4, 24)


def test_the_statistics_of_the_weights_win_over_those_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(_backbone().to_reference(), path)
    own = {
        name: {**m.to_dict(), "mean": [0.0] * m.num_channels}
        for name, m in PUBLISHED_MODALITIES.items()
    }
    model = CROMA(
        own,
        **grouped(
            size="tiny",
            architecture=CROMAArchitecture(width=64, heads=16),
            context_size=24,
            weights=str(path),
        ),
    )
    mean, _ = model.backbone.normalizer.statistics("s1") or (None, None)
    assert mean is not None
    torch.testing.assert_close(mean, torch.tensor(PUBLISHED_MODALITIES["s1"].mean))


def test_pretraining_continues_with_decoder_and_projections(tmp_path: Path) -> None:
    prefix = "state_dict/"
    tensors = load_file(GOLDEN)
    state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    path = tmp_path / "pretraining.pt"
    torch.save(state, path)
    model = CROMA(dict(PUBLISHED_MODALITIES), **grouped(size="tiny", weights=str(path)))
    assert torch.equal(model.decoder.head.weight, state["decoder.linear_output.weight"])
    projection = state["global_contrast_loss.radar_proj.weight"]
    assert torch.equal(model.radar_projection.weight, projection)


def test_other_files_are_refused_with_what_was_expected(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pt"
    torch.save({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=r"no CROMA weights file.*conv1.weight"):
        load_backbone("croma_base", weights=path)


def test_weights_of_another_width_are_refused_with_both_shapes(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(_backbone().to_reference(), path)
    with pytest.raises(WeightsError, match=r"file \(64, 128\), model \(768, 128\)"):
        load_backbone("croma_base", weights=path)


def test_flattened_names_lose_their_wrappers() -> None:
    state = {"state_dict": {"module.model.s1_encoder.x": torch.zeros(1)}}
    assert list(flatten_reference(state)) == ["s1_encoder.x"]
