"""The maps of a backbone as dense heads take them: 2D or 3D, without dates, of one or all names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError, nearest
from domainssl.modality import Modality, key, present_mask, zero_batch
from domainssl.tasks.heads_3d import MapLevel, levels_of, resized

__all__ = ["MapFusion", "Maps", "dense_maps", "map_levels", "window_sizes"]

Maps = dict[str, list[Tensor]]
_FRAMES = 2  # dates of the batch that shapes are learned from


def dense_maps(backbone: Backbone, batch: Mapping[str, Any], joint: bool = True) -> Maps:
    """Return the maps of a batch, finest first, (B, E_i, *S_i) per name; dates are averaged.

    Args:
        backbone: Of images, series or volumes.
        batch: Raw physical values.
        joint: Keep the name `joint` where the backbone has it.
    """
    kinds = {modality.kind for modality in backbone.modalities.values()}
    maps: Maps
    if "series" in kinds:  # pyramids are those of one date
        maps = {name: [values] for name, values in backbone.feature_maps(batch).items()}
    else:
        maps = backbone.feature_pyramid(batch)
    axes = max(modality.spatial_dims for modality in backbone.modalities.values())
    return {
        name: [_without_dates(name, values, axes, batch) for values in levels]
        for name, levels in maps.items()
        if joint or name != "joint"
    }


def _without_dates(name: str, values: Tensor, axes: int, batch: Mapping[str, Any]) -> Tensor:
    """Return (B, E, *S), the mean over the real dates of (B, E, T, *S)."""
    if values.ndim == axes + 2:
        return values
    frames = batch.get(key(name, "frames")) if name in batch else None
    if frames is None:
        return values.mean(2)
    weight = frames.to(values.dtype)[:, None, :, *(None,) * axes]  # (B, T) -> (B, 1, T, 1, ...)
    return (values * weight).sum(2) / weight.sum(2).clamp(min=1)


def map_levels(
    backbone: Backbone, size: Sequence[int], names: Sequence[str] = ()
) -> dict[str, list[MapLevel]]:
    """Return what maps a backbone makes of windows, found by one forward pass over zeros.

    Args:
        backbone: The backbone.
        size: Pixels or voxels of its finest modality along each axis.
        names: Names wanted; empty for all.

    Raises:
        ConfigError: There is no such name.
    """
    was_training = backbone.training
    device = next(backbone.parameters()).device
    sizes = window_sizes(backbone.modalities, size)
    batch = zero_batch(backbone.modalities, sizes, _FRAMES, device)
    backbone.eval()
    try:
        with torch.no_grad():
            maps = dense_maps(backbone, batch)
    finally:
        backbone.train(was_training)
    for name in names:
        if name not in maps:
            raise ConfigError(
                f"model.init_args.head.features: {name!r}, but this backbone has maps of "
                f"{', '.join(maps)}.{nearest(name, maps)}"
            )
    return {name: levels_of(maps[name], size) for name in (names or maps)}


def window_sizes(
    modalities: Mapping[str, Modality], size: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Return the sizes that windows of `size` pixels of the finest modality have."""
    steps = zip(
        *(modality.steps for modality in modalities.values() if modality.steps), strict=True
    )
    finest = [min(axis) for axis in steps]  # voxels may be longer along one axis
    return {
        name: tuple(
            round(side * least / step)
            for side, least, step in zip(size, finest, modality.steps, strict=True)
        )
        for name, modality in modalities.items()
    }


class MapFusion(nn.Module):
    """Make one pyramid of those of several names: levels are projected and averaged.

    Names that an item lacks do not count in its average, so that missing modalities leave nothing
    but less to look at; an item without any has zeros. A single name passes unchanged.

    Args:
        levels: Of every name; all have the same number of them.
    """

    def __init__(self, levels: Mapping[str, Sequence[MapLevel]]) -> None:
        super().__init__()
        self.names = tuple(levels)
        first = list(next(iter(levels.values())))
        depths = {name: len(found) for name, found in levels.items()}
        if len(set(depths.values())) > 1:
            raise ConfigError(
                f"model.init_args.head.features: the pyramids of {', '.join(self.names)} have "
                f"{sorted(set(depths.values()))} levels; name those that a head can join."
            )
        self.levels = first
        self.projections = nn.ModuleDict()
        if len(levels) > 1:
            axes = len(first[0].stride)
            conv: Any = {2: nn.Conv2d, 3: nn.Conv3d}[axes]
            for name, found in levels.items():
                self.projections[name] = nn.ModuleList(
                    conv(level.channels, goal.channels, 1)
                    for level, goal in zip(found, first, strict=True)
                )

    def forward(self, maps: Maps, batch: Mapping[str, Any]) -> list[Tensor]:
        """Return the joined maps, finest first, (B, E_i, *S_i).

        Args:
            maps: Of the names that are there.
            batch: Says which items have which modality.
        """
        if not self.projections:
            return maps[self.names[0]]
        there = [name for name in self.names if name in maps]
        if not there:
            raise ConfigError(
                f"None of {', '.join(self.names)} is in the batch, which has maps of "
                f"{', '.join(maps) or 'nothing'}."
            )
        present = torch.stack([self._present(name, maps, batch) for name in there])  # (M, B)
        weights = present / present.sum(0).clamp(min=1)
        joined = []
        for i in range(len(self.levels)):
            size = tuple(maps[there[0]][i].shape[2:])
            total: Tensor | None = None
            for name, weight in zip(there, weights, strict=True):
                projection = self.get_submodule(f"projections.{name}.{i}")
                values = resized(projection(maps[name][i]), size)
                values = values * weight.to(values.dtype).view(-1, *(1,) * (values.ndim - 1))
                total = values if total is None else total + values
            assert total is not None
            joined.append(total)
        return joined

    def _present(self, name: str, maps: Maps, batch: Mapping[str, Any]) -> Tensor:
        """Return which items a name says something about, float (B,)."""
        values = maps[name][0]
        if name in batch:
            return present_mask(batch, name).float()
        return torch.ones(values.shape[0], device=values.device)  # `joint` stands on what is there
