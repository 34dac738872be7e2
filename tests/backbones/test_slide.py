"""TITAN's slide encoder: hand values of its bias, background that nobody sees, released names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from domainssl import load_backbone
from domainssl.backbones.slide import PUBLISHED_MODALITIES, TITANBackbone
from domainssl.errors import ConfigError, DataError, WeightsError
from domainssl.modality import Modality
from domainssl.nn.alibi import alibi_slopes
from domainssl.nn.blocks import set_attention_path
from domainssl.nn.patching import grid_coordinates

D, GRID = 8, (3, 4)


def features(dim=D, size=GRID):
    names = tuple(f"f{i}" for i in range(dim))
    modality = Modality(
        name="tile_features", kind="features", channels=names, value_unit="arbitrary", size=size
    )
    return {"tile_features": modality}


def build(**arguments):
    torch.manual_seed(0)
    sizes = {"width": 24, "depth": 2, "heads": 6, "normalization": "identity"}
    return TITANBackbone(features(), **{**sizes, **arguments}).eval()


def batch(items=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    valid = torch.rand(items, 12, generator=g) > 0.3
    return {
        "tile_features": torch.randn(items, 12, D, generator=g),
        "tile_features.valid": valid,
        "tile_features.coords": grid_coordinates(GRID).expand(items, -1, -1),
    }


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (3, [1 / 16, 1 / 256, 1 / 4]),
        (6, [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]),
        (8, [2.0**-i for i in range(1, 9)]),
        (12, [*(2.0**-i for i in range(1, 9)), 0.707107, 0.353553, 0.176777, 0.088388]),
        (16, [2.0 ** (-i / 2) for i in range(1, 17)]),
    ],
)
def test_slopes_are_those_worked_out_by_hand(heads, slopes):
    assert alibi_slopes(heads).tolist() == pytest.approx(slopes, abs=1e-6)


def test_the_bias_is_the_one_worked_out_by_hand_and_zero_around_the_class_token():
    backbone = build(width=24, heads=12)
    places, valid = grid_coordinates((2, 3)).unsqueeze(0), torch.ones(1, 6, dtype=torch.bool)
    found = backbone.bias(places, valid).full(torch.float32)
    assert found.shape == (1, 12, 7, 7)
    by_hand = [0, -0.5, -1, -0.5, -0.707107, -1.118034]
    assert found[0, 0, 1, 1:].tolist() == pytest.approx(by_hand, abs=1e-6)
    assert (found[:, :, 0] == 0).all() and (found[:, :, :, 0] == 0).all()
    assert torch.equal(found, found.transpose(2, 3))
    moved = backbone.bias(places + 100, valid).full(torch.float32)
    torch.testing.assert_close(moved, found)
    parts = torch.cat(
        [backbone.bias(places, valid).rows(i, i + 2, torch.float32) for i in (0, 2)], 2
    )
    assert torch.equal(parts, found[:, :, :4])


@pytest.mark.parametrize("path", ["math", "flex"])
def test_every_way_of_attention_leaves_the_class_token_without_a_place(path):
    backbone, given = build(), batch()
    with torch.no_grad():
        expected = backbone(given)
        set_attention_path(backbone, path)
        found = backbone(given)
    valid = given["tile_features.valid"]
    torch.testing.assert_close(found.cls, expected.cls)
    torch.testing.assert_close(
        found.tokens["tile_features"][valid], expected.tokens["tile_features"][valid]
    )


def test_features_of_background_change_nothing():
    backbone, given = build(), batch()
    valid = given["tile_features.valid"]
    other = dict(given)
    filler = torch.full_like(given["tile_features"], 77.0)
    other["tile_features"] = torch.where(valid.unsqueeze(-1), given["tile_features"], filler)
    with torch.no_grad():
        ours, theirs = backbone(given), backbone(other)
    assert torch.equal(ours.pooled["tile_features"], theirs.pooled["tile_features"])
    assert torch.equal(ours.tokens["tile_features"][valid], theirs.tokens["tile_features"][valid])
    assert torch.equal(ours.token_valid["tile_features"], valid)


def test_background_is_as_if_it_was_not_there():
    backbone, given = build(), batch(1)
    valid = given["tile_features.valid"]
    only = {
        "tile_features": given["tile_features"][valid].unsqueeze(0),
        "tile_features.coords": given["tile_features.coords"][valid].unsqueeze(0),
    }
    with torch.no_grad():
        whole, part = backbone(given), backbone(only)
    torch.testing.assert_close(whole.cls, part.cls, atol=1e-5, rtol=1e-5)
    assert part.grid["tile_features"] == (int(valid.sum()),)


def test_a_batch_of_two_slides_equals_each_alone():
    backbone, given = build(), batch()
    with torch.no_grad():
        both = backbone(given)
        for i in range(2):
            alone = backbone({name: value[i : i + 1] for name, value in given.items()})
            for name in ("tokens", "pooled", "cls"):
                ours = getattr(both, name)["tile_features"][i : i + 1]
                theirs = getattr(alone, name)["tile_features"]
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_kept_tiles_keep_their_places():
    backbone, given = build(), batch()
    given["tile_features.valid"] = torch.ones_like(given["tile_features.valid"])
    keep = torch.tensor([[0, 5, 7], [2, 3, 11]])
    with torch.no_grad():
        found = backbone.encode(backbone.normalize(given), keep={"tile_features": keep})
        cut = {
            name: torch.stack([value[i][keep[i]] for i in range(2)])
            for name, value in given.items()
        }
        expected = backbone(cut)
    torch.testing.assert_close(found.cls, expected.cls)
    assert torch.equal(found.coords["tile_features"], cut["tile_features.coords"])


def released(dim=D, width=24, depth=2) -> dict[str, Tensor]:
    """Tensors named as in TITAN's file, with random values."""
    g = torch.Generator().manual_seed(1)
    shapes = {
        "cls_token": (1, 1, width), "patch_embed.0.weight": (width, dim),
        "patch_embed.0.bias": (width,), "norm.weight": (width,), "norm.bias": (width,),
        "attn_pool.query": (128, width), "attn_pool_contrastive.query": (1, width),
        "attn_pool_contrastive.ln_q.weight": (width,), "proj": (width, width),
    }  # fmt: skip
    parts = {
        "norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width),
        "norm2": (width,), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width),
    }  # fmt: skip
    for block in range(depth):
        for name, shape in parts.items():
            shapes[f"blocks.modules_list.{block}.{name}.weight"] = shape
            shapes[f"blocks.modules_list.{block}.{name}.bias"] = shape[:1]
    made = {f"vision_encoder.{n}": torch.randn(s, generator=g) for n, s in shapes.items()}
    return {**made, "text_encoder.token_embedding.weight": torch.randn(5, width, generator=g)}


