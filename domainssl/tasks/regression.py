"""Predict numbers of an item, such as age, biomass or survival time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics import regression as scores

from domainssl.backbones.base import Backbone
from domainssl.distributed import global_mean
from domainssl.errors import ConfigError, DataError, nearest
from domainssl.modality import Batch, Modality
from domainssl.options import as_dataclass
from domainssl.tasks.base import Task, metric_collection
from domainssl.tasks.pooled import ItemHead, PooledHead
from domainssl.tasks.tuning import Tuning
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = ["NumberLoss", "RegressionTask", "number_loss"]

_NAMES = ("squared", "absolute", "huber")


@dataclass(frozen=True, kw_only=True)
class NumberLoss:
    """What is minimised, and the unit it is minimised in.

    Attributes:
        name: `squared`, `absolute` or `huber` difference.
        mean: Of the targets in training; predictions start there.
        std: Of the targets in training; differences are counted in it.

    Raises:
        ConfigError: A value lies outside its range.
    """

    name: Literal["squared", "absolute", "huber"] = "squared"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in _NAMES:
            raise ConfigError(
                f"model.init_args.loss.name: got {self.name!r}, expected one of {_NAMES}."
                f"{nearest(self.name, _NAMES)}"
            )
        if self.std <= 0:
            raise ConfigError(
                f"model.init_args.loss.std: got {self.std!r}, expected a positive number."
            )


def number_loss(predicted: Tensor, target: Tensor, options: NumberLoss) -> Tensor:
    """Return the mean over the known targets of all ranks, in float32; NaN is unknown.

    Args:
        predicted: In units of the targets, any shape.
        target: Of the same shape.
        options: See `NumberLoss`.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        known = torch.isfinite(target)
        filled = torch.where(known, target.float(), predicted.detach().float())
        distance = {"squared": F.mse_loss, "absolute": F.l1_loss, "huber": F.smooth_l1_loss}
        loss = distance[options.name](
            predicted.float() / options.std, filled / options.std, reduction="none"
        )
        return global_mean((loss * known).sum(), known.sum())


class RegressionTask(Task):
    """Predict the numbers in `batch.target`, float (B,) or (B, K); NaN is unknown.

    Args:
        backbone: What `load_backbone` reads, or `recipe:NAME` for random weights; see `Task`.
        modalities: Those of the data; the CLI takes them from there.
        targets: Names of the numbers; one for (B,).
        head: How features become a prediction.
        loss: What is minimised, and in which unit.
        tuning: What is trained of the backbone.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory, and what is checked.
        context_size: Size of the windows that the data yield; None for any.
    """

    kind: ClassVar[str] = "regression"

    def __init__(
        self,
        backbone: str | Mapping[str, Any] | Backbone,
        *,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        targets: Sequence[str] = ("target",),
        head: PooledHead | Mapping[str, Any] = PooledHead(),
        loss: NumberLoss | Mapping[str, Any] = NumberLoss(),
        tuning: Tuning | Mapping[str, Any] = Tuning(),
        optimization: Optimization | Mapping[str, Any] = Optimization(),
        execution: Execution | Mapping[str, Any] = Execution(),
        context_size: int | tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(
            backbone,
            modalities=modalities,
            classes=targets,
            tuning=tuning,
            optimization=optimization,
            execution=execution,
            context_size=context_size,
        )
        if not self.classes:
            raise ConfigError("model.init_args.targets: got none, expected a name or more.")
        self.loss = as_dataclass(NumberLoss, loss)
        self.head = ItemHead(as_dataclass(PooledHead, head), self.backbone, len(self.classes))

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the numbers in units of the targets, float32 (B, K)."""
        found: Tensor = self.head(self.features(dict(batch)), batch)
        return found * self.loss.std + self.loss.mean

    def losses(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the one loss, under its name."""
        return {self.loss.name: number_loss(logits, self._target(batch), self.loss)}

    def metrics(self) -> MetricCollection:
        """Return mean absolute error, root of the mean squared error, and explained variance."""
        return metric_collection(
            mae=scores.MeanAbsoluteError(),
            rmse=scores.MeanSquaredError(squared=False),
            explained_variance=scores.ExplainedVariance(),
        )

    def scored(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the predicted and the true numbers that are known, (N,)."""
        target = self._target(batch)
        known = torch.isfinite(target)
        return logits[known], target[known]

    def predictions(self, logits: Tensor) -> dict[str, Tensor]:
        """Return the numbers by their names, (B,) each."""
        return dict(zip(self.classes, logits.unbind(1), strict=True))

    def rows(self, logits: Tensor, batch: Batch) -> dict[str, Any]:
        """Return true and predicted numbers by item."""
        target = self._target(batch)
        found: dict[str, Any] = {}
        for i, name in enumerate(self.classes):
            found[name] = target[:, i]
            found[f"{name} (predicted)"] = logits[:, i]
        return found

    def _target(self, batch: Batch) -> Tensor:
        """Return the targets (B, K).

        Raises:
            DataError: They are missing, or of another shape.
        """
        target = self.label_of(batch, "target").float()
        target = target.unsqueeze(1) if target.ndim == 1 else target
        if target.ndim != 2 or target.shape[1] != len(self.classes):
            raise DataError(
                f"batch.target: got shape {tuple(batch['target'].shape)}, expected "
                f"(B, {len(self.classes)}): {', '.join(self.classes)}. Name what the data yield in "
                "model.init_args.targets."
            )
        return target
