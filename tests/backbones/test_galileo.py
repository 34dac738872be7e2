"""Galileo: any of its sensors, dates and patches, and files of its released layout."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from domainssl import load_backbone
from domainssl.backbones.card import export_backbone
from domainssl.backbones.galileo.backbone import GalileoBackbone
from domainssl.backbones.galileo.groups import PUBLISHED_GROUPS, PUBLISHED_MODALITIES, location_xyz
from domainssl.errors import ConfigError, DataError, WeightsError

SIZES = {"width": 32, "depth": 2, "heads": 4, "ffn_ratio": 2.0, "max_patch_size": 4}
DAYS = torch.tensor([[0, 31, 59], [200, 230, 260]], dtype=torch.int32)  # Jan Feb Mar, Jul Aug Sep
SIDE = 8


def backbone(**more: Any) -> GalileoBackbone:
    torch.manual_seed(0)
    built = GalileoBackbone(PUBLISHED_MODALITIES, architecture=SIZES, patch_size=2, **more)
    for name, parameter in built.named_parameters():
        if name.endswith("channel_embed"):  # zero at first, and then groups could be exchanged
            torch.nn.init.normal_(parameter)
    return built.eval()


def batch(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name in names:
        modality = PUBLISHED_MODALITIES[name]
        side = 1 if name in ("era5", "terraclimate", "viirs") else SIDE
        shape = {
            "series": (2, 3, modality.num_channels, side, side),
            "image": (2, modality.num_channels, side, side),
            "table": (2, modality.num_channels),
        }[modality.kind]
        channels = [1] * len(shape)
        channels[modality.channel_axis] = -1
        mean = torch.tensor(modality.mean or (0.0,)).view(channels)
        std = torch.tensor(modality.std or (1.0,)).view(channels)
        found[name] = torch.randn(shape, generator=generator) * std + mean
        if modality.kind == "series":
            found[f"{name}.dates"] = DAYS
    return found


def test_the_released_encoders_have_the_published_sizes() -> None:
    published = {"galileo_nano": (1_037_856, 106), "galileo_tiny": (5_705_520, 234)}
    published |= {"galileo_base": (86_523_072, 234)}
    with torch.device("meta"):
        for name, (count, entries) in published.items():
            found = GalileoBackbone(PUBLISHED_MODALITIES, **GalileoBackbone.variants[name])
            assert sum(p.numel() for p in found.encoder.parameters()) == count
            assert len(found.to_reference()) == entries


def test_files_of_the_released_layout_load_by_name(tmp_path: Path) -> None:
    made = backbone()
    state = {n.replace("blocks.", "blocks.backbone.", 1): t for n, t in made.to_reference().items()}
    torch.save(state, tmp_path / "encoder.pt")
    arguments = {"architecture": SIZES, "patch_size": 2}
    data = {name: PUBLISHED_MODALITIES[name] for name in ("s2", "era5")}
    loaded = load_backbone(
        "galileo_nano", weights=tmp_path / "encoder.pt", modalities=data, arguments=arguments
    )
    x = batch("s2", "era5")
    assert torch.equal(loaded(x).pooled["joint"], made(x).pooled["joint"])
    turned = dataclasses.replace(data["s2"], channels=data["s2"].channels[::-1])
    with pytest.raises(WeightsError, match="the same bands in another order"):
        load_backbone(
            "galileo_nano", weights=tmp_path / "encoder.pt", modalities={"s2": turned},
            arguments=arguments,
        )  # fmt: skip
    with pytest.raises(WeightsError, match="The file has 2 blocks and kernels of .4. pixels"):
        load_backbone("galileo_nano", weights=tmp_path / "encoder.pt")
    with pytest.raises(WeightsError, match=r"only in the backbone .*'NDVI'"):
        left = {n: t for n, t in state.items() if ".NDVI." not in n}
        torch.save(left, tmp_path / "less.pt")
        load_backbone("galileo_nano", weights=tmp_path / "less.pt", arguments=arguments)


def test_an_export_gives_the_same_features(tmp_path: Path) -> None:
    made = backbone()
    export_backbone(made, tmp_path / "out")
    x = batch(*PUBLISHED_MODALITIES)
    assert torch.equal(load_backbone(tmp_path / "out")(x).pooled["joint"], made(x).pooled["joint"])


def test_raw_values_become_the_inputs_of_the_groups() -> None:
    made, x = backbone(), batch(*PUBLISHED_MODALITIES)
    x["latlon"] = torch.tensor([[0.0, 90.0], [45.0, -120.0]])
    x["s2"][0, 0, :, 0, 0] = 0.0  # no light: no difference of bands
    out = made.normalize(x)
    values = {g.name: made._values(g, out) for g in made.groups}
    b8, b4 = x["s2"][:, :, 6:7], x["s2"][:, :, 2:3]
    ndvi = torch.where(b8 + b4 > 0, (b8 - b4) / (b8 + b4), 0.0)
    torch.testing.assert_close(values["NDVI"], ndvi)
    assert float(values["NDVI"][0, 0, 0, 0, 0]) == 0.0
    red_edge = PUBLISHED_MODALITIES["s2"]
    assert red_edge.mean and red_edge.std
    shift = torch.tensor(red_edge.mean[3:6]) - 2 * torch.tensor(red_edge.std[3:6])
    expected = (x["s2"][:, :, 3:6] - shift.view(3, 1, 1)) / (
        4 * torch.tensor(red_edge.std[3:6]).view(3, 1, 1)
    )
    torch.testing.assert_close(values["S2_Red_Edge"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values["WC"], x["world_cereal"] / 100)
    torch.testing.assert_close(values["DW_static"], x["dynamic_world"].mean((2, 3)))
    torch.testing.assert_close(values["location"], location_xyz(x["latlon"]))
    torch.testing.assert_close(values["LS"], (x["landscan"] + 2120) / 4618)
    assert values["ERA5"].shape == (2, 3, 2)


@pytest.mark.parametrize(
    "names", [("era5", "viirs"), ("s2",), ("dem", "latlon"), ("s1", "s2", "era5"), ("landscan",)]
)
def test_any_modalities_are_enough(names: tuple[str, ...]) -> None:
    made = backbone()
    with torch.no_grad():
        features = made(batch(*names))
    assert set(features.tokens) == {*names, "joint"}
    on_grid = {"s1", "s2", "dem"} & set(names)
    assert features.grid["joint"] == ((4, 4) if on_grid else (1,))
    for name, tokens in features.tokens.items():
        assert tokens.shape == (2, features.coords[name].shape[0], 32)
        assert torch.isfinite(tokens).all() and features.token_valid[name].all()
    if not on_grid:  # what has no place is the mean of all visible tokens
        torch.testing.assert_close(features.tokens["joint"][:, 0], features.pooled["joint"])


def test_an_absent_modality_is_one_that_was_left_out() -> None:
    made, x = backbone(), batch("s1", "s2", "era5")
    x["s1.present"] = torch.tensor([True, False])
    with torch.no_grad():
        both, without = made(x), made(batch("s1", "s2", "era5") | {"s1.present": x["s1.present"]})
        alone = made({n: v[1:] for n, v in x.items() if not n.startswith("s1")})
    assert torch.equal(both.pooled["joint"], without.pooled["joint"])
    torch.testing.assert_close(both.pooled["joint"][1:], alone.pooled["joint"])
    assert not both.token_valid["s1"][1].any() and both.token_valid["s1"][0].all()
    x["s1"][1] = 1e4  # what is not there is not looked at
    assert torch.equal(made(x).pooled["joint"], both.pooled["joint"])


def test_invalid_patches_and_padded_dates_are_not_seen() -> None:
    made, x = backbone(), batch("s2")
    x["s2.valid"] = torch.ones(2, 3, SIDE, SIDE, dtype=torch.bool)
    x["s2.valid"][0, :, :2, :2] = False
    x["s2.frames"] = torch.tensor([[True, True, True], [True, True, False]])
    with torch.no_grad():
        features = made(x)
        changed = {**x, "s2": x["s2"].clone()}
        changed["s2"][0, :, :, :2, :2] = torch.nan
        changed["s2"][1, 2] = 9999.0
        assert torch.equal(made(changed).pooled["joint"], features.pooled["joint"])
        short = made({"s2": x["s2"][1:, :2], "s2.dates": DAYS[1:, :2]})
    assert features.token_valid["s2"][0].tolist() == [False] + [True] * 15
    torch.testing.assert_close(short.pooled["joint"], features.pooled["joint"][1:])


def test_one_date_and_images_of_it_are_the_same() -> None:
    made, x = backbone(), batch("s2")
    images = {**PUBLISHED_MODALITIES}
    images["s2"] = dataclasses.replace(images["s2"], kind="image")
    other = GalileoBackbone(images, architecture=SIZES, patch_size=2).eval()
    other.load_state_dict(made.state_dict())
    with torch.no_grad():
        series = made({"s2": x["s2"][:, :1], "s2.dates": DAYS[:, :1]})
        image = other({"s2": x["s2"][:, 0], "s2.dates": DAYS[:, 0]})
        later = other({"s2": x["s2"][:, 0], "s2.dates": DAYS[:, 0] + 180})
    assert torch.equal(series.tokens["joint"], image.tokens["joint"])
    assert not torch.allclose(later.pooled["joint"], image.pooled["joint"])  # months count


def test_patches_of_other_sizes_and_rectangles() -> None:
    made, x = backbone(), batch("s2")
    made.patch_size = 4
    with torch.no_grad():
        features = made({"s2": x["s2"][..., :4], "s2.dates": DAYS})
    assert features.grid["s2"] == (2, 1)
    made.patch_size = 5
    with pytest.raises(ConfigError, match="expected 1 to 4 pixels"):
        made({"s2": torch.zeros(1, 1, 10, 5, 5), "s2.dates": DAYS[:1, :1]})


def test_hidden_groups_do_not_count() -> None:
    made, x = backbone(), batch("s1", "s2")
    seen = made.normalize(x)
    hidden = {"S1": torch.ones(2, 4, 4, 3, dtype=torch.bool)}
    with torch.no_grad():
        tokens = made.encode_groups(seen, hidden)
        alone = made.encode_groups({n: v for n, v in seen.items() if not n.startswith("s1")})
    torch.testing.assert_close(tokens.mean(), alone.mean())
    assert not tokens.visible["space_time"][..., 0].any()


def test_mistakes_are_told() -> None:
    made, x = backbone(), batch("s1", "s2", "era5", "dem")
    with pytest.raises(DataError, match=r"batch.s2.dates is missing"):
        made({"s2": x["s2"]})
    with pytest.raises(DataError, match="the same dates"):
        made({**x, "s1": x["s1"][:, :2], "s1.dates": DAYS[:, :2]})
    with pytest.raises(DataError, match="one grid of pixels"):
        made({**x, "dem": x["dem"][..., :4]})
    with pytest.raises(DataError, match="24 dates at most, got 25"):
        made({"era5": x["era5"][:, :1].expand(-1, 25, -1, -1, -1),
              "era5.dates": DAYS[:, :1].expand(-1, 25)})  # fmt: skip
    with pytest.raises(ConfigError, match="takes no `keep`"):
        made.encode(made.normalize(x), keep={"s2": torch.zeros(2, 1, dtype=torch.int64)})
    with pytest.raises(ConfigError, match="depths: got 3, expected 0 to 2"):
        made.encode_groups(made.normalize(x), depths=3)
    with pytest.raises(ConfigError, match="no group of the modality 'sentinel'"):
        GalileoBackbone(
            {"sentinel": {"kind": "image", "channels": ["a"], "value_unit": "dn"}},
            normalization="identity",
        )
    with pytest.raises(ConfigError, match=r"groups.S1: modality 's1' has no VH"):
        GalileoBackbone(
            {"s1": {"kind": "series", "channels": ["VV"], "value_unit": "db"}},
            normalization="identity",
        )
    with pytest.raises(ConfigError, match="a multiple of 16"):
        GalileoBackbone(PUBLISHED_MODALITIES, architecture={**SIZES, "width": 24})


def test_gradients_reach_what_the_batch_has_and_nothing_else() -> None:
    made = backbone().train()
    made(batch("s2", "era5")).pooled["joint"].square().sum().backward()
    for group in PUBLISHED_GROUPS:
        (weight, _) = made.encoder.get_submodule(f"{group.array}_embed.{group.name}").parameters()
        assert (weight.grad is not None) == (group.modality in ("s2", "era5")), group.name
    own = [p for name in PUBLISHED_MODALITIES for p in made.modality_parameters(name)]
    assert len({id(p) for p in own}) == 2 * len(PUBLISHED_GROUPS)


def test_the_units_of_a_batch_are_watched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = backbone()
    export_backbone(made, tmp_path / "out")
    x = batch("s2")
    with caplog.at_level(logging.WARNING):
        load_backbone(tmp_path / "out")({**x, "s2": x["s2"] / 1e4})
    assert "s2" in caplog.text
