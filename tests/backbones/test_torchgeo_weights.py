"""Weights of torchgeo's catalogue: features are those of its networks on its inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from domainssl import list_backbones, load_backbone
from domainssl.errors import WeightsError

_S2 = ("SENTINEL2_ALL_", "s2", 13)
_S1 = ("SENTINEL1_GRD_", "s1", 2)


@pytest.mark.parametrize(
    ("net", "stem", "method"),
    [
        ("resnet50", _S1, "SOFTCON"), ("resnet50", _S2, "SOFTCON"), ("resnet50", _S1, "CLOSP"),
        ("resnet50", _S2, "GEOCLOSP"), ("vit_small", _S2, "CLOSP"),
    ],
)  # fmt: skip
def test_features_are_those_of_torchgeos_network_and_inputs(
    net: str, stem: tuple[str, str, int], method: str, tmp_path: Path
) -> None:
    models = pytest.importorskip("torchgeo.models", reason="torchgeo is not installed")
    catalogue = {"resnet50": models.ResNet50_Weights, "vit_small": models.ViTSmall16_Weights}[net]
    prefix, key, count = stem
    entry = catalogue[prefix + method]
    [record] = list_backbones(f"ssl4eo_{net}.{key}_{method.lower()}", pretrained=True)
    address = f"/{record.repository}/resolve/{record.revision}/{record.file}"
    assert entry.url.endswith(address) and entry.meta["in_chans"] == count
    torch.manual_seed(0)
    model = timm.create_model(entry.meta["model"], in_chans=count, num_classes=0).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    backbone = load_backbone(record.tag, weights=tmp_path / "w.pth").eval()
    side = 224 if net == "vit_small" else 64
    values = torch.randint(100, 3000, (2, count, side, side)).float()
    values = values / -150 if key == "s1" else values
    inputs: Any = values.clone()
    for step in entry.transforms.modules():  # without its resizing and cropping
        inputs = step(inputs) if type(step).__name__ == "Normalize" else inputs
    with torch.no_grad():
        expected = model(inputs)
        found = backbone({key: values}).pooled[key]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_file_of_other_bands_than_those_of_its_tag_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = timm.create_model("resnet18", in_chans=12, num_classes=0).state_dict()
    path, tag = tmp_path / "w.pth", "ssl4eo_resnet18.s2_moco"
    torch.save({name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}, path)
    with pytest.raises(WeightsError, match=rf"12 bands of s2, but those .* {tag!r} are for 13"):
        load_backbone(tag, weights=path)
