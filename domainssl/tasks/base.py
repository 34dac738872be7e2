"""What every supervised use of a backbone shares: where it starts, what is tuned, its metrics.

A task builds its head, and implements `logits`, `losses` and `metrics`. Optimiser, schedule, exact
resume, guards and sharding are those of pretraining (`training/module.py`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from domainssl.arguments import class_name, class_of, plain
from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError, DataError, nearest
from domainssl.modality import Batch, Modality, as_modalities
from domainssl.options import as_dataclass
from domainssl.tasks.per_class import labelled, shown_classes, with_means
from domainssl.tasks.starting import starting_backbone, warn_if_random
from domainssl.tasks.tuning import Tuning, apply_tuning
from domainssl.training.execution import Execution
from domainssl.training.module import Generators, Step, TrainingModule
from domainssl.training.optimization import Optimization

__all__ = ["BALANCED", "Task", "as_class_weights"]

logger = logging.getLogger(__name__)

BALANCED = "balanced"
_SHOWN = 8  # names in a message


class Task(TrainingModule):
    """Base of all tasks.

    A subclass calls `super().__init__` and builds its head from `self.backbone`.

    Args:
        backbone: What `load_backbone` reads (the folder of an export or of a run, a checkpoint,
            `hf://…`), `recipe:NAME` for the architecture of a recipe with random weights, a
            backbone, or name and arguments of one.
        modalities: Those of the data; the CLI takes them from there.
        classes: Names by number; the CLI takes them from the data, where they know them.
        tuning: What is trained of the backbone.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory, and what is checked.
        context_size: Size of the windows that the data yield; None for any.

    Attributes:
        kind: `classification`, `segmentation`, `regression` or `change`.
        classes: Names by number; empty where there are none.
        ignore_index: Label of what counts for nothing, neither in losses nor in metrics.
        results: By split the last metrics of all ranks: (), per class (K,), matrices (K, K).
    """

    kind: ClassVar[str]
    ignore_index: ClassVar[int] = -1
    classes_from: ClassVar[str] = "classes"  # property of the data that names them
    forward_methods: ClassVar[tuple[str, ...]] = ("features", "logits")

    def __init__(
        self,
        backbone: str | Mapping[str, Any] | Backbone,
        *,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        classes: Sequence[str] = (),
        tuning: Tuning | Mapping[str, Any] | None = None,
        optimization: Optimization | Mapping[str, Any] | None = None,
        execution: Execution | Mapping[str, Any] | None = None,
        context_size: int | tuple[int, ...] | None = None,
    ) -> None:
        self.arguments["tuning"] = plain(as_dataclass(Tuning, tuning or Tuning()))
        super().__init__(optimization=optimization, execution=execution, context_size=context_size)
        self.tuning = as_dataclass(Tuning, tuning or Tuning())
        if self.tuning.layer_decay is not None:
            self.optimization = dataclasses.replace(
                self.optimization, layer_decay=self.tuning.layer_decay
            )
        self.modalities = as_modalities(modalities)
        self.classes = tuple(str(name) for name in classes)
        if len(set(self.classes)) < len(self.classes):
            raise ConfigError(
                f"model.init_args.classes: {list(self.classes)} names a class twice; every number "
                "has a name of its own."
            )
        self.backbone = starting_backbone(backbone, self.modalities, context_size)
        self.backbone.train()
        apply_tuning(self.backbone, self.tuning)
        self._unused: list[nn.Parameter] | None = None
        self._watched: dict[str, MetricCollection] = {}
        self._told: set[str] = set()
        self._has_begun = False
        self.results: dict[str, dict[str, Tensor]] = {}

    # -- what a subclass implements ---------------------------------------------------------

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Return what the head says of raw physical values, float32 (B, K) or (B, K, *S).

        Modalities may be absent. In evaluation mode nothing is random.
        """
        raise NotImplementedError

    def losses(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the losses, scalar float32 per term, as means over the labels of all ranks."""
        raise NotImplementedError

    def metrics(self) -> MetricCollection:
        """Return new metrics of `torchmetrics`, by name.

        Those that return (K,) are logged per class, without `_of` at the end of their name; those
        that return (K, K) are written by `ResultTables`. Where there is a `confusion`, (K, K) or of
        several labels (K, 2, 2), it tells which classes have labels; the others have no metrics.
        Means over classes are named by `means`.
        """
        raise NotImplementedError

    def means(self) -> Mapping[str, str]:
        """Return the means over the classes that have labels: its name, and the metric per class.

        Means of `torchmetrics` count a class that has no label, and is predicted somewhere, as 0.
        """
        return {}

    def computed(self, watched: MetricCollection) -> dict[str, Tensor]:
        """Return the values of `metrics`, of all ranks, and of `means`."""
        return with_means(watched.compute(), self.means())

    def scored(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what the metrics compare: predictions and targets."""
        raise NotImplementedError

    def predictions(self, logits: Tensor) -> dict[str, Tensor]:
        """Return what is predicted, by the name of a column, (B,) or (B, …) each."""
        raise NotImplementedError

    def rows(self, logits: Tensor, batch: Batch) -> dict[str, Any]:
        """Return what a test writes about every item, by column; maps write nothing."""
        return {}

    # -- the loop ---------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the logits; see `logits`."""
        return self.logits(batch)

    def compute(self, batch: Batch, generators: Generators) -> Step:
        """Return the losses, and the logits for the metrics."""
        logits = self(batch)
        losses = self.losses(logits, batch)
        if torch.is_grad_enabled() and not self._is_sharded:
            self._connect(losses)
        return Step(losses, {"logits": logits.detach()})

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.tuning.mode == "frozen":
            self.backbone.eval()
        return self

    def setup(self, stage: str) -> None:
        """Compare the task with the data, and count their classes where weights follow them."""
        super().setup(stage)
        loss: Any = getattr(self, "loss", None)
        if getattr(loss, "class_weights", None) == BALANCED:
            self.loss = dataclasses.replace(loss, class_weights=self._balanced_weights())
            weights = list(self.loss.class_weights)
            self.arguments["loss"] = {**self.arguments["loss"], "class_weights": weights}
            told = ", ".join(f"{c} {w:.3g}" for c, w in zip(self.classes, weights, strict=True))
            logger.warning("model.init_args.loss.class_weights: balanced gives %s", told)

    def _balanced_weights(self) -> tuple[float, ...]:
        """Return `N / (K n)` of each class with n of the N training labels, 0 without any."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "class_counts"):
            raise ConfigError(
                "model.init_args.loss.class_weights: 'balanced' counts the labels of a DataModule "
                "of this library. Fit with one, or give one factor per class."
            )
        label = "label" if self.kind == "classification" else "mask"
        counts = data.class_counts(label, self.classes)
        there = sum(count > 0 for count in counts)
        if there == 0:
            raise DataError(
                "model.init_args.loss.class_weights: 'balanced' found no training item with a "
                "label. Give one factor per class, or check data.init_args.labels."
            )
        return tuple(sum(counts) / (there * count) if count else 0.0 for count in counts)

    def on_fit_start(self) -> None:
        """Set the mode of all parts: a backbone that was loaded is in evaluation mode."""
        self.train()
        self._tell_start()

    def on_validation_start(self) -> None:
        """Tell random weights."""
        self._tell_start()

    def on_test_start(self) -> None:
        """Tell random weights."""
        self._tell_start()

    def _tell_start(self) -> None:
        """Tell random weights once, where they are used: no checkpoint has replaced them."""
        if not self._has_begun and not self.trainer.ckpt_path and self.trainer.is_global_zero:
            warn_if_random(self.arguments["backbone"])
        self._has_begun = True

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the loss, and take the batch into the metrics."""
        self._judge(batch, batch_idx, dataloader_idx, "val")

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all ranks."""
        self._log_metrics("val")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Log the loss, take the batch into the metrics, and return its rows by column."""
        logits = self._judge(batch, batch_idx, dataloader_idx, "test")
        rows = self.rows(logits, batch)
        return {"id": list(batch["id"]), **rows} if rows and "id" in batch else rows

    def on_test_epoch_end(self) -> None:
        """Log the metrics of all ranks."""
        self._log_metrics("test")

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return predictions by name, with `id` where the batch has it."""
        found: dict[str, Any] = dict(self.predictions(self.logits(batch)))
        return {**({"id": batch["id"]} if "id" in batch else {}), **found}

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield what is trained by this modality alone, in the backbone and in the head."""
        yield from super().modality_parameters(name)
        for part in self.children():
            own = getattr(part, "modality_parameters", None)
            if own is not None and part is not self.backbone:
                yield from own(name)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave weights alone that no loss depends on, or whose modality no rank has seen."""
        super().on_before_optimizer_step(optimizer)
        for parameter in self._unused or ():
            parameter.grad = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `load_task` needs; `load_backbone` does not read backbones with adapters."""
        super().on_save_checkpoint(checkpoint)
        facts = {key: checkpoint["backbone"][key] for key in ("name", "arguments")}
        checkpoint["task"] = {"name": class_name(class_of(self)), "backbone": facts}
        if self.tuning.mode == "lora":
            del checkpoint["backbone"]

    # -- helpers ----------------------------------------------------------------------------

    def _judge(self, batch: Batch, batch_idx: int, dataloader_idx: int, split: str) -> Tensor:
        step = self._held_out_step(batch, batch_idx, dataloader_idx, split)
        if split not in self._watched:
            self._watched[split] = self.metrics().to(self.device)
        logits: Tensor = step.outputs["logits"]
        self._watched[split].update(*self.scored(logits, batch))
        return logits

    def _log_metrics(self, split: str) -> None:
        watched = self._watched.get(split)
        if watched is None:
            return
        self.results[split] = {n: v.detach().cpu() for n, v in self.computed(watched).items()}
        self._tell_unlabelled(split)
        for name, value in self.named_results(self.results[split]).items():
            self.log(f"{split}/{name}", value, batch_size=1, prog_bar="/" not in name)
        watched.reset()

    def named_results(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return metrics by name, one per class as `<metric>/<class>`; matrices are left out.

        Classes without a label have no metrics of their own: they would be 0, as of a model that
        never finds them.
        """
        named = {name: value for name, value in found.items() if value.ndim == 0}
        for name, value in found.items():
            if value.ndim == 1:
                own, is_shown = name.removesuffix("_of"), shown_classes(found, name)
                for c, v, shown in zip(self.classes, value, is_shown, strict=True):
                    if shown:
                        named[f"{own}/{c}"] = v
        return named

    def _tell_unlabelled(self, split: str) -> None:
        """Tell once which classes have no label in a split."""
        counts = labelled(self.results[split])
        if counts is None or split in self._told or self.trainer.sanity_checking:
            return
        self._told.add(split)
        empty = [c for c, count in zip(self.classes, counts, strict=True) if not count]
        if empty and self.trainer.is_global_zero:
            shown = ", ".join(empty[:_SHOWN]) + (", …" if len(empty) > _SHOWN else "")
            logger.warning(
                "%s: %d of %d classes have no label (%s) and get no metrics of their own",
                split, len(empty), len(self.classes), shown,
            )  # fmt: skip

    def label_of(self, batch: Batch, name: str) -> Tensor:
        """Return a supervised entry of a batch.

        Raises:
            DataError: The data do not yield it.
        """
        if name not in batch:
            raise DataError(
                f"{type(self).__name__} learns from batch.{name}, which the data do not yield; "
                f"batches hold {', '.join(batch)}. Set data.init_args.labels, or choose data with "
                "labels."
            )
        value: Tensor = batch[name]
        return value

    def check_class_weights(self, weights: Sequence[float] | str) -> None:
        """Refuse weights for another number of classes; none count all alike.

        Raises:
            ConfigError: They are not one per class.
        """
        if weights and weights != BALANCED and len(weights) != len(self.classes):
            raise ConfigError(
                f"model.init_args.loss.class_weights: got {len(weights)}, expected one per class: "
                f"{', '.join(self.classes)}."
            )

    def _connect(self, losses: dict[str, Tensor]) -> None:
        """Let every weight take part in the loss, as DistributedDataParallel asks for.

        Which ones take none, such as a mask token, is looked up in the first graph; their gradients
        are zero and are taken away before the optimiser sees them.
        """
        if self._unused is None:
            reached = _reached(losses.values())
            trained = [p for p in self.parameters() if p.requires_grad]
            self._unused = [p for p in trained if id(p) not in reached]
        if self._unused:
            name = next(iter(losses))
            nothing = torch.stack([p.flatten()[0] for p in self._unused]).sum() * 0
            losses[name] = losses[name] + nothing


def _reached(tensors: Any) -> set[int]:
    """Return the ids of the leaves that a graph leads to."""
    waiting = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(waiting)
    found: set[int] = set()
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def as_class_weights(weights: Sequence[float] | str) -> tuple[float, ...] | Literal["balanced"]:
    """Return class weights as options hold them.

    Raises:
        ConfigError: They are a word other than `balanced`, negative, or all zero.
    """
    where = "model.init_args.loss.class_weights"
    if isinstance(weights, str):
        if weights != BALANCED:
            raise ConfigError(
                f"{where}: got {weights!r}, expected one factor per class or {BALANCED!r}."
                f"{nearest(weights, (BALANCED,))}"
            )
        return "balanced"
    if any(weight < 0 for weight in weights) or (weights and not any(weights)):
        raise ConfigError(
            f"{where}: got {list(weights)}, expected factors of zero or more, not all zero."
        )
    return tuple(weights)
