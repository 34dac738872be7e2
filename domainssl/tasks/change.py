"""Find what changed between two dates of a place: one backbone sees both, a head compares them.

task = ChangeDetectionTask("runs/cubes", modalities=data.modalities, classes=names, head=head)
task.logits(batch)            # s2 (B, 2, C, H, W) -> (B, K, H, W)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError, DataError, nearest
from domainssl.modality import Batch, Modality, as_modalities, key
from domainssl.options import as_dataclass
from domainssl.tasks.dense import DenseHead, Tiles
from domainssl.tasks.heads_3d import MapLevel
from domainssl.tasks.maps import dense_maps
from domainssl.tasks.segmentation import SegmentationLoss, SegmentationTask
from domainssl.tasks.tuning import Tuning
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = ["ChangeDetectionTask", "Comparison"]

_MODES = ("difference", "concat")
_PER_DATE = ("", "valid", "dates", "hours")  # companions with an axis of dates
_PAIR = 2


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How the features of two dates are compared.

    Attributes:
        mode: `difference` joins the size of the difference and the product of both dates: their
            order does not matter. `concat` lays the dates side by side.
        width: Channels to which the features of each date are brought first, by the same layers.

    Raises:
        ConfigError: A value lies outside its range.
    """

    mode: Literal["difference", "concat"] = "difference"
    width: int = 32

    def __post_init__(self) -> None:
        if self.mode not in _MODES or self.width < 1:
            raise ConfigError(
                f"model.init_args.comparison: got mode {self.mode!r} and width {self.width!r}, "
                f"expected one of {', '.join(_MODES)} and a width of 1 or more."
                f"{nearest(self.mode, _MODES)}"
            )


class ChangeDetectionTask(SegmentationTask):
    """Classify what happened to every pixel between two dates, by `batch.mask`; -1 counts not.

    Batches hold series of exactly two dates. The backbone is one of images: it sees each date by
    itself. Modalities without dates, such as terrain, are shown with both.

    Args:
        backbone: What `load_backbone` reads, or `recipe:NAME` for random weights; see `Task`.
        modalities: Those of the data; the CLI takes them from there.
        classes: Names by number, such as unchanged and changed; the CLI takes them from the data.
        head: How compared maps become a class per pixel.
        comparison: How the features of the dates are compared.
        loss: What is minimised.
        tiles: Judge held-out items in windows; None takes them whole.
        tuning: What is trained of the backbone.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory, and what is checked.
        context_size: Size of the windows that the data yield.

    Raises:
        ConfigError: No modality has dates, or the head does not fit the backbone.
    """

    kind: ClassVar[str] = "change"

    def __init__(
        self,
        backbone: str | Mapping[str, Any] | Backbone,
        *,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        classes: Sequence[str],
        head: DenseHead | Mapping[str, Any],
        comparison: Comparison | Mapping[str, Any] = Comparison(),
        loss: SegmentationLoss | Mapping[str, Any] = SegmentationLoss(),
        tiles: Tiles | Mapping[str, Any] | None = None,
        tuning: Tuning | Mapping[str, Any] = Tuning(),
        optimization: Optimization | Mapping[str, Any] = Optimization(),
        execution: Execution | Mapping[str, Any] = Execution(),
        context_size: int | tuple[int, ...] | None = None,
    ) -> None:
        self.comparison = as_dataclass(Comparison, comparison)
        known = as_modalities(modalities)
        self.dated = tuple(name for name, m in known.items() if m.kind == "series")
        if not self.dated:
            raise ConfigError(
                "ChangeDetectionTask compares two dates, but no modality of the data has dates: "
                f"{', '.join(f'{n} ({m.kind})' for n, m in known.items())}. Set "
                "data.init_args.dates.mode: all, with two dates per item."
            )
        super().__init__(
            backbone,
            modalities=_images(known),
            classes=classes,
            head=head,
            loss=loss,
            tiles=tiles,
            tuning=tuning,
            optimization=optimization,
            execution=execution,
            context_size=context_size,
        )
        self.modalities = known  # those of the data; the backbone knows them as images

    def _head(self, chosen: DenseHead) -> nn.Module:
        """Build the layers that compare the dates, and the head over what they find."""
        levels, width = self.fusion.levels, self.comparison.width
        conv: Any = nn.Conv3d if self.axes == 3 else nn.Conv2d
        self.projections = nn.ModuleList(
            nn.Sequential(conv(level.channels, 2 * width, 1), nn.GELU(), conv(2 * width, width, 1))
            for level in levels
        )
        self.fusion.levels = [MapLevel(2 * width, level.stride) for level in levels]
        return super()._head(chosen)

    def check(self, modalities: Mapping[str, Modality]) -> None:
        """Compare the data with the backbone, which sees each date as an image."""
        super().check(_images(modalities))

    def look_at_batch(self, batch: Any, dataloader_idx: int) -> None:
        """Look at the units of the first date."""
        super().look_at_batch(self.date(batch, 0), dataloader_idx)

    def date(self, batch: Mapping[str, Any], which: int) -> Batch:
        """Return the batch of one date, images (B, C, *S) instead of series.

        Raises:
            DataError: There are not two dates.
        """
        found: Batch = {}
        for name, value in batch.items():
            modality, _, companion = name.partition(".")
            if modality not in self.dated or companion not in (*_PER_DATE, "frames"):
                found[name] = value
                continue
            if value.shape[1] != _PAIR:
                raise DataError(
                    f"batch.{name}: got {value.shape[1]} dates, but change is between two. Choose "
                    "two per item in the DataModule, by data.init_args.dates."
                )
            if companion != "frames":
                found[name] = value[:, which]
        return found

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Return one number per class, float32 (B, K, *S), from series of two dates."""
        before, after = (self._seen(self.date(batch, which)) for which in range(_PAIR))
        maps = [self._compared(a, b) for a, b in zip(before, after, strict=True)]
        target: Any = self._pixels(batch)
        if self.axes == 3:
            target = self._image(self.date(batch, 1))
        found: Tensor = self.head(maps, target)
        return found.float()

    def _seen(self, batch: Batch) -> list[Tensor]:
        """Return the projected maps of one date, (B, width, *S_i)."""
        names = self.fusion.names
        maps = dense_maps(self.backbone, batch, joint="joint" in names)
        joined = self._joined(maps, batch)
        return [layer(m) for layer, m in zip(self.projections, joined, strict=True)]

    def _compared(self, before: Tensor, after: Tensor) -> Tensor:
        if self.comparison.mode == "concat":
            return torch.cat([before, after], 1)
        return torch.cat([(before - after).abs(), before * after], 1)

    def _target(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the classes of pixels; those of items that lack a date do not count."""
        target = super()._target(logits, batch)
        for name in self.dated:
            frames = batch.get(key(name, "frames"))
            if frames is not None:
                whole = frames.all(1).view(-1, *(1,) * (target.ndim - 1))
                target = torch.where(whole, target, torch.full_like(target, self.ignore_index))
        return target


def _images(modalities: Mapping[str, Modality]) -> dict[str, Modality]:
    """Return the modalities as one date shows them."""
    return {
        name: replace(m, kind="volume" if m.spatial_dims == 3 else "image")
        if m.kind == "series"
        else m
        for name, m in modalities.items()
    }
