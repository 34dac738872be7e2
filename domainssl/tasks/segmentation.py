"""Segment images, series and volumes: a class for every pixel or voxel.

task = SegmentationTask("runs/ct/backbone", modalities=data.modalities, classes=data.classes)
task.logits({"ct": volume})                      # (B, K, X, Y, Z)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics import classification as scores

from domainssl.backbones.base import Backbone
from domainssl.distributed import global_mean
from domainssl.errors import ConfigError, DataError, nearest, require
from domainssl.modality import Batch, Modality
from domainssl.nn.sliding import Blending, Box, Windows, slide_over
from domainssl.options import as_dataclass
from domainssl.tasks.base import Task, metric_collection
from domainssl.tasks.classification import ClassLoss, class_loss
from domainssl.tasks.heads_2d import HEADS_2D
from domainssl.tasks.heads_3d import HEADS_3D
from domainssl.tasks.maps import MapFusion, dense_maps, map_levels
from domainssl.tasks.tuning import Tuning
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = ["DenseHead", "SegmentationLoss", "SegmentationTask", "Tiles"]

Terms = Literal["cross_entropy", "focal", "dice", "dice_ce"]


@dataclass(frozen=True, kw_only=True)
class DenseHead:
    """How maps of features become a class per pixel.

    Attributes:
        name: Of images and series `linear`, `pyramid`, `unet`, `fpn` or `upernet`; of volumes
            `light`, `unetr` or `swin_unetr`.
        features: Names of the maps that are read; empty takes `joint` where the backbone has it,
            else all.
        width: Channels of the head; None takes its own.
    """

    name: str
    features: tuple[str, ...] = ()
    width: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(self.features))
        known = [*HEADS_2D, *HEADS_3D]
        if self.name not in known:
            raise ConfigError(
                f"model.init_args.head.name: got {self.name!r}, expected one of "
                f"{', '.join(known)}.{nearest(self.name, known)}"
            )


@dataclass(frozen=True, kw_only=True)
class SegmentationLoss:
    """What is minimised; pixels of the label -1 count for nothing.

    Attributes:
        name: `cross_entropy`, `focal`, `dice` (MONAI's, per item and class), or `dice_ce`: the sum
            of Dice and cross entropy.
        gamma: Of `focal`.
        class_weights: One factor per class, of cross entropy and focal; empty counts them alike.
        include_background: Class 0 counts in Dice.
    """

    name: Terms = "cross_entropy"
    gamma: float = 2.0
    class_weights: tuple[float, ...] = ()
    include_background: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_weights", tuple(self.class_weights))
        if self.name not in get_args(Terms):
            raise ConfigError(
                f"model.init_args.loss.name: got {self.name!r}, expected one of "
                f"{', '.join(get_args(Terms))}.{nearest(self.name, get_args(Terms))}"
            )

    @property
    def per_pixel(self) -> ClassLoss | None:
        """The part that is a mean over pixels."""
        if self.name == "dice":
            return None
        name: Any = "focal" if self.name == "focal" else "cross_entropy"
        return ClassLoss(name=name, gamma=self.gamma, class_weights=self.class_weights)


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


class SegmentationTask(Task):
    """Classify every pixel or voxel by `batch.mask`, int64 (B, *S); -1 counts for nothing.

    Args:
        backbone: What `load_backbone` reads, or `recipe:NAME` for random weights; see `Task`.
        modalities: Those of the data; the CLI takes them from there.
        classes: Names by number; the CLI takes them from the data.
        head: How maps of features become a class per pixel.
        loss: What is minimised.
        tiles: Judge held-out items in windows; None takes them whole.
        tuning: What is trained of the backbone.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory, and what is checked.
        context_size: Size of the windows that the data yield.
        reading: How the data read and prepared their files, for `predict`; the CLI takes it from
            them.

    Raises:
        ConfigError: The head does not fit the backbone, or numbers of classes differ.
    """

    kind: ClassVar[str] = "segmentation"
    classes_from: ClassVar[str] = "mask_classes"

    def __init__(
        self,
        backbone: str | Mapping[str, Any] | Backbone,
        *,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        classes: Sequence[str],
        head: DenseHead | Mapping[str, Any],
        loss: SegmentationLoss | Mapping[str, Any] = SegmentationLoss(),
        tiles: Tiles | Mapping[str, Any] | None = None,
        tuning: Tuning | Mapping[str, Any] = Tuning(),
        optimization: Optimization | Mapping[str, Any] = Optimization(),
        execution: Execution | Mapping[str, Any] = Execution(),
        context_size: int | tuple[int, ...] | None = None,
        reading: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            backbone,
            modalities=modalities,
            classes=classes,
            tuning=tuning,
            optimization=optimization,
            execution=execution,
            context_size=context_size,
        )
        if len(self.classes) < 2:
            raise ConfigError(
                f"model.init_args.classes: got {list(self.classes)}, expected two or more names."
            )
        self.reading = reading
        self.loss = as_dataclass(SegmentationLoss, loss)
        weights = len(self.loss.class_weights)
        if weights not in (0, len(self.classes)):
            raise ConfigError(
                f"model.init_args.loss.class_weights: got {weights}, expected one per class: "
                f"{', '.join(self.classes)}."
            )
        self.tiles = None if tiles is None else as_dataclass(Tiles, tiles)
        self.axes = max(m.spatial_dims for m in self.backbone.modalities.values())
        chosen = as_dataclass(DenseHead, head)
        levels = map_levels(self.backbone, self._size(context_size), chosen.features)
        if not chosen.features:
            levels = {"joint": levels["joint"]} if "joint" in levels else levels
        self.fusion = MapFusion(levels)
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

    # -- what it says -----------------------------------------------------------------------

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Return one number per class, float32 (B, K, *S), on the pixels of the finest modality.

        Args:
            batch: Raw physical values of any of the modalities.
        """
        maps = dense_maps(self.backbone, batch, joint="joint" in self.fusion.names)
        if "joint" in self.fusion.names and len(maps) == 1:  # of one modality, they are its own
            maps.setdefault("joint", next(iter(maps.values())))
        joined = self.fusion({n: m for n, m in maps.items() if n in self.fusion.names}, batch)
        target: Any = self._image(batch) if self.axes == 3 else self._pixels(batch)
        found: Tensor = self.head(joined, target)
        return found.float()

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the logits; those of held-out items in windows, where `tiles` says so."""
        if self.training or self.tiles is None:
            return self.logits(batch)
        return self._tiled(batch, self.tiles)

    def _pixels(self, batch: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the size of the batch on the pixels of the finest modality."""
        known = self.backbone.modalities
        finest = [min(each) for each in zip(*(m.steps for m in known.values()), strict=True)]
        name = min((n for n in known if n in batch), key=lambda n: known[n].steps)
        sides = batch[name].shape[-self.axes :]
        return tuple(
            round(side * step / least)
            for side, step, least in zip(sides, known[name].steps, finest, strict=True)
        )

    def _image(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the normalised contrasts one after the other, (B, C, *S); zeros where absent."""
        values = self.backbone.normalize(batch)
        first = next(values[name] for name in self.backbone.modalities if name in values)
        parts = []
        for name, modality in self.backbone.modalities.items():
            empty = first.new_zeros(len(first), modality.num_channels, *first.shape[2:])
            parts.append(values.get(name, empty))
        return torch.cat(parts, 1)

    def _tiled(self, batch: Mapping[str, Any], tiles: Tiles) -> Tensor:
        """Return the logits of all items, each from windows."""
        shape, found = self._pixels(batch), []
        windows = Windows(shape, tiles.size, tiles.overlap)
        count = len(next(batch[name] for name in self.backbone.modalities if name in batch))
        for item in range(count):
            out = torch.empty(len(self.classes), *shape, device=self.device)

            def sink(box: Box, values: Tensor, out: Tensor = out) -> None:
                out[:, *box] = values

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

    # -- how it is judged -------------------------------------------------------------------

    def losses(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the terms by name."""
        target = self._target(logits, batch)
        found: dict[str, Tensor] = {}
        if self.loss.name in ("dice", "dice_ce"):
            found["dice"] = self._dice(logits, target)
        if self.loss.per_pixel is not None:
            name = self.loss.per_pixel.name
            found[name] = class_loss(logits, target, self.loss.per_pixel, self.ignore_index)
        return found

    def _dice(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean of MONAI's Dice loss over items and classes of all ranks."""
        losses = require("monai.losses", "medical")
        with torch.autocast(logits.device.type, enabled=False):
            counted = (target != self.ignore_index).unsqueeze(1)
            number = target.clamp(min=0)
            hot = F.one_hot(number, len(self.classes)).movedim(-1, 1)
            dice = losses.DiceLoss(
                include_background=self.loss.include_background, reduction="none"
            )
            terms = dice(logits.float().softmax(1) * counted, hot.float() * counted)
            return global_mean(terms.sum(), torch.tensor(float(terms.numel()), device=terms.device))

    def metrics(self) -> MetricCollection:
        """Return Dice, intersection over union and accuracy over all pixels, and by class."""
        common: dict[str, Any] = {
            "num_classes": len(self.classes), "ignore_index": self.ignore_index,
        }  # fmt: skip
        return metric_collection(
            dice=scores.MulticlassF1Score(**common, average="macro"),
            iou=scores.MulticlassJaccardIndex(**common, average="macro"),
            accuracy=scores.MulticlassAccuracy(**common, average="micro"),
            dice_of=scores.MulticlassF1Score(**common, average="none"),
            iou_of=scores.MulticlassJaccardIndex(**common, average="none"),
            confusion=scores.MulticlassConfusionMatrix(**common),
        )

    def scored(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return predicted and true classes, (B, *S) each."""
        return logits.argmax(1), self._target(logits, batch)

    def predictions(self, logits: Tensor) -> dict[str, Tensor]:
        """Return the class of every pixel, `predicted` int64 (B, *S)."""
        return {"predicted": logits.argmax(1)}

    def _target(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the classes of pixels.

        Raises:
            DataError: They are missing, of another size, or unknown.
        """
        target = self.label_of(batch, "mask")
        if target.shape != (len(logits), *logits.shape[2:]) or target.is_floating_point():
            raise DataError(
                f"batch.mask: got shape {tuple(target.shape)} of {target.dtype}, expected whole "
                f"numbers {(len(logits), *logits.shape[2:])}, as the finest modality has them."
            )
        if target.device.type == "cpu" and target.numel():
            low, high = int(target.min()), int(target.max())
            if low < self.ignore_index or high >= len(self.classes):
                raise DataError(
                    f"batch.mask: holds values from {low} to {high}, expected -1 or the numbers "
                    f"of {len(self.classes)} classes. Name all in data.init_args.labels."
                )
        return target.long()
