"""What objectives and tasks share: optimiser, schedule, seeds, resume, guards, checks, sharding.

A subclass builds a backbone and writes `compute`, which turns a batch into losses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor, nn

from domainssl._torch import set_rates
from domainssl.arguments import Recorded, class_name, class_of, plain
from domainssl.backbones.base import Backbone, Features
from domainssl.distributed import all_reduce_sum, rank, world_size
from domainssl.errors import ConfigError
from domainssl.modality import Batch, Modality, as_modalities, sides_of
from domainssl.options import as_dataclass
from domainssl.training._lightning import (
    TransferHook,
    attached_trainer,
    is_end_of_short_epoch,
    is_logging_step,
    record_hyperparameters,
)
from domainssl.training.execution import Execution, apply_execution
from domainssl.training.guard import FiniteGuard, check_resume, check_weights
from domainssl.training.optimization import (
    Optimization,
    clip_gradients,
    decay_weights,
    make_optimizer,
)
from domainssl.training.presence import PresenceRecord
from domainssl.units import UnitCheck

__all__ = ["Generators", "Step", "TrainingModule"]

_SHARED = 2**32 - 1  # stands where the rank stands in the seed
_TRAINING, _VALIDATION = 0, 1


@dataclass(frozen=True)
class Step:
    """What one forward pass returns.

    Attributes:
        losses: Scalar float32 loss per term; their sum is minimised.
        outputs: What `after_step` needs. From an objective on request also `reconstruction`
            {modality: {"input", "visible", "predicted": (B, C, *S) in normalised units}} and
            `embeddings` {modality: (B, E)}.
    """

    losses: dict[str, Tensor]
    outputs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Generators:
    """Sources of randomness of one step, on the module's device.

    Attributes:
        local: Differs between ranks.
        shared: Equal on all ranks.
    """

    local: torch.Generator
    shared: torch.Generator


class TrainingModule(Recorded, TransferHook, LightningModule):
    """A LightningModule over a backbone that trains with our optimiser, checks and resume.

    A subclass calls `super().__init__`, builds its backbone and assigns it to `self.backbone`.
    Everything random in `compute` comes from its generators.

    Args:
        optimization: Optimiser and schedule, or a mapping of its arguments.
        execution: Seed, speed and memory, and what is checked.
        context_size: Side in pixels or voxels of what the DataModule yields, one number for all
            axes or one per axis; None for any.
    """

    backbone: Backbone
    arguments_at: ClassVar[str] = "model.init_args."
    exported: ClassVar[str] = "backbone"  # what a run leaves behind; a teacher, where there is one
    resume_may_change: ClassVar[tuple[str, ...]] = (
        "encoding.weights",
        "encoding.bands",
        *(f"execution.{f.name}" for f in fields(Execution) if f.name != "seed"),
    )
    forward_methods: ClassVar[tuple[str, ...]] = ("features",)

    def __init__(
        self,
        *,
        optimization: Optimization | Mapping[str, Any] | None = None,
        execution: Execution | Mapping[str, Any] | None = None,
        context_size: int | tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.optimization = Optimization.of(optimization)
        self.execution = as_dataclass(Execution, execution or Execution())
        self.context_size = context_size
        self.total_steps: int | None = None
        for name in ("optimization", "execution"):
            if name in self.arguments:
                self.arguments[name] = plain(getattr(self, name))
        record_hyperparameters(self, self.arguments)
        self._batch_counter = 0
        self._is_sharded = False
        self._guard = FiniteGuard()
        self._last_step: Step | None = None
        self._presence = PresenceRecord()
        self._units: UnitCheck | None = None

    # -- what a subclass implements ---------------------------------------------------------

    def compute(self, batch: Batch, generators: Generators) -> Step:
        """Return the losses of a batch, with everything random from `generators`."""
        raise NotImplementedError(
            f"{type(self).__name__} must implement compute(batch, generators)."
        )

    def after_step(self, step: Step) -> None:
        """Change what changes after the optimiser: teachers, centres, queues.

        Called once per optimiser step, before anything can save a checkpoint; `step` is that of
        the last batch, its losses detached.
        """

    def monitors(self, step: Step) -> Mapping[str, Tensor]:
        """Return what else is logged with the losses, equal on all ranks; the base has nothing."""
        return {}

    def check(self, modalities: Mapping[str, Modality]) -> None:
        """Refuse modalities that cannot be used; the base asks the backbone.

        Raises:
            ConfigError: Naming the modality and what was expected.
        """
        self.backbone.check(modalities)

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield what is trained by this modality alone; a subclass adds its decoders and heads."""
        yield from self.backbone.modality_parameters(name)

    # -- the loop ---------------------------------------------------------------------------

    def generators(self, *key_parts: int) -> Generators:
        """Seed both generators and the global one from the seed and `key_parts`.

        The global generator (dropout) follows the local one.
        """
        local, dropout = _seeds(self.execution.seed, *key_parts, rank())
        shared, _ = _seeds(self.execution.seed, *key_parts, _SHARED)
        torch.manual_seed(dropout)
        return Generators(
            torch.Generator(self.device).manual_seed(local),
            torch.Generator(self.device).manual_seed(shared),
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the summed loss of one batch."""
        counter = self._batch_counter
        self._batch_counter += 1
        self._presence.note(batch, list(self.backbone.modalities), self.device)
        step = self.compute(batch, self.generators(_TRAINING, counter))
        self._guard.watch(step.losses, counter, batch.get("id", ()))
        self._last_step = Step({k: v.detach() for k, v in step.losses.items()}, step.outputs)
        if self._is_logging_step():
            self._log_training(self._last_step)
        return _total(step.losses)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the loss with the same draws in every epoch, so that epochs compare."""
        self._held_out_step(batch, batch_idx, dataloader_idx, "val")

    def _held_out_step(self, batch: Batch, batch_idx: int, dataloader_idx: int, split: str) -> Step:
        """Log the losses of a held-out batch under `val` or `test`, and return its step."""
        with torch.random.fork_rng(devices=self._cuda_devices()):
            step = self.compute(batch, self.generators(_VALIDATION, dataloader_idx, batch_idx))
        size = self._batch_size(batch)
        common: dict[str, Any] = {"on_epoch": True, "sync_dist": True, "batch_size": size}
        common["add_dataloader_idx"] = False
        self.log(f"{split}/loss", _total(step.losses), prog_bar=True, **common)
        for name, loss in step.losses.items():
            self.log(f"{split}/loss/{name}", loss, **common)
        return step

    def features(self, batch: Batch) -> Features:
        """Return the backbone's features; the entry for callbacks, sharded or not."""
        features: Features = self.backbone(batch)
        return features

    def configure_model(self) -> None:
        """Shard the model where the strategy has a device mesh (`ModelParallelStrategy`)."""
        if self.device_mesh is not None and not self._is_sharded:
            from domainssl.training.sharding import shard

            self._is_sharded = True
            mesh = self.device_mesh["data_parallel"]
            shard(self, self.backbone, mesh, self.forward_methods)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let `after_step` follow; a checkpoint saved after the batch holds both."""
        if self.total_steps is None:
            raise RuntimeError(
                f"{type(self).__name__}.on_train_start must call super().on_train_start(): "
                "the schedule does not know the number of steps."
            )
        groups = self.trainer.optimizers[0].param_groups
        decay_weights(groups, self.optimization, self.trainer.global_step, self.total_steps)
        super().optimizer_step(*args, **kwargs)
        assert self._last_step is not None
        with torch.no_grad():
            self.after_step(self._last_step)
        self._last_step = None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep weights of modalities that no rank has seen untouched by momentum and decay."""
        for name in self._presence.absent(list(self.backbone.modalities)):
            for parameter in self.modality_parameters(name):
                parameter.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as `optimization.clip` says, else as the trainer does."""
        if self.optimization.clip is None:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
        else:
            clip_gradients(self.named_parameters(), self.optimization)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Look at the guard where the run waits for the device anyway."""
        if self._is_logging_step():
            self.check_finite()

    def check_finite(self) -> None:
        """Raise on all ranks when a loss was not finite since the start.

        Raises:
            NotFiniteError: Naming term, step and ids.
        """
        self._guard.check(self.trainer.global_step)

    # -- optimiser and schedule -------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Return the optimiser and its schedule per optimiser step."""
        options = self.optimization
        optimizer = make_optimizer(self.named_parameters(), options)

        def scale(step: int) -> float:
            return 0.0 if self.total_steps is None else options.scale(step, self.total_steps)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_train_start(self) -> None:
        """Learn how long the run is, now that the loaders exist, and set the learning rate.

        Reading `trainer.estimated_stepping_batches` earlier would build the loaders before the
        DataModule's state is restored, and drop it (pytorch-lightning#21765).
        """
        self.total_steps = self._count_steps()
        for config in self.trainer.lr_scheduler_configs:
            schedule = config.scheduler
            rates = [
                base * self.optimization.scale(schedule.last_epoch, self.total_steps)
                for base in schedule.base_lrs
            ]
            set_rates(schedule, rates)

    def _count_steps(self) -> int:
        trainer = self.trainer
        limits = [float(trainer.max_steps)] if trainer.max_steps >= 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            batches = trainer.num_training_batches
            per_epoch = (
                math.ceil(batches / trainer.accumulate_grad_batches)
                if math.isfinite(batches)
                else math.inf
            )
            limits.append(per_epoch * trainer.max_epochs)
        total = min(limits, default=math.inf)
        if not math.isfinite(total):
            raise ConfigError(
                "The length of the run is not known, and the learning rate follows it: "
                f"got trainer.max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps} and "
                f"{trainer.num_training_batches} batches per epoch. Set trainer.max_steps."
            )
        return max(1, int(total))

    # -- checks before the run --------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Compare the module with trainer and data before anything is computed."""
        self._check_precision()
        if self.optimization.clip is not None and self.trainer.gradient_clip_val is not None:
            raise ConfigError(
                f"Both trainer.gradient_clip_val ({self.trainer.gradient_clip_val!r}) and "
                f"model.init_args.optimization.clip ({self.optimization.clip!r}) are set. Set "
                "trainer.gradient_clip_val: null."
            )
        datamodule = getattr(self.trainer, "datamodule", None)
        modalities = getattr(datamodule, "modalities", None)
        if modalities:
            self.check(as_modalities(modalities))
        found, wanted = getattr(datamodule, "context_size", None), self.context_size
        if found is not None and wanted is not None:
            axes = max(np.size(found), np.size(wanted))
            if sides_of(found, axes) != sides_of(wanted, axes, "model.init_args.context_size"):
                raise ConfigError(
                    f"data yields windows of {found}, but model.init_args.context_size is "
                    f"{wanted}. Set both to the same value."
                )
        stated = getattr(datamodule, "units_stated", ())
        self._units = (
            UnitCheck(self.backbone.modalities, stated) if self.execution.check_units else None
        )
        apply_execution(self.backbone, self.execution)

    def look_at_batch(self, batch: Any, dataloader_idx: int) -> None:
        """Look at the units of the first batches, while they are on the CPU."""
        if self._units is not None:
            stage = str(getattr(self.trainer.state.stage, "value", ""))
            self._units.look(batch, f"{stage} ({dataloader_idx})" if dataloader_idx else stage)

    def _check_precision(self) -> None:
        precision = str(self.trainer.precision)
        if precision.endswith("-true") and not precision.startswith(("32", "64")):
            raise ConfigError(
                f"trainer.precision is {precision!r}: weights, statistics and input would be "
                "half precision, which rounds digital numbers before they are normalised. "
                "Use bf16-mixed, 16-mixed or 32-true."
            )

    # -- checkpoints ------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the batch counter; raise before a file exists when a loss or weight is not finite."""
        if self.trainer.state.fn == "fit":
            self.check_finite()
            check_weights(self.named_parameters(), self.trainer.global_step)
        checkpoint["training"] = {"batches": self._batch_counter}
        backbone = self.get_submodule(self.exported)
        checkpoint["backbone"] = {
            "name": class_name(class_of(backbone)),
            "arguments": copy.deepcopy(self.backbone.arguments),
            "prefix": f"{self.exported}.",
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the batch counter; a run continues with the arguments it began with."""
        trainer = attached_trainer(self)
        if trainer is not None and trainer.state.fn == "fit":
            check_resume(
                checkpoint.get("hyper_parameters", {}),
                self.arguments,
                may_change=self.resume_may_change,
                constructor=type(self).__init__,
            )
        counts = checkpoint.get("training") or checkpoint.get("objective", {})  # before 0.2
        self._batch_counter = int(counts.get("batches", 0))

    # -- helpers ----------------------------------------------------------------------------

    def _is_logging_step(self) -> bool:
        trainer = attached_trainer(self)
        if trainer is None:
            return False
        return is_logging_step(trainer) or is_end_of_short_epoch(trainer)

    def _log_training(self, step: Step) -> None:
        """Log the mean over ranks of every term and of their sum, and what the method watches."""
        losses = step.losses
        values = torch.stack([loss.float() for loss in losses.values()])
        values = all_reduce_sum(values) / world_size()
        self.log("train/loss", values.sum(), prog_bar=True, batch_size=1)
        for name, value in zip(losses, values, strict=True):
            self.log(f"train/loss/{name}", value, prog_bar=True, batch_size=1)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log("train/lr", float(rate), batch_size=1)
        with torch.no_grad():
            for name, value in self.monitors(step).items():
                self.log(f"train/{name}", value, batch_size=1)

    def _batch_size(self, batch: Batch) -> int:
        return len(next(batch[name] for name in self.backbone.modalities if name in batch))

    def _cuda_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []


def _seeds(*parts: int) -> tuple[int, int]:
    """Return two independent 63-bit seeds."""
    words = np.random.SeedSequence(parts).generate_state(2, np.uint64)
    return int(words[0] >> np.uint64(1)), int(words[1] >> np.uint64(1))


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([loss.float() for loss in losses.values()]).sum()
