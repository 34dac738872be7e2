"""Predict numbers of an item or of every pixel, such as age, canopy height or biomass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics import regression as scores

from domainssl.backbones.base import Backbone
from domainssl.distributed import global_mean
from domainssl.errors import ConfigError, DataError, nearest
from domainssl.modality import Batch, Modality
from domainssl.options import as_dataclass
from domainssl.tasks.base import Task
from domainssl.tasks.dense import DenseHead, DenseMaps, Tiles
from domainssl.tasks.per_class import metric_collection
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


class _R2(scores.R2Score):
    """R² summed in float64; NaN below two numbers, for which there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.set_dtype(torch.float64)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add predicted and true numbers, (N,) each."""
        if len(preds):
            super().update(preds.double(), target.double())

    def compute(self) -> Tensor:
        """Return R² of all that was added."""
        if int(self.total) < 2:
            return self.residual.new_full((), torch.nan)
        return super().compute()


class RegressionTask(DenseMaps, Task):
    """Predict the numbers in `batch.target`; NaN is unknown.

    Those of items are float (B,) or (B, K), those of pixels, with `dense`, (B, *S) or (B, K, *S).

    Args:
        backbone: What `load_backbone` reads, or `recipe:NAME` for random weights; see `Task`.
        modalities: Those of the data; the CLI takes them from there.
        targets: Names of the numbers; one for (B,) and (B, *S).
        head: How features become the numbers of an item.
        dense: How maps of features become the numbers of every pixel or voxel; None predicts
            those of items.
        tiles: With `dense`, judge held-out items in windows; None takes them whole.
        loss: What is minimised, and in which unit.
        tuning: What is trained of the backbone.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory, and what is checked.
        context_size: Size of the windows that the data yield; None for any.

    Raises:
        ConfigError: The head does not fit the backbone, or `tiles` are given without `dense`.
    """

    kind: ClassVar[str] = "regression"

    def __init__(
        self,
        backbone: str | Mapping[str, Any] | Backbone,
        *,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        targets: Sequence[str] = ("target",),
        head: PooledHead | Mapping[str, Any] = PooledHead(),
        dense: DenseHead | Mapping[str, Any] | None = None,
        tiles: Tiles | Mapping[str, Any] | None = None,
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
        self.is_dense = dense is not None
        self.head: nn.Module
        if dense is not None:
            self._read_maps(as_dataclass(DenseHead, dense), tiles, context_size)
            return
        if tiles is not None:
            raise ConfigError(
                "model.init_args.tiles: windows are those of maps; set model.init_args.dense.name "
                "to predict the numbers of every pixel, or leave tiles out."
            )
        self.head = ItemHead(as_dataclass(PooledHead, head), self.backbone, len(self.classes))

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the numbers in units of the targets, float32 (B, K), (B, K, *S) with `dense`."""
        if self.is_dense:
            found = self._map_logits(batch)
        else:
            found = self.head(self.features(dict(batch)), batch)
        return found * self.loss.std + self.loss.mean

    def with_weights(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the numbers of items and how much every token counted; not with `dense`."""
        assert isinstance(self.head, ItemHead)
        found, weights = self.head.with_weights(self.features(dict(batch)), batch)
        return found * self.loss.std + self.loss.mean, weights

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the numbers; those of held-out items in windows, where `tiles` says so."""
        is_whole = self.training or not self.is_dense
        return self.logits(batch) if is_whole else self._tiled(batch)

    def losses(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the one loss, under its name."""
        return {self.loss.name: number_loss(logits, self._target(logits, batch), self.loss)}

    def metrics(self) -> MetricCollection:
        """Return mean absolute and root mean squared error, R² and explained variance."""
        return metric_collection(
            mae=scores.MeanAbsoluteError(),
            rmse=scores.MeanSquaredError(squared=False),
            r2=_R2(),
            explained_variance=scores.ExplainedVariance(),
        )

    def scored(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the predicted and the true numbers that are known, (N,)."""
        target = self._target(logits, batch)
        known = torch.isfinite(target)
        return logits[known], target[known]

    def predictions(self, logits: Tensor) -> dict[str, Tensor]:
        """Return the numbers by their names, (B,) or (B, *S) each."""
        return dict(zip(self.classes, logits.unbind(1), strict=True))

    def rows(self, logits: Tensor, batch: Batch) -> dict[str, Any]:
        """Return true and predicted numbers by item; maps write nothing."""
        if self.is_dense:
            return {}
        target = self._target(logits, batch)
        found: dict[str, Any] = {}
        for i, name in enumerate(self.classes):
            found[name] = target[:, i]
            found[f"{name} (predicted)"] = logits[:, i]
        return found

    def _target(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the targets, as the logits are.

        Raises:
            DataError: They are missing, or of another shape.
        """
        given = self.label_of(batch, "target")
        target = given.float()
        target = target.unsqueeze(1) if target.ndim == logits.ndim - 1 else target
        if target.shape != logits.shape:
            raise DataError(
                f"batch.target: got shape {tuple(given.shape)}, expected {tuple(logits.shape)} for "
                f"{', '.join(self.classes)}. Name what the data yield in model.init_args.targets; "
                "numbers of pixels want model.init_args.dense."
            )
        return target
