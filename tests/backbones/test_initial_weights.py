"""Weights that an objective starts from: ours, those of others, and the wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from domainssl.backbones.card import export_backbone
from domainssl.backbones.encoders.backbone import EncoderBackbone
from domainssl.backbones.registry import load_initial
from domainssl.backbones.vit import ViTArchitecture, ViTBackbone
from domainssl.errors import WeightsError
from domainssl.modality import Modality

RGB = {"rgb": Modality(name="rgb", kind="image", channels=("r", "g", "b"), value_unit="rgb8")}
SIZES = {
    "architecture": ViTArchitecture(width=12, depth=1, heads=2),
    "patch_size": 4,
    "normalization": "scale(255)",
}


@pytest.fixture
def own(tmp_path: Path) -> tuple[ViTBackbone, Path]:
    torch.manual_seed(0)
    backbone = ViTBackbone(RGB, **SIZES, image_size=16)  # type: ignore[arg-type]
    export_backbone(backbone, tmp_path / "own")
    return backbone, tmp_path / "own"


def test_an_export_comes_back_in_training_mode_and_without_content_of_others(
    own: tuple[ViTBackbone, Path],
) -> None:
    backbone, path = own
    loaded, content = load_initial(
        ViTBackbone, path, None, modalities=RGB, arguments=SIZES, same=("modalities",)
    )
    assert loaded.training
    assert content == {}
    values = loaded.state_dict()
    assert all(torch.equal(tensor, values[n]) for n, tensor in backbone.state_dict().items())


def test_another_class_or_another_patch_is_refused(own: tuple[ViTBackbone, Path]) -> None:
    _, path = own
    with pytest.raises(WeightsError, match="holds a ViTBackbone, expected a EncoderBackbone"):
        load_initial(EncoderBackbone, path, None, modalities=RGB, arguments={})
    wanted = {**SIZES, "patch_size": (8, 8)}
    with pytest.raises(WeightsError, match=r"patch_size \(4, 4\), expected \(8, 8\)"):
        load_initial(
            ViTBackbone, path, None, modalities=RGB, arguments=wanted, same=("patch_size",)
        )


def test_files_of_others_need_the_name_of_a_backbone(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=r"encoding.weights: .*other.*they are for decur_"):
        load_initial(EncoderBackbone, path, None, modalities=RGB, arguments={})
    with pytest.raises(WeightsError, match="'vit_bose' is none. Did you mean 'vit_base'"):
        load_initial(ViTBackbone, path, "vit_bose", modalities=RGB, arguments=SIZES)
