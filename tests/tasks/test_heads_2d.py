"""Heads of two axes give one logit per class and pixel, over the maps of every family."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from domainssl.api import build
from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError
from domainssl.modality import Batch, key
from domainssl.tasks.heads_2d import HEADS_2D, SmpDecoder
from domainssl.tasks.heads_3d import MapLevel
from domainssl.tasks.maps import MapFusion, dense_maps, map_levels

# a recipe of every family of backbones that sees images or their series
FAMILIES = (
    "ssl4eo_croma", "ssl4eo_mae", "ssl4eo_decur", "so2sat_simclr", "tiles_dino", "stains_maestro",
    "pastis_maestro", "treesat_omnisat",
)  # fmt: skip


@cache
def _backbone(recipe: str) -> Backbone:
    backbone: Backbone = build(recipe).model.backbone
    return backbone.eval()


def _batch(backbone: Backbone, items: int = 2, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    batch: Batch = {}
    for name, modality in backbone.modalities.items():
        lead = (items, 3) if modality.kind == "series" else (items,)
        shape = (*lead, modality.num_channels, *modality.size)
        axis = (-1, *(1,) * len(modality.size))
        mean, std = (torch.tensor(v).view(axis) for v in (modality.mean, modality.std))
        batch[name] = mean + std * torch.randn(shape, generator=generator)
        batch[key(name, "dates")] = torch.full(lead, 18_000, dtype=torch.int32)
        if modality.kind == "series":
            batch[key(name, "dates")] += torch.tensor([0, 40, 90], dtype=torch.int32)
            batch[key(name, "frames")] = torch.ones(lead, dtype=torch.bool)
    return batch


def _size(backbone: Backbone) -> tuple[int, ...]:
    return max(modality.size for modality in backbone.modalities.values())


@pytest.mark.parametrize("recipe", FAMILIES)
def test_every_head_reads_the_maps_of_every_family(recipe: str) -> None:
    torch.manual_seed(0)
    backbone = _backbone(recipe)
    batch, size = _batch(backbone), _size(backbone)
    levels = map_levels(backbone, size)
    fusion = MapFusion(levels)
    with torch.no_grad():
        maps = dense_maps(backbone, batch)
    assert set(maps) == set(levels)
    joined = fusion(maps, batch)
    for name, make in HEADS_2D.items():
        try:
            head = make(fusion.levels, 5, 32)
        except ConfigError as error:  # patches of two pixels have no four levels
            assert name in ("fpn", "upernet") and "joins" in str(error)
            continue
        logits = head(joined, size)
        assert logits.shape == (2, 5, *size), name
        logits.square().mean().backward()
        joined = [m.detach() for m in joined]
        gradients = [p.grad for p in head.parameters()]
        assert all(g is not None and g.isfinite().all() for g in gradients), name


@pytest.mark.parametrize("recipe", ["ssl4eo_croma", "pastis_maestro", "stains_maestro"])
def test_filler_of_a_missing_modality_changes_nothing(recipe: str) -> None:
    torch.manual_seed(0)
    backbone = _backbone(recipe)
    first = next(iter(backbone.modalities))
    names = [name for name in map_levels(backbone, _size(backbone)) if name != "joint"]
    fusion = MapFusion(map_levels(backbone, _size(backbone), names))

    def joined(batch: Batch) -> Tensor:
        with torch.no_grad():
            found: Tensor = fusion(dense_maps(backbone, batch, joint=False), batch)[0]
        return found

    batch = _batch(backbone)
    batch[key(first, "present")] = torch.tensor([True, False])
    other = {**batch, first: batch[first].clone()}
    other[first][1] = backbone.modalities[first].mean[0]  # type: ignore[index]
    torch.testing.assert_close(joined(batch), joined(other))
    # an item without the modality is that of a batch without its key
    alone = {k: v[1:] for k, v in batch.items() if k.partition(".")[0] != first}
    torch.testing.assert_close(joined(batch)[1:], joined(alone), rtol=1e-4, atol=1e-4)


def test_padded_dates_do_not_count() -> None:
    backbone = _backbone("treesat_omnisat")
    batch = _batch(backbone)
    series = [n for n, m in backbone.modalities.items() if m.kind == "series"]
    for name in series:
        batch[key(name, "frames")][:, 2] = False
    with torch.no_grad():
        before = dense_maps(backbone, batch)
        for name in series:
            batch[name][:, 2] += 1000
        after = dense_maps(backbone, batch)
    for name in before:
        torch.testing.assert_close(before[name][0], after[name][0])


@pytest.mark.parametrize("kind", ["unet", "fpn", "upernet"])
@pytest.mark.parametrize("grid", [(15, 15), (8, 12)])
def test_decoders_of_smp_take_any_grid(kind: Any, grid: tuple[int, int]) -> None:
    head = SmpDecoder([MapLevel(24, (8, 8))] * 4, 3, 32, kind)
    maps = [torch.randn(2, 24, *grid) for _ in range(4)]
    size = (8 * grid[0], 8 * grid[1])
    assert head(maps, size).shape == (2, 3, *size)
    names = [type(module).__name__ for module in head.modules()]
    assert "BatchNorm2d" not in names  # statistics are those of all ranks


def test_names_that_no_head_can_join_are_refused() -> None:
    backbone = _backbone("ssl4eo_croma")
    with pytest.raises(ConfigError, match=r"features: 's3', but .* maps of s1, s2, joint"):
        map_levels(backbone, (64, 64), ["s3"])
    one, four = [MapLevel(8, (8, 8))], [MapLevel(8, (8, 8))] * 4
    with pytest.raises(ConfigError, match=r"pyramids of a, b have \[1, 4\] levels"):
        MapFusion({"a": one, "b": four})
    with pytest.raises(ConfigError, match="'fpn' joins 4 levels.*Choose 'pyramid'"):
        SmpDecoder([MapLevel(8, (2, 2))], 3, 32, "fpn")
