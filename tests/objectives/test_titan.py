"""TITAN on feature grids: whole cells, background that is never hidden, sizes that fit."""

from __future__ import annotations

import pytest
import torch

from domainssl.errors import ConfigError, WeightsError
from domainssl.modality import Modality
from domainssl.nn.patching import grid_coordinates
from domainssl.objectives.base import Generators
from domainssl.objectives.dino import DINO
from domainssl.objectives.titan import TITAN

NAME, SIDE, D = "tile_features", 6, 5


def modality(**changes):
    facts = {
        "name": NAME, "kind": "features", "channels": tuple(f"f{i}" for i in range(D)),
        "value_unit": "arbitrary", "size": (SIDE, SIDE), "mean": (0.0,) * D, "std": (2.0,) * D,
    }  # fmt: skip
    return {NAME: Modality(**{**facts, **changes})}


def build(**arguments):
    torch.manual_seed(0)
    small = {
        "encoding": {"size": "tiny"},
        "crops": {"global_size": 4, "local_size": (2, 3), "local_count": 2},
        "head": {"prototypes": 16, "hidden": 8, "bottleneck": 8},
        "context_size": SIDE,
    }
    return TITAN(modality(), **{**small, **arguments}).eval()


def batch(items=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        NAME: torch.randn(items, SIDE * SIDE, D, generator=g),
        f"{NAME}.valid": torch.rand(items, SIDE * SIDE, generator=g) > 0.4,
        f"{NAME}.present": torch.ones(items, dtype=torch.bool),
        f"{NAME}.coords": grid_coordinates((SIDE, SIDE)).expand(items, -1, -1),
    }


def draws(model, given, seed=1):
    return model.draw(given, Generators(*(torch.Generator().manual_seed(s) for s in (seed, 9))))


def test_views_hold_the_features_of_their_cells_in_the_networks_units():
    model, given = build(), batch()
    seen = {}
    model.tokens = lambda large, small, *more: seen.update(large=large, small=small)
    drawn = draws(model, given)
    model.encode_crops(given, drawn)
    large, small = seen["large"], seen["small"]
    assert large[NAME].shape == (8, 16, D) and small[NAME].shape == (8, 6, D)
    every = (given[NAME] / 2).flatten(0, 1)
    for values, valid in zip(large[NAME], large[f"{NAME}.valid"], strict=True):
        assert (values[~valid] == 0).all()
        for row in values[valid]:
            assert (every - row).abs().amax(1).min() < 1e-6
    assert large[f"{NAME}.coords"][0, -1].tolist() == [3.0, 3.0]
    assert small[f"{NAME}.coords"][0, -1].tolist() == [1.0, 2.0]


def test_background_is_never_hidden_and_never_a_target():
    model, given = build(masks={"fraction": 1.0, "ratio": [0.5, 0.5]}), batch()
    tokens = model.encode_crops(given, draws(model, given))
    valid = tokens.mask.new_zeros(tokens.mask.shape)
    kept = {}
    model.tokens = lambda large, *more: kept.update(large)
    model.encode_crops(given, draws(model, given))
    valid = kept[f"{NAME}.valid"].unflatten(0, (2, 4))
    assert tokens.mask.any() and not (tokens.mask & ~valid).any()


def test_a_batch_without_tissue_gives_finite_losses():
    model, given = build(), batch()
    given[f"{NAME}.valid"][:] = False
    step = model(given, draws(model, given))
    assert all(loss.isfinite() for loss in step.losses.values())
    assert float(step.losses["patch"].detach()) == 0


def test_loss_head_and_teacher_are_those_of_ibot():
    model = build()
    assert isinstance(model, DINO) and model.loss_weights == {
        "cls": 1.0,
        "patch": 1.0,
        "koleo": 0,
        "gram": 0,
    }
    assert model.exported == "teacher.backbone" and model.backbone.mask_token is not None
    assert build(loss_weights={"patch": 0.0}).backbone.mask_token is None
    assert build(options={"reference": True}).options.patch_center == "all"


def test_defaults_are_the_published_sizes():
    model = TITAN(modality(size=(16, 16)))
    assert model.crops.plan() == [(14, 14)] * 2 + [(6, 6)] * 10
    assert len(model.head.last_layer.weight_g) == 8192
    blocks = model.backbone.transformer.blocks
    assert len(blocks) == 6 and blocks[0].attention.heads == 12 and model.backbone.width == 768


def test_data_and_sizes_that_do_not_fit_are_refused():
    image = {"kind": "image", "channels": ("a",), "value_unit": "dn", "size": (6, 6)}
    with pytest.raises(ConfigError, match=r"'image'.*window\.mode: grid"):
        TITAN({"s2": image})
    with pytest.raises(ConfigError, match="size \\(2048,\\); expected features of tiles on a grid"):
        TITAN(modality(size=(2048,)))
    with pytest.raises(ConfigError, match=r"regions of \(6, 6\) cells.*is 16"):
        build(context_size=16)
    with pytest.raises(ConfigError, match=r"global_size: got \(7, 7\) cells of a region of \(6, 6"):
        build(crops={"global_size": 7})
    with pytest.raises(ConfigError, match="local_count: got -1"):
        build(crops={"global_size": 4, "local_size": 2, "local_count": -1})


def test_a_run_goes_on_from_titans_file_that_has_a_mask_token(tmp_path):
    model = build()
    path = tmp_path / "titan.pt"
    torch.save(model.backbone.to_reference(), path)
    again = build(encoding={"size": "tiny", "weights": str(path)})
    ours, theirs = model.backbone.state_dict(), again.backbone.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    del (state := model.backbone.to_reference())["vision_encoder.masked_embed"]
    torch.save(state, path)
    loaded = build(encoding={"size": "tiny", "weights": str(path)})
    assert loaded.backbone.mask_token is not None  # a new one: students need it
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=r"patch_embed\.0\.weight"):
        build(encoding={"size": "tiny", "weights": str(path)})
