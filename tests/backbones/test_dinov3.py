"""DINOv3 of satellite images gives what timm gives, from its files and the official ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor

from domainssl import export_backbone, load_backbone
from domainssl.backbones.dinov3 import SATELLITE_ENCODERS
from domainssl.errors import WeightsError

SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 2}  # the published width takes seconds


def timm_model(name: str) -> Any:
    torch.manual_seed(0)
    spec = SATELLITE_ENCODERS[name]
    model: Any = timm.create_model(spec.model, **{**spec.arguments, **SMALL}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # layer scale and biases start near zero
            parameter += 0.2 * torch.randn(parameter.shape)
    return model


def images(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, size, size), generator=generator).float()


@pytest.mark.parametrize("name", SATELLITE_ENCODERS)
def test_features_are_timms(name: str, tmp_path: Path) -> None:
    reference, spec = timm_model(name), SATELLITE_ENCODERS[name]
    torch.save(reference.state_dict(), tmp_path / "a.pt")
    loaded = load_backbone(name, weights=tmp_path / "a.pt", arguments={"changes": SMALL})
    published = get_pretrained_cfg(f"{spec.model}.sat493m")
    assert published is not None and (spec.mean, spec.std) == (published.mean, published.std)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (published.mean, published.std))
    for size in (64, 96):
        x = images(size)
        with torch.no_grad():
            found = loaded({"aerial": x})
            expected = reference.forward_features((x / 255 - mean) / std)
        near = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(found.pooled["aerial"], expected[:, 0], **near)
        torch.testing.assert_close(found.tokens["aerial"], expected[:, 5:], **near)
        assert found.grid["aerial"] == (size // 16, size // 16)


def test_the_card_holds_the_normalisation(tmp_path: Path) -> None:
    name = "dinov3_sat_large"
    torch.save(timm_model(name).state_dict(), tmp_path / "a.pt")
    loaded = load_backbone(name, weights=tmp_path / "a.pt", arguments={"changes": SMALL})
    export_backbone(loaded, tmp_path / "out")
    card = json.loads((tmp_path / "out" / "backbone.json").read_text())
    (aerial,) = [m for m in card["modalities"].values() if m["value_unit"] == "rgb8"]
    assert aerial["mean"] == pytest.approx([109.65, 104.805, 75.48])
    assert aerial["std"] == pytest.approx([54.315, 39.78, 36.465]) and aerial["gsd_m"] == 0.6
    again, x = load_backbone(tmp_path / "out"), {"aerial": images(32)}
    with torch.no_grad():
        assert torch.equal(again(x).pooled["aerial"], loaded(x).pooled["aerial"])


def official(state: dict[str, Tensor], bias: bool) -> dict[str, Tensor]:
    """Return timm's tensors under the names of the official files."""
    names = {
        "reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma",
        "mlp.fc1_g.": "mlp.w1.", "mlp.fc1_x.": "mlp.w2.",
    }  # fmt: skip
    if any("fc1_g" in name for name in state):
        names["mlp.fc2."] = "mlp.w3."
    found: dict[str, Tensor] = {
        "mask_token": torch.zeros(1, 64),
        "local_cls_norm.bias": torch.ones(64),
    }
    for name, tensor in state.items():
        if name.endswith((".q_bias", ".v_bias")):
            continue
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        found[name] = tensor
    for block in range(SMALL["depth"]):
        stem = f"blocks.{block}.attn."
        parts = torch.zeros(3, 64)
        if bias:
            parts[0], parts[2] = state[f"{stem}q_bias"], state[f"{stem}v_bias"]
            parts[1] = torch.nan  # masked
        found |= {f"{stem}qkv.bias": parts.flatten(), f"{stem}qkv.bias_mask": torch.ones(192)}
    return found


@pytest.mark.parametrize("name", SATELLITE_ENCODERS)
def test_official_files_give_the_same_features(name: str, tmp_path: Path) -> None:
    state = timm_model(name).state_dict()
    torch.save(state, tmp_path / "timm.pt")
    torch.save(official(state, "qkvb" in name), tmp_path / "official.pt")
    x, given = {"aerial": images(32)}, {"changes": SMALL}
    first, second = (
        load_backbone(name, weights=tmp_path / f"{file}.pt", arguments=given)
        for file in ("timm", "official")
    )
    with torch.no_grad():
        assert torch.equal(first(x).pooled["aerial"], second(x).pooled["aerial"])


def test_a_bias_that_the_encoder_has_no_place_for_is_refused(tmp_path: Path) -> None:
    state = timm_model("dinov3_sat_large_qkvb").state_dict()
    torch.save(official(state, bias=True), tmp_path / "a.pt")
    with pytest.raises(WeightsError, match="dinov3_sat_large_qkvb"):
        load_backbone("dinov3_sat_large", weights=tmp_path / "a.pt", arguments={"changes": SMALL})
