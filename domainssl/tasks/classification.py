"""Classify items: one class each, or any number of labels.

task = ClassificationTask("runs/tiles/backbone", modalities=data.modalities, classes=names)
task.logits({"he": tiles})                       # (B, K)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

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
from domainssl.tasks.per_class import metric_collection
from domainssl.tasks.pooled import ItemHead, PooledHead
from domainssl.tasks.tuning import Tuning
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = ["ClassLoss", "ClassificationTask", "class_loss"]

_NAMES = ("cross_entropy", "focal")
_BINS = 200  # thresholds of curves: memory does not grow with the items


@dataclass(frozen=True, kw_only=True)
class ClassLoss:
    """What is minimised.

    Attributes:
        name: `cross_entropy`, with one sigmoid per class where an item has several labels, or
            `focal`, which counts what is predicted well less (Lin et al. 2017).
        gamma: Of `focal`.
        label_smoothing: Share of the target that goes to all classes alike.
        class_weights: One factor per class; empty counts them alike. `balanced` takes
            `N / (K n)` of classes that n of the N training labels have (scikit-learn's), counted at
            the start.

    Raises:
        ConfigError: A value lies outside its range.
    """

    name: Literal["cross_entropy", "focal"] = "cross_entropy"
    gamma: float = 2.0
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | Literal["balanced"] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_weights", as_class_weights(self.class_weights))
        where = "model.init_args.loss"
        if self.name not in _NAMES:
            raise ConfigError(
                f"{where}.name: got {self.name!r}, expected one of {_NAMES}."
                f"{nearest(self.name, _NAMES)}"
            )
        if not 0 <= self.label_smoothing < 1 or self.gamma < 0:
            raise ConfigError(
                f"{where}: got label_smoothing {self.label_smoothing!r} and gamma {self.gamma!r}, "
                "expected a share in [0, 1) and zero or more."
            )

    def weights_for(self, logits: Tensor) -> Tensor:
        """Return the factor of every class, float32 (K,), on the device of logits (B, K, ...).

        Raises:
            ConfigError: They are `balanced` and not counted yet.
        """
        if isinstance(self.class_weights, str):
            raise ConfigError(
                "model.init_args.loss.class_weights: 'balanced' is counted when training starts. "
                "Use Trainer.fit with a DataModule, or give one factor per class."
            )
        return logits.new_tensor(self.class_weights or [1.0] * logits.shape[1])


def class_loss(logits: Tensor, target: Tensor, options: ClassLoss, ignore: int = -1) -> Tensor:
    """Return the mean over the labelled items, or pixels, of all ranks, in float32.

    Class weights count in the numerator and, as in PyTorch's cross entropy, in the denominator.

    Args:
        logits: (B, K, *S).
        target: int64 (B, *S).
        options: See `ClassLoss`.
        ignore: Label of what does not count.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        weights = options.weights_for(logits)
        counted = target != ignore
        number = torch.where(counted, target, torch.zeros_like(target))
        weight = weights[number] * counted
        loss = F.cross_entropy(
            logits, number, reduction="none", label_smoothing=options.label_smoothing
        )
        if options.name == "focal":
            chance = F.softmax(logits, 1).gather(1, number.unsqueeze(1)).squeeze(1)
            loss = loss * (1 - chance) ** options.gamma
        return global_mean((loss * weight).sum(), weight.sum())


def _label_loss(logits: Tensor, target: Tensor, options: ClassLoss) -> Tensor:
    """Return the mean over the known entries of multi-hot targets, of all ranks; NaN is unknown."""
    with torch.autocast(logits.device.type, enabled=False):
        logits, target = logits.float(), target.float()
        counted = ~torch.isnan(target)
        target = torch.where(counted, target, torch.zeros_like(target))
        smooth = options.label_smoothing
        target = target * (1 - smooth) + smooth / 2
        if options.name == "focal":
            ops = require("torchvision.ops", "finetune")
            loss = ops.sigmoid_focal_loss(logits, target, alpha=-1, gamma=options.gamma)
        else:
            loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        weights = options.weights_for(logits)
        weight = weights * counted
        return global_mean((loss * weight).sum(), weight.sum())


class ClassificationTask(Task):
    """Classify items by `batch.label`: a number per item, or one 0 or 1 per item and class.

    Labels of the second kind may also be called `label_multi`, as datasets deliver them.

    Args:
        backbone: What `load_backbone` reads, or `recipe:NAME` for random weights; see `Task`.
        modalities: Those of the data; the CLI takes them from there.
        classes: Names by number; the CLI takes them from the data.
        multi_label: Items have any number of labels, float (B, K) in the batch; NaN is unknown.
        head: How features become a prediction.
        loss: What is minimised.
        tuning: What is trained of the backbone.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory, and what is checked.
        context_size: Size of the windows that the data yield; None for any.

    Raises:
        ConfigError: There are fewer than two classes, or weights for another number of them.
    """

    kind: ClassVar[str] = "classification"

    def __init__(
        self,
        backbone: str | Mapping[str, Any] | Backbone,
        *,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        classes: Sequence[str],
        multi_label: bool = False,
        head: PooledHead | Mapping[str, Any] = PooledHead(),
        loss: ClassLoss | Mapping[str, Any] = ClassLoss(),
        tuning: Tuning | Mapping[str, Any] = Tuning(),
        optimization: Optimization | Mapping[str, Any] = Optimization(),
        execution: Execution | Mapping[str, Any] = Execution(),
        context_size: int | tuple[int, ...] | None = None,
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
        if len(self.classes) < (1 if multi_label else 2):
            raise ConfigError(
                f"model.init_args.classes: got {list(self.classes)}, expected two or more. "
                "For one yes or no, set multi_label: true or name both classes."
            )
        self.multi_label = multi_label
        self.loss = as_dataclass(ClassLoss, loss)
        self.check_class_weights(self.loss.class_weights)
        self.head = ItemHead(as_dataclass(PooledHead, head), self.backbone, len(self.classes))

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Return one number per class, float32 (B, K), from raw physical values."""
        return self.head(self.features(dict(batch)), batch)  # type: ignore[no-any-return]

    def with_weights(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the logits and how much every token counted; see `ItemHead.with_weights`."""
        return self.head.with_weights(self.features(dict(batch)), batch)

    def losses(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the one loss, under its name."""
        target = self._target(batch)
        if self.multi_label:
            return {self.loss.name: _label_loss(logits, target, self.loss)}
        return {self.loss.name: class_loss(logits, target, self.loss, self.ignore_index)}

    def metrics(self) -> MetricCollection:
        """Return accuracy over all items; F1, area under the ROC curve and others per class."""
        count = len(self.classes)
        if self.multi_label:
            common: dict[str, Any] = {"num_labels": count, "ignore_index": self.ignore_index}
            return metric_collection(
                accuracy=scores.MultilabelAccuracy(**common, average="micro"),
                f1_of=scores.MultilabelF1Score(**common, average="none"),
                precision_of=scores.MultilabelPrecision(**common, average="none"),
                recall_of=scores.MultilabelRecall(**common, average="none"),
                auroc_of=scores.MultilabelAUROC(**common, thresholds=_BINS, average="none"),
                average_precision_of=scores.MultilabelAveragePrecision(
                    **common, thresholds=_BINS, average="none"
                ),
                confusion=scores.MultilabelConfusionMatrix(**common),
            )
        common = {"num_classes": count, "ignore_index": self.ignore_index}
        return metric_collection(
            accuracy=scores.MulticlassAccuracy(**common, average="micro"),
            f1_of=scores.MulticlassF1Score(**common, average="none"),
            precision_of=scores.MulticlassPrecision(**common, average="none"),
            recall_of=scores.MulticlassRecall(**common, average="none"),
            auroc_of=scores.MulticlassAUROC(**common, thresholds=_BINS, average="none"),
            confusion=scores.MulticlassConfusionMatrix(**common),
        )

    def means(self) -> Mapping[str, str]:
        """Return the means over the classes that have labels."""
        own = {"average_precision": "average_precision_of"}
        if not self.multi_label:
            own = {"balanced_accuracy": "recall_of"}
        return {"auroc": "auroc_of", "f1": "f1_of", **own}

    def scored(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return probabilities and labels, unknown ones as `ignore_index`."""
        target = self._target(batch)
        if not self.multi_label:
            return logits.softmax(1), target
        unknown = torch.isnan(target)
        return logits.sigmoid(), target.nan_to_num().long().masked_fill(unknown, self.ignore_index)

    def predictions(self, logits: Tensor) -> dict[str, Tensor]:
        """Return `probability` (B, K) and `predicted`, (B,), or bool (B, K) of several labels."""
        if self.multi_label:
            return {"probability": logits.sigmoid(), "predicted": logits > 0}
        return {"probability": logits.softmax(1), "predicted": logits.argmax(1)}

    def rows(self, logits: Tensor, batch: Batch) -> dict[str, Any]:
        """Return label, prediction and probability per class; classes by their names."""
        found = self.predictions(logits)
        target, predicted = self._target(batch), found["predicted"]
        shown = {"label": self._words(target), "predicted": self._words(predicted)}
        chances = found["probability"].unbind(1)
        return shown | {f"p({c})": v for c, v in zip(self.classes, chances, strict=True)}

    def _words(self, numbers: Tensor) -> list[str]:
        """Return classes by name; empty where there is no label, and joined by `;` for several."""
        if not self.multi_label:
            return [self.classes[i] if i >= 0 else "" for i in numbers.tolist()]
        return [
            ";".join(c for c, has in zip(self.classes, row, strict=True) if has)
            for row in (numbers == 1).tolist()
        ]

    def _target(self, batch: Batch) -> Tensor:
        """Return the labels.

        Raises:
            DataError: They are missing, or of another form.
        """
        is_apart = self.multi_label and "label_multi" in batch  # data may have one class as well
        target = self.label_of(batch, "label_multi" if is_apart else "label")
        target = target.float() if is_apart else target
        count = len(self.classes)
        if self.multi_label and (target.ndim != 2 or target.shape[1] != count):
            raise DataError(
                f"batch.label: got shape {tuple(target.shape)}, expected (B, {count}): one 0 or 1 "
                "per class. For one number per item set model.init_args.multi_label: false."
            )
        if not self.multi_label and (target.ndim != 1 or target.is_floating_point()):
            raise DataError(
                f"batch.label: got shape {tuple(target.shape)} of {target.dtype}, expected whole "
                "numbers (B,). For one 0 or 1 per class set model.init_args.multi_label: true."
            )
        return target
