"""Segment images, series and volumes: a class for every pixel or voxel.

task = SegmentationTask("runs/ct/backbone", modalities=data.modalities, classes=data.classes)
task.logits({"ct": volume})                      # (B, K, X, Y, Z)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics import classification as scores

from domainssl.backbones.base import Backbone
from domainssl.distributed import global_mean
from domainssl.errors import ConfigError, DataError, nearest, require
from domainssl.modality import Batch, Modality
from domainssl.options import as_dataclass
from domainssl.tasks.base import Task, as_class_weights
from domainssl.tasks.classification import ClassLoss, class_loss
from domainssl.tasks.dense import DenseHead, DenseMaps, Tiles
from domainssl.tasks.per_class import metric_collection
from domainssl.tasks.tuning import Tuning
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = ["SegmentationLoss", "SegmentationTask"]

Terms = Literal["cross_entropy", "focal", "dice", "dice_ce"]


@dataclass(frozen=True, kw_only=True)
class SegmentationLoss:
    """What is minimised; pixels of the label -1 count for nothing.

    Attributes:
        name: `cross_entropy`, `focal`, `dice` (MONAI's, per item and class), or `dice_ce`: the sum
            of Dice and cross entropy.
        gamma: Of `focal`.
        class_weights: One factor per class, of cross entropy and focal; empty counts them alike,
            `balanced` see `ClassLoss`.
        include_background: Class 0 counts in Dice.
    """

    name: Terms = "cross_entropy"
    gamma: float = 2.0
    class_weights: tuple[float, ...] | Literal["balanced"] = ()
    include_background: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_weights", as_class_weights(self.class_weights))
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


class SegmentationTask(DenseMaps, Task):
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
        self.check_class_weights(self.loss.class_weights)
        self._read_maps(as_dataclass(DenseHead, head), tiles, context_size)

    # -- what it says -----------------------------------------------------------------------

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Return one number per class, float32 (B, K, *S), on the pixels of the finest modality.

        Args:
            batch: Raw physical values of any of the modalities.
        """
        return self._map_logits(batch)

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the logits; those of held-out items in windows, where `tiles` says so."""
        return self.logits(batch) if self.training else self._tiled(batch)

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
        """Return Dice and intersection over union of every class, and accuracy over all pixels."""
        common: dict[str, Any] = {
            "num_classes": len(self.classes), "ignore_index": self.ignore_index,
        }  # fmt: skip
        return metric_collection(
            accuracy=scores.MulticlassAccuracy(**common, average="micro"),
            dice_of=scores.MulticlassF1Score(**common, average="none"),
            iou_of=scores.MulticlassJaccardIndex(**common, average="none"),
            confusion=scores.MulticlassConfusionMatrix(**common),
        )

    def means(self) -> Mapping[str, str]:
        """Return `dice` and `iou`, the means over the classes that have labels."""
        return {"dice": "dice_of", "iou": "iou_of"}

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
