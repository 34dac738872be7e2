"""What tasks share that say something about every pixel or voxel: a head over maps, and windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError, nearest
from domainssl.modality import Batch, Modality
from domainssl.nn.norm import GlobalBatchNorm
from domainssl.nn.sliding import Blending, Box, Windows, slide_over
from domainssl.options import as_dataclass
from domainssl.tasks.heads_2d import HEADS_2D
from domainssl.tasks.heads_3d import HEADS_3D
from domainssl.tasks.maps import MapFusion, dense_maps, map_levels

__all__ = ["DenseHead", "DenseMaps", "Tiles"]


@dataclass(frozen=True, kw_only=True)
class DenseHead:
    """How maps of features become logits per pixel.

    Attributes:
        name: Of images and series `linear`, `pyramid`, `unet`, `fpn` or `upernet`; of volumes
            `light`, `unetr` or `swin_unetr`.
        features: Names of the maps that are read; empty takes `joint` where the backbone has it,
            else all.
        width: Channels of the head; None takes its own.
        normalize: Bring every channel of the maps to mean 0 and deviation 1 over the batches first,
            as linear probes do: a head on frozen features then learns at one rate, whatever their
            scale (MAE, He et al. 2022, A.1).
    """

    name: str
    features: tuple[str, ...] = ()
    width: int | None = None
    normalize: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(self.features))
        known = [*HEADS_2D, *HEADS_3D]
        if self.name not in known:
            raise ConfigError(
                f"model.init_args.head.name: got {self.name!r}, expected one of "
                f"{', '.join(known)}.{nearest(self.name, known)}"
            )


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How items larger than a window are judged: in windows, as `predict` sees them.

    Attributes:
        size: Side of a window, one number or one per axis.
        overlap: Share of a window that the next one covers again.
        blending: How windows are joined; see `nn.sliding.Blend`.
    """

    size: int | tuple[int, ...]
    overlap: float = 0.25
    blending: Blending = "gaussian"


