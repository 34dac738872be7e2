"""BEiT: maps for decoders, and which released files load."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from domainssl import load_backbone
from domainssl.backbones.beit import BEiTArchitecture, BEiTBackbone
from domainssl.backbones.pretrained import PRETRAINED
from domainssl.errors import WeightsError
from domainssl.modality import Modality
from domainssl.sensors import L1C_BANDS

IMAGE = {
    "m": Modality(
        name="m", kind="image", channels=("a", "b"), value_unit="arbitrary", size=(16, 16)
    )
}


def made(**architecture: Any) -> BEiTBackbone:
    torch.manual_seed(0)
    sizes = BEiTArchitecture(
        **{"width": 24, "depth": 4, "heads": 2, "init_values": 0.5, **architecture}
    )
    return BEiTBackbone(IMAGE, sizes, 4, 16, "identity").eval()


def test_the_pyramid_has_the_patches_of_four_depths() -> None:
    backbone, x = made(depth=8), {"m": torch.randn(2, 2, 16, 24)}
    with torch.no_grad():
        maps = backbone.feature_pyramid(x)["m"]
        _, ends, _ = backbone.encode_layers(x)
        last = backbone.feature_maps(x)["m"]
    assert [tuple(m.shape) for m in maps] == [(2, 24, 4, 6)] * 4
    assert torch.equal(maps[3], last)
    for found, block in zip(maps[:3], (2, 4, 6), strict=True):
        assert torch.equal(found.flatten(2).transpose(1, 2), ends[block])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("wrapper", ["model", "module", None])
def test_released_layouts_load(shared: bool, wrapper: str | None) -> None:
    source = made(shared_bias=shared)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    state: dict[str, Tensor] = dict(source.to_reference())
    state["lm_head.weight"], state["lm_head.bias"] = torch.zeros(24, 24), torch.zeros(24)
    where = "rel_pos_bias." if shared else "blocks.0.attn."
    state[f"{where}relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    variant: dict[str, Any] = {
        "architecture": {"width": 24, "depth": 4, "heads": 2},
        "patch_size": 4, "image_size": 16, "normalization": "identity",
    }  # fmt: skip
    content: dict[str, Any] = state if wrapper is None else {wrapper: state, "epoch": 99}
    loaded, _ = BEiTBackbone.from_reference(content, variant, IMAGE)
    x = {"m": torch.randn(2, 2, 16, 16)}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x).pooled["m"], source(x).pooled["m"])
    del state["blocks.1.gamma_2"]
    with pytest.raises(WeightsError, match=r"blocks\.1\.gamma_2"):
        BEiTBackbone.from_reference(content, variant, IMAGE)


def test_the_released_weights_say_what_goes_in(tmp_path: Path) -> None:
    sizes = {"architecture": {"width": 24, "depth": 4, "heads": 2}, "patch_size": 4}
    tag, image = "beit_small.ssl4eo_s2_data2vec", {"image_size": 16}
    known = {n: m for n, m in PRETRAINED[tag].arguments["modalities"]["s2"].items() if n != "size"}
    s2 = Modality(name="s2", **known)
    state = BEiTBackbone({"s2": s2}, **sizes, **image, normalization="identity").to_reference()
    torch.save({"model": state, "epoch": 99}, tmp_path / "w.pth")
    asked: dict[str, Any] = {"weights": tmp_path / "w.pth", "arguments": {**sizes, **image}}
    loaded = load_backbone(tag, **asked)
    assert loaded.modalities["s2"].channels == L1C_BANDS
    assert str(loaded.normalizer.forms["s2"]) == "window(0,10000)"
    turned = dataclasses.replace(s2, channels=L1C_BANDS[::-1])
    with pytest.raises(WeightsError, match="s2: the same bands in another order"):
        load_backbone(tag, **asked, modalities={"s2": turned})
