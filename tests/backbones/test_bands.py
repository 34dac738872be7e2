"""Weights fitted to other bands: equal to the whole model with the missing bands at zero."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from domainssl import export_backbone, load_backbone
from domainssl.backbones.bands import BandChange, BandPolicy, adapt_bands
from domainssl.backbones.base import Backbone
from domainssl.backbones.croma import PUBLISHED_MODALITIES, CROMABackbone, reference_name
from domainssl.backbones.encoders.backbone import EncoderBackbone, EncoderSizes
from domainssl.backbones.encoders.swin import SwinArchitecture
from domainssl.backbones.maestro.backbone import MAESTROBackbone
from domainssl.backbones.maestro.inputs import MAESTROInput
from domainssl.backbones.multi_contrast import ContrastArchitecture, MultiContrastBackbone
from domainssl.backbones.omnisat import OmniSatBackbone
from domainssl.backbones.slide import TITANBackbone
from domainssl.backbones.swin import SwinBackbone
from domainssl.backbones.vit import ViTArchitecture, ViTBackbone
from domainssl.errors import ConfigError, WeightsError
from domainssl.modality import Modality
from domainssl.objectives.croma import CROMA
from domainssl.objectives.mae import MAE

MEANS = (900.0, 1200.0, 1500.0, 2500.0)
STDS = (300.0, 400.0, 500.0, 800.0)


def optical(*bands: str, kind: str = "image", known: bool = True) -> dict[str, Modality]:
    """Bands of the weights, or others; statistics only where asked for."""
    all_bands = dict(zip(("B02", "B03", "B04", "B08"), zip(MEANS, STDS, strict=True), strict=True))
    mean, std = zip(*(all_bands.get(b, (100.0, 50.0)) for b in bands), strict=True)
    s2 = Modality(
        name="s2", kind=kind, channels=bands, value_unit="dn",  # type: ignore[arg-type]
        mean=mean if known else None, std=std if known else None,
        gsd_m=10.0 if kind != "volume" else None,
        spacing_mm=(1.0, 1.0, 1.0) if kind == "volume" else None,
    )  # fmt: skip
    return {"s2": s2}


FULL = ("B02", "B03", "B04", "B08")
FEW = ("B08", "B03")  # another order, too
TINY = ViTArchitecture(width=12, depth=2, heads=2)


def _vit(modalities: dict[str, Modality]) -> Backbone:
    return ViTBackbone(modalities, TINY, patch_size=4)


def _encoder(name: str) -> Any:
    sizes = EncoderSizes(
        width=12, depth=1, heads=2, patch_size=4, features=(4, 8), blocks=(1, 1),
        swin=SwinArchitecture(feature_size=6, depths=(1, 1, 1, 1), heads=(1, 1, 1, 1)),
    )  # fmt: skip
    return lambda modalities: EncoderBackbone(modalities, name, sizes, image_size=32)


def _maestro(modalities: dict[str, Modality]) -> Backbone:
    return MAESTROBackbone(
        modalities, {"s2": MAESTROInput(patch_size=4)}, width=16, depth=2, heads=2, head_dim=8,
        shared_depth=1, normalization="zscore",
    )  # fmt: skip


def _omnisat(modalities: dict[str, Modality]) -> Backbone:
    return OmniSatBackbone(
        modalities, {"s2": 8}, (4, 4), width=16, groups=2,
        fusion={"depth": 1, "heads": 2},
        series={"heads": 2, "widths_in": [8, 16], "widths_out": [16, 16]},
    )  # fmt: skip


def _croma(modalities: dict[str, Modality]) -> Backbone:
    return CROMABackbone(modalities, width=16, depth=2, heads=2, normalization="zscore")


def _swin(modalities: dict[str, Modality]) -> Backbone:
    sizes = SwinArchitecture(feature_size=6, depths=(1, 1, 1, 1), heads=(1, 1, 1, 1), window=2)
    return SwinBackbone(modalities, sizes, "zscore")


def _contrasts(modalities: dict[str, Modality]) -> Backbone:
    return MultiContrastBackbone(
        modalities, ContrastArchitecture(width=24, depth=1, heads=2), 8, "zscore"
    )


CASES: dict[str, tuple[Any, str]] = {
    "vit": (_vit, "image"),
    "vit series": (_vit, "series"),
    "croma": (_croma, "image"),
    "resnet18": (_encoder("resnet18"), "image"),
    "timm vit": (_encoder("vit_tiny_patch16_224"), "image"),
    "transformer": (_encoder("transformer"), "image"),
    "resenc": (_encoder("resenc"), "image"),
    "monai resnet": (_encoder("monai:resnet10"), "volume"),
    "swin": (_swin, "volume"),
    "maestro": (_maestro, "image"),
    "omnisat image": (_omnisat, "image"),
    "omnisat series": (_omnisat, "series"),
    "contrasts": (_contrasts, "volume"),
}


def _values(modality: Modality) -> Tensor:
    """Plausible values of every band, (2, [3,] C, *S)."""
    sizes = {"image": (32, 32), "series": (32, 32), "volume": (32, 32, 32)}[modality.kind]
    dates = (3,) if modality.kind == "series" else ()
    mean, std = (torch.tensor(s).view(-1, *[1] * len(sizes)) for s in (modality.mean, modality.std))
    return mean + std * torch.randn(2, *dates, modality.num_channels, *sizes)


def _batch(modality: Modality, values: Tensor) -> dict[str, Any]:
    batch: dict[str, Any] = {"s2": values}
    if modality.kind == "series":
        batch["s2.dates"] = torch.tensor([[10, 60, 200]] * 2, dtype=torch.int32)
    return batch


def _assert_equal(found: Backbone, batch: dict[str, Any], whole: Backbone, same: Any) -> None:
    ours, theirs = found.encode(found.normalize(batch)), whole.encode(same)
    torch.testing.assert_close(ours.pooled["s2"], theirs.pooled["s2"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.tokens["s2"], theirs.tokens["s2"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", ["subset", "average"])
def test_a_subset_equals_the_whole_model_with_the_other_bands_at_zero(
    case: str, policy: BandPolicy
) -> None:
    build, kind = CASES[case]
    torch.manual_seed(0)
    whole = build(optical(*FULL, kind=kind)).eval()
    few = adapt_bands(whole, optical(*FEW, kind=kind, known=False), policy)
    assert few.modalities["s2"].channels == FEW
    assert few.modalities["s2"].mean == (MEANS[3], MEANS[1])  # the published ones
    assert few.band_changes == (
        BandChange(modality="s2", policy=policy, kept=FEW, dropped=("B02", "B04"), averaged=()),
    )
    assert not few.training

    modality = whole.modalities["s2"]
    values, axis = _values(modality), modality.channel_axis
    same = whole.normalize(_batch(modality, values))
    same["s2"] = same["s2"].clone()
    for dropped in (0, 2):
        same["s2"].select(axis, dropped).zero_()
    picked = values.index_select(axis, torch.tensor([3, 1]))
    _assert_equal(few, _batch(modality, picked), whole, same)


@pytest.mark.parametrize("case", CASES)
def test_a_new_band_acts_as_a_mean_over_all_bands_of_the_weights(case: str) -> None:
    build, kind = CASES[case]
    torch.manual_seed(0)
    whole = build(optical(*FULL, kind=kind)).eval()
    data = optical("B08", "pan", kind=kind)
    few = adapt_bands(whole, data, "average")
    assert few.modalities["s2"].mean == (MEANS[3], 100.0)  # the data know the new band
    assert few.band_changes == (
        BandChange(
            modality="s2", policy="average", kept=("B08",), dropped=("B02", "B03", "B04"),
            averaged=("pan",),
        ),
    )  # fmt: skip
    batch = _batch(data["s2"], _values(data["s2"]))
    x, axis = few.normalize(batch), data["s2"].channel_axis
    first, pan = x["s2"].select(axis, 0), x["s2"].select(axis, 1)
    parts = [pan / 4, pan / 4, pan / 4, first + pan / 4]
    _assert_equal(few, batch, whole, {**x, "s2": torch.stack(parts, axis)})


def test_forms_without_statistics_need_none_of_the_data() -> None:
    whole = ViTBackbone(optical(*FULL), TINY, 4, normalization="scale(10000)").eval()
    few = adapt_bands(whole, optical("B08", "pan", known=False), "average")
    assert few.modalities["s2"].mean is None
    assert torch.equal(few.state_dict()["embed.bias"], whole.state_dict()["embed.bias"])


def test_an_export_is_fitted_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export_backbone(_vit(optical(*FULL)), tmp_path / "whole")
    data = optical(*FEW)
    with pytest.raises(WeightsError, match="expect 4 in the order"):
        load_backbone(tmp_path / "whole", modalities=data)
    with caplog.at_level(logging.WARNING):
        few = load_backbone(tmp_path / "whole", modalities=data, bands="subset")
    assert "s2 (bands: subset): kept B08, B03; dropped B02, B04" in caplog.text
    card = json.loads(export_backbone(few, tmp_path / "few").read_text())
    assert card["provenance"]["bands"] == [
        {"modality": "s2", "policy": "subset", "kept": ["B08", "B03"],
         "dropped": ["B02", "B04"], "averaged": []},
    ]  # fmt: skip
    again = load_backbone(tmp_path / "few", modalities=data)
    assert torch.equal(again.state_dict()["embed.weight"], few.state_dict()["embed.weight"])
    assert load_backbone(tmp_path / "few", modalities=data, bands="subset").band_changes == ()


def test_published_files_are_fitted_where_they_say_their_bands(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = CROMABackbone(PUBLISHED_MODALITIES, width=32, depth=2, heads=4)
    torch.save(whole.to_reference(), tmp_path / "croma.pt")
    bands = ("B04", "B03", "B02")
    data = {"s2": Modality(name="s2", kind="image", channels=bands, value_unit="dn")}
    few = load_backbone(
        "croma_tiny", weights=tmp_path / "croma.pt", modalities=data, bands="subset"
    )
    assert list(few.modalities) == ["s2"]
    published = PUBLISHED_MODALITIES["s2"]
    assert few.modalities["s2"].mean == tuple(
        pytest.approx(published.mean[published.channels.index(b)])  # type: ignore[index]
        for b in bands
    )
    patches = whole.state_dict()["optical_encoder.embed.weight"].unflatten(1, (12, 64))
    wanted = patches[:, [published.channels.index(b) for b in bands]].flatten(1)
    assert torch.equal(few.state_dict()["optical_encoder.embed.weight"], wanted)


def test_a_file_without_bands_is_fitted_with_a_description_of_its_bands(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = ViTBackbone(optical(*FULL), TINY, patch_size=4)
    whole.modalities["s2"] = Modality.of({**whole.modalities["s2"].to_dict(), "size": (16, 16)})
    save_file(whole.to_reference(), tmp_path / "vit.safetensors")
    asked: dict[str, Any] = {
        "weights": tmp_path / "vit.safetensors", "modalities": optical(*FEW), "bands": "subset",
    }  # fmt: skip
    arguments = {"architecture": vars(TINY), "patch_size": 4, "image_size": 16}
    with pytest.raises(WeightsError, match="do not say which bands .* arguments={'modalities'"):
        load_backbone("vit_tiny", **asked, arguments=arguments)
    few = load_backbone("vit_tiny", **asked, arguments={**arguments, "modalities": optical(*FULL)})
    patches = whole.state_dict()["embed.weight"].unflatten(1, (4, 16))
    assert torch.equal(few.state_dict()["embed.weight"], patches[:, [3, 1]].flatten(1))


def test_what_cannot_be_fitted_is_refused_with_its_reason() -> None:
    whole = _vit(optical(*FULL))
    with pytest.raises(ConfigError, match="'some' is not one of strict, subset, average"):
        adapt_bands(whole, optical(*FEW), "some")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pass modalities="):
        load_backbone("vit_tiny", weights="x.pt", bands="subset")
    with pytest.raises(WeightsError, match=r"and B8 is none of them .*Did you mean 'B08'"):
        adapt_bands(whole, optical("B8"), "subset")
    with pytest.raises(WeightsError, match="needs mean and std of the new bands pan"):
        adapt_bands(whole, optical("B08", "pan", known=False), "average")
    other = {"s2": Modality(name="s2", kind="image", channels=FEW, value_unit="reflectance")}
    with pytest.raises(WeightsError, match="value_unit is 'reflectance'"):
        adapt_bands(whole, other, "subset")
    with pytest.raises(WeightsError, match="no such modality"):
        adapt_bands(whole, {"s1": {"kind": "image", "channels": ["VV"], "value_unit": "db"}})
    features = Modality(name="tiles", kind="features", channels=("a", "b"), value_unit="arbitrary")
    slide = TITANBackbone({"tiles": features}, width=8, depth=1, heads=2, normalization="identity")
    with pytest.raises(WeightsError, match="components of the features of one tile encoder"):
        adapt_bands(slide, {"tiles": {**features.to_dict(), "channels": ["a"]}})
    grouped = MAESTROBackbone(
        optical(*FULL),
        {"s2": MAESTROInput(patch_size=4, token_bands=[["B02", "B03", "B04"], ["B08"]])},
        width=16, depth=2, heads=2, shared_depth=1,
    )  # fmt: skip
    with pytest.raises(WeightsError, match="groups of bands"):
        adapt_bands(grouped, optical(*FEW))


def test_a_run_starts_from_weights_for_more_bands(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    whole = ViTBackbone(optical(*FULL), TINY, patch_size=4)
    export_backbone(whole, tmp_path)
    encoding = {"size": "tiny", "patch_size": 4, "weights": str(tmp_path), "bands": "subset"}
    objective = MAE(optical(*FEW), encoding=encoding, context_size=16)  # type: ignore[arg-type]
    assert objective.backbone.training
    assert objective.arguments["encoding"]["bands"] == "subset"
    patches = whole.state_dict()["embed.weight"].unflatten(1, (4, 16))
    assert torch.equal(objective.backbone.embed.weight, patches[:, [3, 1]].flatten(1))


def test_decoders_of_a_published_file_start_anew_for_other_bands(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    sizes = {"architecture": {"width": 16, "depth": 2, "heads": 2}, "patch_size": 8}
    whole = CROMABackbone(PUBLISHED_MODALITIES, width=16, depth=2, heads=2)
    own = {n: t for n, t in whole.state_dict().items() if not n.startswith("normalizer.")}
    content = {reference_name(name, "pretraining"): tensor for name, tensor in own.items()}
    torch.save({**content, "decoder.mask_token": torch.ones(1, 1, 16)}, tmp_path / "whole.pt")
    bands = ("B02", "B03", "B04")
    s2 = Modality(name="s2", kind="image", channels=bands, value_unit="dn", gsd_m=10.0)
    encoding = {**sizes, "weights": str(tmp_path / "whole.pt"), "bands": "subset"}
    few = CROMA(
        {"s1": PUBLISHED_MODALITIES["s1"], "s2": s2},
        encoding=encoding,  # type: ignore[arg-type]
        context_size=16,
    )
    assert "decoder and heads are for other bands and start anew" in caplog.text
    assert few.backbone.modalities["s2"].channels == bands
    radar = "radar_encoder.embed.weight"
    assert torch.equal(few.backbone.state_dict()[radar], whole.state_dict()[radar])
