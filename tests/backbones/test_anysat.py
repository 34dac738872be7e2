"""AnySat: any of its sensors, missing data, dense features, and files of its released layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from domainssl import load_backbone
from domainssl.backbones.anysat.backbone import AnySatBackbone
from domainssl.backbones.anysat.sensors import SENSORS
from domainssl.backbones.card import export_backbone, read_card
from domainssl.errors import ConfigError, DataError, WeightsError
from domainssl.modality import Modality

SIZES = {"width": 32, "depth": 1, "heads": 2, "series_heads": 4, "key_width": 4}
SIDE_M = 60.0
B, T = 2, 3


def modality(name: str, **more: Any) -> Modality:
    sensor = SENSORS[name]
    facts: dict[str, Any] = {
        "name": name, "kind": sensor.kind, "channels": sensor.bands, "value_unit": "arbitrary",
        "gsd_m": sensor.gsd_m, "mean": (100.0,) * len(sensor.bands),
        "std": (10.0,) * len(sensor.bands),
    }  # fmt: skip
    return Modality(**{**facts, **more})


def backbone(*names: str, **more: Any) -> AnySatBackbone:
    torch.manual_seed(0)
    built = AnySatBackbone(
        {name: modality(name) for name in names}, **{"architecture": SIZES, "patch_m": 30, **more}
    )
    for parameter in built.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return built.eval()


def batch(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Tensor] = {}
    for name in names:
        sensor = SENSORS[name]
        side = 1 if sensor.whole else round(SIDE_M / sensor.gsd_m)
        time = () if sensor.kind == "image" else (T,)
        shape = (B, *time, len(sensor.bands), side, side)
        found[name] = 100 + 10 * torch.randn(shape, generator=generator)
        if time:
            days = torch.randint(17000, 17365, (B, T), generator=generator)
            found[f"{name}.dates"] = days.int()
    return found


def test_the_released_network_has_the_published_size() -> None:
    data = {name: modality(name) for name in SENSORS}
    with torch.device("meta"):
        made = AnySatBackbone(data, **AnySatBackbone.variants["anysat_base"])
        small = AnySatBackbone(data, **AnySatBackbone.variants["anysat_tiny"])
    assert made.patch_m == 30.0  # the pixels of Landsat 7
    state = made.to_reference()
    assert len(state) == 418
    assert round(sum(t.numel() for t in state.values()) / 1e6, 1) == 125.9
    assert round(sum(t.numel() for t in small.to_reference().values()) / 1e6, 1) == 8.1
    assert state["projector_s1-asc.patch_embed.attention_heads.Q"].shape == (16, 8)
    assert state["blocks.6.attn.rpe_k.lookup_table_weight"].shape == (1, 64, 8)


def test_the_released_layout_loads_by_name_with_statistics_of_the_data(tmp_path: Path) -> None:
    made = backbone(*SENSORS)
    file = tmp_path / "AnySat.pth"
    torch.save({"state_dict": made.to_reference()}, file)
    arguments = {"architecture": SIZES, "patch_m": 30}
    names = ("spot", "s2", "modis")
    data = {name: modality(name) for name in names}
    asked: dict[str, Any] = {"weights": file, "arguments": arguments}
    loaded = load_backbone("anysat_base", modalities=data, **asked)
    x = batch(*names)
    assert torch.equal(loaded(x).pooled["joint"], made(x).pooled["joint"])
    export_backbone(loaded, tmp_path / "out")
    card, _ = read_card(tmp_path / "out")
    assert {*card.normalization.values()} == {"zscore"} and card.modalities["s2"]["mean"][0] == 100
    again = load_backbone(tmp_path / "out")
    assert torch.equal(again(x).tokens["joint"], loaded(x).tokens["joint"])

    with pytest.raises(WeightsError, match="bring no statistics; pass modalities"):
        load_backbone("anysat_base", **asked)
    bare = dataclasses.replace(data["s2"], mean=None, std=None)
    with pytest.raises(ConfigError, match="needs mean and std per channel"):
        load_backbone("anysat_base", modalities={"s2": bare}, **asked)
    turned = dataclasses.replace(data["s2"], channels=data["s2"].channels[::-1])
    with pytest.raises(WeightsError, match="s2: got B12 B11 .* take B02 B03"):
        load_backbone("anysat_base", modalities={"s2": turned}, **asked)
    with pytest.raises(WeightsError, match="The file has 1 blocks over patches, the backbone 6"):
        load_backbone("anysat_base", modalities=data, weights=file)
    for change, message in (
        ({"head.weight": torch.zeros(1)}, "The file holds head.weight, which AnySat does not"),
        ({"cls_token": None}, "These are no weights of AnySat"),
        ({"projector_s2.pad_parameter": None}, r"missing in the file: 1 \(projector_s2.pad_"),
    ):
        state = {n: t for n, t in {**made.to_reference(), **change}.items() if t is not None}
        torch.save({"state_dict": state}, file)
        with pytest.raises(WeightsError, match=message):
            load_backbone("anysat_base", modalities=data, **asked)


def test_a_checkpoint_of_its_training_gives_the_teacher(tmp_path: Path) -> None:
    made = backbone("s2", "spot")
    state = {f"target_encoder.{n}": t for n, t in made.to_reference().items()}
    state |= {f"model.encoder.{n}": torch.zeros_like(t) for n, t in made.to_reference().items()}
    torch.save({"state_dict": state | {"model.masked_token": torch.zeros(1)}}, tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    sizes = {"architecture": SIZES, "patch_m": 30}
    loaded, report = AnySatBackbone.from_reference(content, sizes, {"s2": modality("s2")})
    assert not report.missing and all(n.startswith("projector_spot") for n in report.unexpected)
    x = batch("s2")
    assert torch.equal(loaded.eval()(x).cls["joint"], made(x).cls["joint"])


def test_weights_serve_some_of_the_bands(tmp_path: Path) -> None:
    made = backbone("s2")
    torch.save({"state_dict": made.to_reference()}, tmp_path / "AnySat.pth")
    rgb = modality("s2", channels=("B04", "B03", "B02"), mean=(100.0,) * 3, std=(10.0,) * 3)
    loaded = load_backbone(
        "anysat_base", weights=tmp_path / "AnySat.pth", modalities={"s2": rgb}, bands="subset",
        arguments={"architecture": SIZES, "patch_m": 30},
    )  # fmt: skip
    x = batch("s2")
    few = {**x, "s2": x["s2"][:, :, [2, 1, 0]]}
    x["s2"][:, :, 3:] = torch.tensor([0.0] * 7).view(-1, 1, 1)  # the mean that unknown bands have
    whole = backbone("s2")
    whole.normalizer.get_buffer("mean_s2")[3:] = 0.0
    torch.testing.assert_close(loaded(few).cls["joint"], whole(x).cls["joint"])


def test_what_an_item_lacks_is_as_if_it_were_not_in_the_batch() -> None:
    names = ("spot", "s2", "l7", "modis")
    made, x = backbone(*names), batch(*names)
    first = {n: t[:1] for n, t in x.items()}
    with torch.no_grad():
        whole = made(x)
        x |= {f"{n}.present": torch.tensor([False, True]) for n in ("spot", "modis")}
        x["spot"][0], x["modis"][0] = 1e4, -1e4
        found = made(x)
        alone = made({n: t for n, t in first.items() if n.split(".")[0] in ("s2", "l7")})
    torch.testing.assert_close(found.tokens["joint"][:1], alone.tokens["joint"])
    torch.testing.assert_close(found.cls["joint"][1], whole.cls["joint"][1])
    assert not torch.allclose(found.cls["joint"][0], whole.cls["joint"][0])


def test_padded_dates_change_nothing() -> None:
    made, x = backbone("s2"), batch("s2")
    with torch.no_grad():
        expected = made(x).tokens["joint"]
        longer = {
            "s2": torch.cat([x["s2"], torch.full_like(x["s2"][:, :1], 7.0)], 1),
            "s2.dates": torch.cat([x["s2.dates"], torch.zeros(B, 1, dtype=torch.int32)], 1),
            "s2.frames": torch.tensor([[True] * T + [False]] * B),
        }
        torch.testing.assert_close(made(longer).tokens["joint"], expected)


def test_patches_without_a_measurement_are_hidden_from_the_others() -> None:
    made, x = backbone("s2"), batch("s2")
    valid = torch.ones(B, T, 6, 6, dtype=torch.bool)
    valid[:, :, :3, :3] = False  # the first of four patches
    with torch.no_grad():
        x["s2.valid"] = valid
        before = made(x)
        x["s2"] = torch.where(valid.unsqueeze(2), x["s2"], 5.0)
        after = made(x)
    torch.testing.assert_close(before.tokens["joint"], after.tokens["joint"])
    assert before.token_valid["joint"].tolist() == [[False, True, True, True]] * B


def test_an_image_of_one_date_is_a_series_of_one() -> None:
    made, x = backbone("s2"), batch("s2")
    single = AnySatBackbone(
        {"s2": modality("s2", kind="image")}, architecture=SIZES, patch_m=30
    ).eval()
    single.load_state_dict(made.state_dict())
    with torch.no_grad():
        ours = single({"s2": x["s2"][:, 0], "s2.dates": x["s2.dates"][:, 0]})
        theirs = made({"s2": x["s2"][:, :1], "s2.dates": x["s2.dates"][:, :1]})
    torch.testing.assert_close(ours.tokens["joint"], theirs.tokens["joint"])


def test_dense_features_lie_where_their_pixels_are() -> None:
    """A disturbed part of an aerial image changes most at its place, in patches of 20 m too."""
    made, x = backbone("aerial", dense="aerial", patch_m=20), batch("aerial")
    with torch.no_grad():
        before = made(x)
        x["aerial"][:, :, 70:80, 130:140] += 50.0
        after = made(x)
    maps = made.feature_maps(x)
    assert maps["dense"].shape == (B, 64, 30, 30) and maps["joint"].shape == (B, 32, 3, 3)
    moved = (after.tokens["dense"] - before.tokens["dense"]).square().sum((0, 2)).view(30, 30)
    assert divmod(int(moved.argmax()), 30) == (7, 13)
    made.dense = None
    assert "dense" not in made(x).tokens


def test_other_modalities_are_given_a_sensor() -> None:
    data = {"s1_des": dataclasses.replace(modality("s1_asc"), name="s1_des")}
    with pytest.raises(ConfigError, match="AnySat has no sensor 's1_des'.*'s1_asc'"):
        AnySatBackbone(data, architecture=SIZES)
    made = AnySatBackbone(data, sensors={"s1_des": "s1_asc"}, architecture=SIZES)
    assert "projector_s1-asc.pad_parameter" in made.to_reference()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"patch_m": 25}, ConfigError, r"patch_m: got 25; .* multiple of 10 m.* Nearest: 20"),
        ({"patch_m": 40}, ConfigError, "multiple of 30 m, for l7. Nearest: 30"),
        ({"dense": "modis"}, ConfigError, "dense: 'modis' has no parts"),
        ({"sensors": {"s3": "s2"}}, ConfigError, "sensors: 's3' is no modality"),
    ],
)
def test_arguments_that_do_not_fit_are_told(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        backbone("s2", "l7", "modis", **change)


def test_batches_that_do_not_fit_are_told() -> None:
    made, x = backbone("s2", "spot", "modis"), batch("s2", "spot", "modis")
    with pytest.raises(DataError, match="one footprint for all sensors.*'spot': .1, 1."):
        made({**x, "spot": x["spot"][..., :30, :30]})
    with pytest.raises(DataError, match="The batch has modis alone"):
        made({n: t for n, t in x.items() if n.startswith("modis")})
    with pytest.raises(DataError, match="batch.s2.dates is missing"):
        made({"s2": x["s2"]})
    with pytest.raises(DataError, match="covers the whole tile"):
        made({**x, "modis": x["modis"].expand(-1, -1, -1, 2, 2)})
    with pytest.raises(ConfigError, match="pixels of 1.5 m, but AnySat's spot has 1 m"):
        AnySatBackbone({"spot": modality("spot", gsd_m=1.5)}, architecture=SIZES)