class DenseMaps:
    """The part of a `Task` that reads maps of its backbone, (B, K, *S) for K classes or targets.

    Attributes:
        axes: 2 or 3.
        fusion: Makes one pyramid of those of several names.
        norms: Of the maps of that pyramid, or nothing.
        head: Over them.
        tiles: How held-out items are judged; None takes them whole.
    """

    backbone: Backbone
    modalities: dict[str, Modality]
    classes: tuple[str, ...]
    axes: int
    fusion: MapFusion
    norms: nn.ModuleList
    head: nn.Module
    tiles: Tiles | None

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Return what the task says of a batch, float32 (B, K, *S)."""
        raise NotImplementedError

    def _read_maps(
        self,
        chosen: DenseHead,
        tiles: Tiles | Mapping[str, Any] | None,
        context_size: int | tuple[int, ...] | None,
    ) -> None:
        """Build the head and what it reads.

        Raises:
            ConfigError: The head does not fit the backbone.
        """
        self.tiles = None if tiles is None else as_dataclass(Tiles, tiles)
        self.axes = max(m.spatial_dims for m in self.backbone.modalities.values())
        size = self._size(context_size)
        levels = map_levels(self.backbone, size, chosen.features)
        if not chosen.features:
            levels = {"joint": levels["joint"]} if "joint" in levels else levels
        self.fusion = MapFusion(levels)
        if chosen.name == "swin_unetr" and self.fusion.levels[-1].stride == size:
            raise ConfigError(
                "model.init_args.head.name: 'swin_unetr' normalises every map over its cells, but "
                f"the coarsest one of a window of {' x '.join(map(str, size))} has a single cell. "
                "Choose a larger window (data.init_args.window.size), or 'light'."
            )
        self.norms = nn.ModuleList(
            GlobalBatchNorm(level.channels, affine=False) if chosen.normalize else nn.Identity()
            for level in self.fusion.levels
        )
        self.head = self._head(chosen)

    def _size(self, context_size: int | tuple[int, ...] | None) -> tuple[int, ...]:
        if isinstance(context_size, int):
            return (context_size,) * self.axes
        found = context_size or max((m.size for m in self.modalities.values()), default=())
        if not found:
            raise ConfigError(
                "model.init_args.context_size: missing; the head is built for windows of a size."
            )
        return tuple(found)

    def _head(self, chosen: DenseHead) -> nn.Module:
        heads = HEADS_3D if self.axes == 3 else HEADS_2D
        if chosen.name not in heads:
            raise ConfigError(
                f"model.init_args.head.name: {chosen.name!r} is no head for {self.axes} axes, "
                f"expected one of {', '.join(heads)}."
            )
        options: dict[str, Any] = {"width": chosen.width} if chosen.width else {}
        if self.axes == 3:
            options["channels"] = sum(m.num_channels for m in self.backbone.modalities.values())
        return heads[chosen.name](self.fusion.levels, len(self.classes), **options)

    def _map_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Return what the head says, float32 (B, K, *S), on the pixels of the finest modality."""
        maps = dense_maps(self.backbone, batch, joint="joint" in self.fusion.names)
        if "joint" in self.fusion.names and len(maps) == 1:  # of one modality, they are its own
            maps.setdefault("joint", next(iter(maps.values())))
        joined = self._joined(maps, batch)
        target: Any = self._image(batch) if self.axes == 3 else self._pixels(batch)
        found: Tensor = self.head(joined, target)
        return found.float()

    def _joined(self, maps: Mapping[str, Any], batch: Mapping[str, Any]) -> list[Tensor]:
        """Return one pyramid of the maps that are read, (B, E_i, *S_i) each."""
        joined = self.fusion({n: m for n, m in maps.items() if n in self.fusion.names}, batch)
        return [norm(values) for norm, values in zip(self.norms, joined, strict=True)]

    def _pixels(self, batch: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the size of the batch on the pixels of the finest modality."""
        known = self.backbone.modalities
        finest = [min(each) for each in zip(*(m.steps for m in known.values()), strict=True)]
        name = min((n for n in known if n in batch), key=lambda n: known[n].steps)
        sides = batch[name].shape[-self.axes :]
        return tuple(
            _times(side, step / least)
            for side, step, least in zip(sides, known[name].steps, finest, strict=True)
        )

    def _image(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the normalised contrasts one after the other, (B, C, *S); zeros where absent."""
        values = self.backbone.normalize(batch)
        first = next(values[name] for name in self.backbone.modalities if name in values)
        parts = []
        for name, modality in self.backbone.modalities.items():
            empty = first.new_zeros(first.shape[0], modality.num_channels, *first.shape[2:])
            parts.append(values.get(name, empty))
        return torch.cat(parts, 1)

    def _tiled(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the logits of all items, each from windows where `tiles` says so."""
        tiles = self.tiles
        if tiles is None:
            return self.logits(batch)
        shape, found = self._pixels(batch), []
        windows = Windows(shape, tiles.size, tiles.overlap)
        values = next(batch[name] for name in self.backbone.modalities if name in batch)
        for item in range(len(values)):
            out = torch.empty(len(self.classes), *shape, device=values.device)

            def sink(box: Box, part: Tensor, out: Tensor = out) -> None:
                out[:, *box] = part

            def read(box: Box, item: int = item) -> Batch:
                return self._part(batch, item, box, shape)

            slide_over(read, self.logits, windows, sink, mode=tiles.blending)
            found.append(out)
        return torch.stack(found)

    def _part(self, batch: Mapping[str, Any], item: int, box: Box, shape: tuple[int, ...]) -> Batch:
        """Return the batch of one item and box."""
        out: Batch = {}
        for name, value in batch.items():
            modality, _, companion = name.partition(".")
            if modality not in self.backbone.modalities or not isinstance(value, Tensor):
                continue
            own = value[item : item + 1]
            if companion in ("", "valid"):
                place: tuple[Any, ...] = tuple(
                    slice(s.start * side // n, s.stop * side // n)
                    for s, side, n in zip(box, own.shape[-self.axes :], shape, strict=True)
                )
                own = own[(..., *place)]
            out[name] = own
        return out


def _times(side: int, factor: float) -> int:
    """Return a side in other pixels; whole factors leave the side of a graph free."""
    return side * round(factor) if factor == round(factor) else round(side * factor)