def test_the_released_layout_loads_and_what_is_not_used_is_reported(tmp_path, caplog):
    state = released()
    torch.save(state, tmp_path / "titan.pt")
    sizes = {"width": 24, "depth": 2, "heads": 6}
    with caplog.at_level("INFO"):
        loaded = load_backbone(
            "titan", weights=tmp_path / "titan.pt", modalities=features(), arguments=sizes
        )
    assert isinstance(loaded, TITANBackbone)
    assert "unexpected in the file: 5" in caplog.text and "missing in the file: 0" in caplog.text
    backbone, report = TITANBackbone.from_reference(
        state, {**sizes, "normalization": "identity"}, features()
    )
    assert set(report.unexpected) == {
        "vision_encoder.attn_pool.query", "vision_encoder.attn_pool_contrastive.query",
        "vision_encoder.attn_pool_contrastive.ln_q.weight", "vision_encoder.proj",
        "text_encoder.token_embedding.weight",
    }  # fmt: skip
    written = backbone.to_reference()
    assert written.keys() == state.keys() - set(report.unexpected)
    assert all(torch.equal(written[name], state[name]) for name in written)
    with torch.no_grad():
        assert torch.equal(
            loaded(batch()).cls["tile_features"], backbone(batch()).cls["tile_features"]
        )


def test_the_first_block_computes_what_the_names_say():
    """One tile: attention of two tokens, written out with the tensors of the file."""
    state = {n.removeprefix("vision_encoder."): t for n, t in released(depth=1).items()}
    sizes = {"width": 24, "depth": 1, "heads": 6, "normalization": "identity"}
    backbone, _ = TITANBackbone.from_reference(released(depth=1), sizes, features(size=(1, 1)))
    x = torch.randn(1, 1, D, generator=torch.Generator().manual_seed(2))

    def norm(t, name):
        return torch.nn.functional.layer_norm(
            t, (24,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6
        )

    def linear(t, name):
        return t @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    gelu, b = torch.nn.functional.gelu, "blocks.modules_list.0"
    h = torch.cat([state["cls_token"][0], gelu(linear(x[0], "patch_embed.0"))])
    q, k, v = (
        t.view(2, 6, 4).transpose(0, 1)
        for t in linear(norm(h, f"{b}.norm1"), f"{b}.attn.qkv").chunk(3, -1)
    )
    mixed = ((q @ k.transpose(1, 2) / 2).softmax(-1) @ v).transpose(0, 1).reshape(2, 24)
    h = h + linear(mixed, f"{b}.attn.proj")
    h = h + linear(gelu(linear(norm(h, f"{b}.norm2"), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
    with torch.no_grad():
        found = backbone.eval()({"tile_features": x})
    torch.testing.assert_close(
        found.cls["tile_features"], norm(h, "norm")[:1], rtol=1e-4, atol=1e-4
    )


def test_what_cannot_be_encoded_is_said():
    with pytest.raises(ConfigError, match="'image'; a slide encoder takes the features"):
        TITANBackbone(
            {"s2": {"kind": "image", "channels": ("a",), "value_unit": "dn"}},
            normalization="identity",
        )
    given = batch()
    del given["tile_features.coords"]
    assert build()(given).grid["tile_features"] == GRID
    short = {"tile_features": given["tile_features"][:, :5]}
    with pytest.raises(DataError, match=r"5 tiles without tile_features\.coords"):
        build()(short)
    with pytest.raises(WeightsError, match=r"patch_embed\.0\.weight"):
        TITANBackbone.from_reference({"a": torch.zeros(1)}, {}, None)
    assert PUBLISHED_MODALITIES["tile_features"].num_channels == 768
