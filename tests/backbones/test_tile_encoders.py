"""Published encoders of tiles give what timm gives with the same arguments, from a local file."""

from __future__ import annotations

import pytest
import timm
import torch

from domainssl import list_backbones, load_backbone
from domainssl.backbones import tile_encoders
from domainssl.backbones.tile_encoders import NOT_LOADABLE, TILE_ENCODERS
from domainssl.errors import WeightsError

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 4}  # the published width takes seconds


def timm_model(name, changes):
    spec = TILE_ENCODERS[name]
    layers = {"swiglu_packed": timm.layers.SwiGLUPacked, "silu": torch.nn.SiLU}
    given = {k: layers.get(v, v) if isinstance(v, str) else v for k, v in spec.arguments.items()}
    torch.manual_seed(0)
    return timm.create_model(spec.model, **{**given, **changes}).eval()


@pytest.mark.parametrize("name", [n for n in TILE_ENCODERS if n != "resnet50_truncated"])
def test_an_encoder_gives_timms_features_of_normalised_tiles(name, tmp_path):
    spec, reference = TILE_ENCODERS[name], timm_model(name, SMALL)
    torch.save(reference.state_dict(), tmp_path / "a.pt")
    loaded = load_backbone(name, weights=tmp_path / "a.pt", arguments={"changes": SMALL})
    tiles = torch.randint(0, 256, (2, 3, spec.size, spec.size)).float()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.mean, spec.std))
    with torch.no_grad():
        expected = reference.forward_features((tiles / 255 - mean) / std)
        pooled = reference((tiles / 255 - mean) / std)
        found = loaded({"he": tiles})
    registers = spec.arguments.get("reg_tokens", 4 if "reg4" in spec.model else 0)
    patches = expected[:, 1 + registers :]
    torch.testing.assert_close(found.tokens["he"], patches, atol=1e-4, rtol=1e-4)
    if spec.pooling == "class_mean":
        assert patches.shape[1] == 256
        pooled = torch.cat([expected[:, 0], patches.mean(1)], 1)
    torch.testing.assert_close(found.pooled["he"], pooled, atol=1e-4, rtol=1e-4)
    assert loaded.embed_dim["he"] == pooled.shape[1]


def test_the_truncated_resnet_leaves_the_last_stage_of_the_file_out(tmp_path):
    torch.manual_seed(0)
    whole = timm.create_model("resnet50").eval()
    torch.save(whole.state_dict(), tmp_path / "a.pt")
    loaded = load_backbone("resnet50_truncated", weights=tmp_path / "a.pt")
    tiles = torch.randint(0, 256, (1, 3, 64, 64)).float()
    unit = (tiles / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    with torch.no_grad():
        x = whole.maxpool(whole.act1(whole.bn1(whole.conv1(unit))))
        expected = whole.layer3(whole.layer2(whole.layer1(x))).mean((2, 3))
        found = loaded({"he": tiles}).pooled["he"]
    assert found.shape == (1, 1024)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_published_widths_are_those_of_the_table():
    dims = {"uni": 1024, "uni2_h": 1536, "virchow": 2560, "virchow2": 2560, "phikon": 768,
            "phikon_v2": 1024, "prov_gigapath": 1536, "h_optimus_0": 1536, "h_optimus_1": 1536,
            "resnet50_truncated": 1024}  # fmt: skip
    assert {name: spec.dim for name, spec in TILE_ENCODERS.items()} == dims
    with torch.device("meta"):
        for name, spec in TILE_ENCODERS.items():
            if spec.pooling != "map":
                width = timm_model(name, {"depth": 1}).num_features
                assert spec.dim == width * (2 if spec.pooling == "class_mean" else 1), name


def test_a_file_with_other_tensors_is_refused(tmp_path):
    state = timm_model("uni", SMALL).state_dict()
    torch.save({**state, "head.weight": torch.zeros(1)}, tmp_path / "more.pt")
    del state["blocks.1.ls1.gamma"]
    torch.save(state, tmp_path / "less.pt")
    for name, text in (("more", "unexpected in the file: 1"), ("less", "missing in the file: 1")):
        with pytest.raises(WeightsError, match=rf"no file of 'uni'.*{text}"):
            load_backbone("uni", weights=tmp_path / f"{name}.pt", arguments={"changes": SMALL})


def test_tiles_of_another_resolution_are_refused_unless_accepted(tmp_path):
    torch.save(timm_model("uni", SMALL).state_dict(), tmp_path / "a.pt")

    def load(mpp, **more):
        data = {"ihc": TILE_ENCODERS["uni"].modality("ihc").to_dict() | {"mpp_um": mpp}}
        arguments = {"changes": SMALL, **more}
        return load_backbone("uni", weights=tmp_path / "a.pt", modalities=data, arguments=arguments)

    assert list(load(0.54).modalities) == ["ihc"]
    with pytest.raises(WeightsError, match=r"0\.25 um per pixel.*0\.5.*any_mpp"):
        load(0.25)
    assert load(0.25, any_mpp=True).any_mpp


def test_names_are_listed_and_those_that_timm_cannot_build_say_why():
    assert {*TILE_ENCODERS} <= {*list_backbones()} and not {*NOT_LOADABLE} & {*list_backbones()}
    with pytest.raises(WeightsError, match="'conch' cannot be loaded: its vision-language model"):
        load_backbone("conch", weights="a.pt")
    assert tile_encoders.TileEncoderBackbone.not_loadable is NOT_LOADABLE
