"""MAESTRO: missing dates and sensors, released files, and what the documentation says."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from grouped import grouped
from torch import Tensor

from domainssl import load_backbone
from domainssl.backbones.maestro.backbone import MAESTROBackbone
from domainssl.backbones.maestro.files import reference_name
from domainssl.errors import ConfigError, WeightsError
from domainssl.modality import Modality
from domainssl.nn.structured import hide_lowest
from domainssl.objectives.base import Generators
from domainssl.objectives.maestro import MAESTRO, MAESTROArchitecture

SIZES = MAESTROArchitecture(
    width=16, depth=2, heads=2, head_dim=8, ffn_ratio=2, decoder_width=16, decoder_depth=1,
    decoder_heads=2, decoder_head_dim=8,
)  # fmt: skip
INPUTS: dict[str, Any] = {
    "aerial": {"patch_size": 4},
    "s2": {"patch_size": 2, "token_bands": [["B4", "B2"], ["B8"]]},
    "s1_asc": {"patch_size": 2, "group": "s1"},
    "s1_des": {"patch_size": 2, "group": "s1"},
}


def modalities() -> dict[str, Any]:
    return {
        "aerial": Modality(
            name="aerial", kind="image", channels=("R", "G"), value_unit="arbitrary", size=(12, 12)
        ),
        "s2": Modality(
            name="s2",
            kind="series",
            channels=("B2", "B4", "B8"),
            value_unit="arbitrary",
            size=(6, 6),
        ),
        "s1_asc": Modality(
            name="s1_asc", kind="series", channels=("VV", "VH"), value_unit="arbitrary", size=(6, 6)
        ),
        "s1_des": Modality(
            name="s1_des", kind="series", channels=("VV", "VH"), value_unit="arbitrary", size=(6, 6)
        ),
    }


def build(fusion: str = "group", **changes: Any) -> MAESTRO:
    torch.manual_seed(0)
    settings = {"architecture": SIZES, "fusion": fusion, **changes}
    if fusion in ("mod", "group"):
        settings.setdefault("shared_depth", 1)
    return MAESTRO(modalities(), **grouped(inputs=INPUTS, **settings)).eval()


def batch(items: int = 3, dates: int = 4) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    found: dict[str, Any] = {}
    for name, m in modalities().items():
        frames = [dates] if m.kind == "series" else []
        found[name] = torch.randn(items, *frames, m.num_channels, *m.size, generator=g)
        days = torch.arange(18000, 18000 + 40 * dates, 40, dtype=torch.int32)
        found[f"{name}.dates"] = days.expand(items, -1).clone() if frames else days[:1].expand(3)
    return found


def padded(x: dict[str, Any], filler: float, frames: int = 2) -> dict[str, Any]:
    out = dict(x)
    for name, m in modalities().items():
        if m.kind == "series":
            values, days = x[name], x[f"{name}.dates"]
            extra = torch.full_like(values[:, :1], filler).repeat(1, frames, 1, 1, 1)
            out[name] = torch.cat([values, extra], dim=1)
            out[f"{name}.dates"] = torch.cat([days, days[:, :1].expand(-1, frames)], dim=1)
            real = torch.ones(len(values), values.shape[1] + frames, dtype=torch.bool)
            real[:, values.shape[1] :] = False
            out[f"{name}.frames"] = real
    return out


FUSIONS = ["shared", "monotemp", "mod", "group"]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_padded_dates_change_no_feature(fusion: str) -> None:
    backbone = build(fusion).backbone
    with torch.no_grad():
        plain = backbone(batch())
        for filler in (0.0, 1e4):
            more = backbone(padded(batch(), filler))
            for name, pooled in plain.pooled.items():
                torch.testing.assert_close(more.pooled[name], pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_padded_dates_are_never_hidden_and_their_filler_never_counts(fusion: str) -> None:
    model = build(fusion)
    one, other = padded(batch(), 0.0), padded(batch(), 1e4)
    generator = torch.Generator().manual_seed(0)
    draws = model.draw(one, Generators(generator, generator))
    for name, raster in model.backbone.prepare(one).items():
        assert not (draws.hidden[name] & ~raster.token_valid).any()
        assert draws.hidden[name].any()
    a, b = model(one, draws).losses, model(other, draws).losses
    for name, loss in a.items():
        assert loss.isfinite()
        assert torch.equal(loss, b[name]), name


def test_masks_are_drawn_without_preparing_values(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = build(), batch()
    expected = {n: r.token_valid for n, r in model.backbone.prepare(given).items()}
    monkeypatch.setattr(MAESTROBackbone, "prepare", None)
    for name, layout in model.backbone.layouts(given).items():
        assert torch.equal(layout.token_valid, expected[name])
    generator = torch.Generator().manual_seed(0)
    model.draw(given, Generators(generator, generator))


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_images_are_resized_before_elevation_becomes_depth(mode: Any) -> None:
    dem = Modality(
        name="dem",
        kind="image",
        channels=("surface", "ground"),
        value_unit="arbitrary",
        size=(6, 6),
    )
    inputs = {"dem": {"patch_size": 2, "image_size": 4, "interpolation": mode, "is_elevation": 1}}
    backbone = MAESTROBackbone({"dem": dem}, inputs, width=16, depth=1, heads=1, shared_depth=0)
    x = torch.rand(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(1, 6, 6, dtype=torch.bool)
    valid[0, 0, 1] = False
    raster = backbone.prepare({"dem": x, "dem.valid": valid})["dem"]
    small = torch.nn.functional.interpolate(x, (4, 4), mode=mode)[0]
    # rows and columns of the result stand at 0.25, 1.75, 3.25 and 4.75 of the six
    hit = [(0, 0), (0, 1)] if mode == "bilinear" else [(0, 1)]
    assert (~raster.valid[0, 0]).nonzero().tolist() == [list(place) for place in hit]
    expected = torch.stack([small[0], 30 * (small[0] - small[1])])
    expected[:, ~raster.valid[0, 0]] = 0
    torch.testing.assert_close(raster.values[0, 0], expected)
    with pytest.raises(ConfigError, match=r"inputs.dem.interpolation: got 'cubic'"):
        MAESTROBackbone({"dem": dem}, {"dem": {"patch_size": 2, "interpolation": "cubic"}})


def test_an_absent_modality_changes_no_feature_of_the_others() -> None:
    backbone, given = build().backbone, batch()
    alone = {k: v for k, v in given.items() if not k.startswith("s1_des")}
    marked = {**given, "s1_des.present": torch.zeros(3, dtype=torch.bool)}
    with torch.no_grad():
        a, b = backbone(alone), backbone(marked)
    for name in ("aerial", "s2", "s1_asc", "joint"):
        torch.testing.assert_close(a.pooled[name], b.pooled[name], rtol=1e-4, atol=1e-5)


def test_kept_tokens_equal_those_of_the_same_mask() -> None:
    model, given = build(), batch()
    generator = torch.Generator().manual_seed(0)
    backbone = model.backbone
    draws = model.draw(given, Generators(generator, generator))
    x = backbone.normalize(given)
    rasters = backbone.prepare(x)
    with torch.no_grad():
        short = backbone.encode_visible(rasters, draws.hidden, draws.kept)
        long = backbone.encode_visible(rasters, draws.hidden)
    for name, tokens in short.tokens.items():
        places = short.order[name].unsqueeze(-1).expand_as(tokens)
        expected = long.tokens[name].gather(1, places)
        seen = short.is_seen[name]
        torch.testing.assert_close(tokens[seen], expected[seen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ties", ["random", "ordered"])
def test_exactly_the_share_is_hidden_and_structures_go_first(ties: Any) -> None:
    noise = torch.rand(50, 20, generator=torch.Generator().manual_seed(0))
    structure = torch.zeros(50, 20, dtype=torch.bool)
    structure[:25, :5], structure[25:, :18] = True, True
    valid = torch.ones(50, 20, dtype=torch.bool)
    hidden = hide_lowest(noise, structure, valid, 0.75, ties)
    assert (hidden.sum(1) == 15).all()
    assert (hidden[:25] & structure[:25]).sum(1).eq(5).all()
    assert not (hidden[25:] & ~structure[25:]).any()


def test_a_token_hides_only_its_own_bands_in_the_order_of_the_groups() -> None:
    model = build()
    raster = model.backbone.prepare(batch())["s2"]
    hidden = torch.zeros_like(raster.token_valid)
    hidden[:, 0] = True  # first band group, B4 and B2
    counted = model.counted(hidden, raster, "s2")
    assert counted[0, 0, 0].tolist() == [True, True, False]
    assert not counted[:, 1:].any()
    expected = batch()["s2"][:, :, [1, 0, 2]]
    torch.testing.assert_close(raster.values, expected)


def released(model: MAESTRO) -> dict[str, Tensor]:
    state = {reference_name(n): t for n, t in model.state_dict().items()}
    return {f"model.{n}": t for n, t in state.items() if not n.startswith("normalizer")}


def checkpoint(path: Path, model: MAESTRO, ema: MAESTRO) -> Path:
    """Write a file as the released code does, with an object of a class of its own."""
    module = types.ModuleType("maestro_conf_of_a_test")

    class MaskConfig:
        def __init__(self) -> None:
            self.mask_ratio = 0.75

    MaskConfig.__module__, MaskConfig.__qualname__ = module.__name__, "MaskConfig"
    module.MaskConfig = MaskConfig  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    try:
        averaged = {n.replace("model.", "ema_model.", 1): t for n, t in released(ema).items()}
        state = {**released(model), **averaged}
        torch.save({"state_dict": state, "hyper_parameters": {"mask": MaskConfig()}}, path)
    finally:
        del sys.modules[module.__name__]
    return path


def test_a_released_checkpoint_is_read_without_its_classes(tmp_path: Path) -> None:
    model, ema = build(), build()
    with torch.no_grad():
        for parameter in ema.parameters():
            parameter.add_(0.1)
    path = checkpoint(tmp_path / "last.ckpt", model, ema)
    arguments = {"heads": 2, "head_dim": 8, "ffn_ratio": 2, "depth": 2, "width": 16}
    for use_ema, wanted in ((False, model), (True, ema)):
        chosen = {**arguments, "use_ema": use_ema, "position_cells": 6, "normalization": "identity"}
        loaded = load_backbone(
            "maestro_base", weights=path, modalities=modalities(),
            arguments={**chosen, "inputs": {"s2": INPUTS["s2"]}},
        )  # fmt: skip
        assert isinstance(loaded, MAESTROBackbone)
        assert loaded.inputs["s1_des"].group == "s1"
        for (name, a), b in zip(
            loaded.state_dict().items(), wanted.backbone.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name
    again = build(weights=str(path), reference=True, normalization="identity")
    for (name, a), b in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_file_of_another_method_is_refused(tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.ckpt")
    with pytest.raises(WeightsError, match=r"no MAESTRO weights file.*layer\.weight"):
        load_backbone("maestro_base", weights=tmp_path / "other.ckpt", modalities=modalities())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fusion": "monotemp", "shared_depth": 1}, "shared_depth: 0"),
        ({"masking": {"dates": 1.0}}, r"masking\.dates: got 1\.0"),
        ({"date_reference": "areal"}, "Did you mean 'aerial'"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(**changes)


def test_published_sizes_have_the_published_number_of_parameters() -> None:
    sizes = {"aerial": (4, 300), "s2": (10, 6), "s1_asc": (2, 6), "s1_des": (2, 6)}
    found = {
        n: Modality(
            name=n,
            kind="image" if n == "aerial" else "series",
            channels=tuple(map(str, range(c))),
            value_unit="arbitrary",
            size=(s, s),
        )
        for n, (c, s) in sizes.items()
    }
    inputs: dict[str, Any] = {**INPUTS, "aerial": {"patch_size": 20}, "s2": {"patch_size": 2}}
    model = MAESTRO(dict(found), **grouped(inputs=inputs, size="tiny"))
    head = 192 + 4 * 192 + 2 * 192 * 192 + 15 * 192 + 15
    assert sum(p.numel() for p in model.parameters()) == 15_960_455 - head
